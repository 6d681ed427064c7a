"""Server strategies, one file each; yours is named in the configuration as ``package.module:attribute``."""
