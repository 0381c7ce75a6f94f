"""`python -m rococap`, for environments whose scripts are not on the PATH."""

from rococap.cli import main

main()
