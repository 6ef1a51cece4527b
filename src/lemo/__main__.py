"""`python -m lemo` is `lemo`."""

from lemo.cli.main import run

run()
