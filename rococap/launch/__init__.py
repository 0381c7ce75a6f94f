"""Launchers: workers on many machines, placed and watched by an engine that the user already runs.

A launcher schedules nothing. Slurm or Ray decides where its processes run and replaces those that it loses; the queue
decides who captions what.
"""

import shlex

from sqlalchemy import Engine as Database

from rococap.errors import DatabaseError, RococapError
from rococap.urls import shown


class LaunchError(RococapError):
    """An engine is missing, cannot be reached, or cannot give what is asked of it."""


def check_shared(database: Database, places: str) -> None:
    """Raises DatabaseError for an SQLite file, whose locks hold on one machine only. `places` says where the workers
    would run.
    """
    if database.dialect.name == "sqlite":
        url = shlex.quote(shown(database.url))
        raise DatabaseError(
            f"SQLite is for one machine, and the workers would run on {places}. Copy the queue to PostgreSQL, and "
            f"launch them on the copy: rococap copy-db {url} postgresql+psycopg://USER@HOST/NAME"
        )
