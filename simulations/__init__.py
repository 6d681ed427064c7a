"""Experiments, one TOML file each; ``fed-dpsat run simulations/NAME.toml`` runs one."""
