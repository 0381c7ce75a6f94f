"""URLs of SQLite files: the file that was named, or an error that shows how to write it.

SQLAlchemy's own reading depends on its version (2.1 decodes `%20`, 2.0 does not), and drops what it takes for options.
"""

import os
import re
import shlex
from urllib.parse import parse_qsl, unquote

from sqlalchemy.engine import URL

from rococap.errors import DatabaseError

_SCHEME = re.compile(r"(sqlite(?:\+pysqlite)?):(.*)", re.DOTALL)
_OF_THE_DRIVER = frozenset(["cached_statements", "check_same_thread", "detect_types", "isolation_level", "timeout"])
_OF_SQLITE = frozenset(["cache", "immutable", "mode", "nolock", "psow", "uri", "vfs"])


def sqlite_url(text: str) -> URL | None:
    """The URL that a path or an SQLite URL means, with the home folder in the place of `~`; None for other databases.

    Raises DatabaseError where another file than the one that is meant would be opened or made.
    """
    match = _SCHEME.fullmatch(text)
    if match is None:
        return None if "://" in text else URL.create("sqlite", database=os.path.expanduser(text))
    scheme, rest = match[1], match[2]
    if rest not in ("", "//") and not rest.startswith("///"):
        told = f"sqlite:///{rest.lstrip('/')}"
        raise DatabaseError(f"{text} names no file, which stands behind three slashes: --db {shlex.quote(told)}")
    written, mark, options = rest[3:].partition("?")
    query = _options(text, options) if mark else {}
    named = os.path.expanduser(unquote(written, errors="surrogateescape"))
    _check_escapes(text, os.path.expanduser(written), named)
    return URL.create(scheme, database=named, query=query)


def shown(url: URL) -> str:
    """A URL that can be pasted and opens the same; passwords are hidden."""
    if url.get_backend_name() != "sqlite":
        return url.render_as_string(hide_password=True)
    return _of_file(url.database or "")


def holds_password(text: str) -> bool:
    """Whether a database's URL is not to be printed as it was written."""
    return re.search(r"://[^/@]*:[^/@]*@|[?&]password=", text) is not None


def _of_file(path: str) -> str:
    for character in "%?#":
        path = path.replace(character, f"%{ord(character):02X}")
    return f"sqlite:///{path}"


def _options(text: str, options: str) -> dict[str, str]:
    told = dict(parse_qsl(options, keep_blank_values=True)) or {"": ""}
    for name, value in told.items():
        if name not in _OF_THE_DRIVER | _OF_SQLITE or "/" in value:
            raise DatabaseError(
                f"What stands behind the ? of {text} is no option of SQLite. If it is part of the file's name, write "
                f"%3F for the ?: --db {shlex.quote(text.replace('?', '%3F'))}"
            )
    return told


def _check_escapes(text: str, written: str, named: str) -> None:
    """Whoever has a folder `a%20b` and writes it so would be given a file in `a b`."""
    if named == written or os.path.exists(named):
        return
    is_meant = os.path.isdir(os.path.dirname(written) or ".") and not os.path.isdir(os.path.dirname(named) or ".")
    if is_meant or os.path.exists(written):
        raise DatabaseError(
            f"{text} names {named}, since % and two digits are one character of a URL. For {written} write %25 for the "
            f"%: --db {shlex.quote(_of_file(written))}"
        )
