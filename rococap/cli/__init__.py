"""The command line: a module for each group of commands, which read options, call the library and print."""

from rococap.cli import enqueue, operate, results, setup, status, worker
from rococap.cli.options import cli

__all__ = ["cli", "enqueue", "main", "operate", "results", "setup", "status", "worker"]


def main() -> None:
    cli()
