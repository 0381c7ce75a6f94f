"""Whole files or none: written beside their place, synced and renamed."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rococap.errors import RococapError


def ending(path: Path) -> str:
    """`.csv` also of X.CSV, as older programs name it."""
    return path.suffix.lower()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; what was written there becomes `path` at the end, on disk, or never.

    Raises RococapError, naming the next step, if the disk is full or the folder cannot be written.
    """
    if path.exists() and not path.is_file():
        raise RococapError(f"{path} is a folder or a device, and no file to replace: name another with --output.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> RococapError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RococapError(
            f"No space left for {path}: nothing was changed there. Free some, or write elsewhere with --output."
        )
    return RococapError(f"{path} cannot be written ({error.strerror or error}). Write elsewhere with --output.")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Raises RococapError, as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise RococapError(f"{path} is not a manifest ({error}). Move it away to go on without it.") from error
