"""URLs of SQLite files: each is parsed to the file that the user meant, or refused with the way to write it.

SQLAlchemy's own parsing depends on its version (2.1 decodes `%20`, 2.0 does not), and drops whatever it takes for
options. Knows no schema and opens nothing.
"""

import os
import re
import shlex
from urllib.parse import parse_qsl, unquote

from sqlalchemy.engine import URL

from rococap.errors import DatabaseError

_SCHEME = re.compile(r"(sqlite(?:\+pysqlite)?):(.*)", re.DOTALL)
_DRIVER_OPTIONS = frozenset(["cached_statements", "check_same_thread", "detect_types", "isolation_level", "timeout"])
_SQLITE_OPTIONS = frozenset(["cache", "immutable", "mode", "nolock", "psow", "uri", "vfs"])


def sqlite_url(text: str) -> URL | None:
    """The URL for a path or an SQLite URL, with `~` expanded to the home folder; None for other databases.

    Raises DatabaseError if another file than the one meant would be opened or created.
    """
    match = _SCHEME.fullmatch(text)
    if match is None:
        return None if "://" in text else URL.create("sqlite", database=os.path.expanduser(text))
    scheme, rest = match[1], match[2]
    if rest not in ("", "//") and not rest.startswith("///"):
        corrected = f"sqlite:///{rest.lstrip('/')}"
        raise DatabaseError(f"{text} names no file: its path goes after three slashes: --db {shlex.quote(corrected)}")
    written, mark, options = rest[3:].partition("?")
    query = _options(text, options) if mark else {}
    decoded = os.path.expanduser(unquote(written, errors="surrogateescape"))
    _check_escapes(text, os.path.expanduser(written), decoded)
    return URL.create(scheme, database=decoded, query=query)


def shown(url: URL) -> str:
    """A URL that opens the same database when pasted, with any password hidden."""
    if url.get_backend_name() != "sqlite":
        return url.render_as_string(hide_password=True)
    return _file_url(url.database or "")


def holds_password(text: str) -> bool:
    """Whether a database URL contains a password, and so must not be printed as it was written."""
    return re.search(r"://[^/@]*:[^/@]*@|[?&]password=", text) is not None


def _file_url(path: str) -> str:
    for character in "%?#":
        path = path.replace(character, f"%{ord(character):02X}")
    return f"sqlite:///{path}"


def _options(text: str, options: str) -> dict[str, str]:
    query = dict(parse_qsl(options, keep_blank_values=True)) or {"": ""}
    for name, value in query.items():
        if name not in _DRIVER_OPTIONS | _SQLITE_OPTIONS or "/" in value:
            raise DatabaseError(
                f"What follows the ? in {text} is not an SQLite option. If the ? is part of the file's name, write "
                f"it as %3F: --db {shlex.quote(text.replace('?', '%3F'))}"
            )
    return query


def _check_escapes(text: str, written: str, decoded: str) -> None:
    """Raises DatabaseError if the user seems to mean the path as written: a folder that is really named `a%20b` would
    otherwise be read as `a b`.
    """
    if decoded == written or os.path.exists(decoded):
        return
    is_literal = os.path.isdir(os.path.dirname(written) or ".") and not os.path.isdir(os.path.dirname(decoded) or ".")
    if is_literal or os.path.exists(written):
        raise DatabaseError(
            f"{text} names {decoded}, because % and two hex digits are one character in a URL. For {written}, write "
            f"the % as %25: --db {shlex.quote(_file_url(written))}"
        )
