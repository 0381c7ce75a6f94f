"""Atomic writes: a file is written beside its target, synced and renamed, so that it exists whole or not at all."""

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
    """The file's suffix in lower case: some programs write X.CSV."""
    return path.suffix.lower()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; when the block ends, the file is synced and renamed to `path`.

    If the block raises, `path` stays as it was. Raises RococapError if `path` is not a regular file, the disk is full
    or the folder cannot be written.
    """
    if path.exists() and not path.is_file():
        raise RococapError(f"{path} is a folder or a device, not a file to replace: name another with --output.")
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
    """The error to raise when writing `path` failed with `error`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RococapError(
            f"No space left for {path}: nothing was changed there. Free some space, or write elsewhere with --output."
        )
    return RococapError(f"{path} cannot be written ({error.strerror or error}). Write elsewhere with --output.")


def fsync(path: Path) -> None:
    """Flushes a file or a folder to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON. Raises RococapError, as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a manifest file; None if there is no such file. Raises RococapError for anything else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise RococapError(f"{path} is not a manifest ({error}). Move it away to continue without it.") from error
