"""The command line: one module per group of commands, which read options, call the library and print.

Nothing of the queue or the models is decided here. torch and pandas are imported inside the commands that need them.
"""

from rococap.cli import (
    enqueue,
    finetune,
    launch,
    operate,
    probe,
    results,
    review,
    serve,
    setup,
    status,
    study,
    transfer,
    worker,
)
from rococap.cli.options import cli

__all__ = [
    "cli",
    "enqueue",
    "finetune",
    "launch",
    "main",
    "operate",
    "probe",
    "results",
    "review",
    "serve",
    "setup",
    "status",
    "study",
    "transfer",
    "worker",
]


def main() -> None:
    cli()
