"""Makes `python -m rococap` the `rococap` command, for environments whose scripts are not on the PATH."""

from rococap.cli import main

main()
