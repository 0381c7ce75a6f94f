"""What every page needs: short transactions on the queue, templates, and files loaded at the start."""

import hashlib
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

import jinja2
from fastapi import Depends
from sqlalchemy import Connection
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DatabaseError as DriverError
from starlette.requests import Request
from starlette.responses import HTMLResponse

from rococap import __version__, db
from rococap.db import execute
from rococap.errors import DatabaseError
from rococap.figures import ago, duration, percent, significant
from rococap.queue import with_run
from rococap.results.texts import iso
from rococap.tables import SCHEMA
from rococap.urls import holds_password, shown
from rococap.web.access import Access
from rococap.web.pieces import pieces

NOTICE: Final = "Machine-generated captions. Not for clinical use."
NAVIGATION: Final = (("Dashboard", "/"), ("Pictures", "/pictures"), ("Studies", "/studies"), ("API", "/docs"))
"""Titles and paths, in order. A page is linked once a router answers its path."""
READ_PATIENCE_SEC: Final = 2.0
WRITE_PATIENCE_SEC: Final = 10.0

FOLDER = Path(__file__).parent
MEDIA_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


# --- Files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asset:
    """A file that belongs to the pages. `version` changes with its content."""

    content: bytes
    media_type: str
    version: str


@cache
def assets() -> dict[str, Asset]:
    """The files below `/static/`, by name. No other file is ever served, and none is opened for a request."""
    paths = [FOLDER.parent / "theme.css", *sorted((FOLDER / "static").iterdir())]
    found = {path.name: path.read_bytes() for path in paths if path.suffix in MEDIA_TYPES}
    # One version for all: a script imports others, by names that carry no version of their own.
    version = hashlib.sha256(b"".join(found.values())).hexdigest()[:12]
    return {name: Asset(content, MEDIA_TYPES[Path(name).suffix], version) for name, content in found.items()}


def static(name: str) -> str:
    """The URL of an asset. Raises KeyError if there is none of this name."""
    return f"/static/{assets()[name].version}/{name}"


def moment(at: int) -> str:
    """A time in ms since 1970, for people."""
    return iso(at)[:16].replace("T", " ") + " UTC"


# --- The site --------------------------------------------------------------------------------------------------


class Site:
    """The queue and the templates, for every router. `paths` are those that the routers answer."""

    def __init__(self, database: Database, access: Access) -> None:
        self.database = database
        self.access = access
        self.paths: frozenset[str] = frozenset()
        self._first_run: int | None = None
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(FOLDER / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._templates.filters |= {
            "ago": ago,
            "duration": duration,
            "iso": iso,
            "moment": moment,
            "number": "{:,}".format,
            "percent": percent,
            "quoted": shlex.quote,
            "significant": significant,
            "when": lambda at: f"{iso(at)[:16].replace('T', ' ')} UTC",
        }
        self._templates.globals |= {
            "command": self.command,
            "command_line": self.command_line,
            "database": shown(database.url),
            "notice": NOTICE,
            "pieces": pieces,
            "read_only": access.read_only,
            "static": static,
            "version": __version__,
        }

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A short transaction that takes no write lock.

        Raises DatabaseUnavailable if the database is locked or away, and DatabaseError if it is not the one, or not of
        the schema, that this server began with.
        """
        with self._transaction(write=False, patience=READ_PATIENCE_SEC) as conn:
            yield conn

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that changes the queue. Raises as `read` does."""
        with self._transaction(write=True, patience=WRITE_PATIENCE_SEC) as conn:
            yield conn

    @contextmanager
    def _transaction(self, *, write: bool, patience: float) -> Iterator[Connection]:
        try:
            with db.transaction(self.database, write=write, patience=patience) as conn:
                self._check(conn)
                yield conn
        except DriverError as error:
            raise DatabaseError(db.explain(error, self.database.url)) from error

    def _check(self, conn: Connection) -> None:
        """A run's row outlives the run, so the first one tells one database from another."""
        found = db.found_schema(conn)
        if found is None:
            raise db.replaced(self.database.url)
        if found != SCHEMA:
            raise db.wrong_schema(self.database.url, found)
        first = execute(conn, "SELECT created_at FROM runs ORDER BY id LIMIT 1").scalar()
        if self._first_run is not None and first != self._first_run:
            raise db.replaced(self.database.url)
        self._first_run = first

    def command(self, command: str, run: str) -> str:
        """The command line to paste that runs this command on this run of this database."""
        return self.command_line(with_run(command, run))

    def command_line(self, line: str) -> str:
        """The line `rococap …` with the option for this database, if it needs one."""
        url = shown(self.database.url)
        if url == db.DEFAULT_URL or holds_password(url):
            return line
        return f"rococap --db {shlex.quote(url)} {line.removeprefix('rococap ')}"

    def render(self, template: str, **values: Any) -> str:
        """A template as HTML, in which every value is escaped. `navigation` holds the pages that exist."""
        navigation = [(title, path) for title, path in NAVIGATION if path in self.paths]
        return self._templates.get_template(template).render(navigation=navigation, **values)

    def page(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """The answer to a request, from a template that extends `base.html`. Pages with a `reader` show it."""
        path, query = request.url.path, request.url.query
        here = f"{path}?{query}" if query else path
        return HTMLResponse(self.render(template, **{"path": path, "here": here} | values), status)


def site_of(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


Here = Annotated[Site, Depends(site_of)]
"""The annotation of a route's parameter that receives the site."""
