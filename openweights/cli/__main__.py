"""`python -m openweights.cli` is `ow`."""

from openweights.cli import main

main(prog_name="ow")
