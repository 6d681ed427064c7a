"""Settings of the tables of results, a TOML file each, for ``fed-dpsat list presets`` and ``fed-dpsat run --preset``."""
