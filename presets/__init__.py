"""Settings of the tables of results, a TOML file each: ``fed-dpsat list presets``, ``fed-dpsat run --preset NAME``."""
