"""``python -m fed_dpsat`` is ``fed-dpsat``."""

from fed_dpsat.cli import app

app(prog_name="fed-dpsat")
