"""Folders, messages and numbers as a report shows them to people elsewhere."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np

from rococap.queue import Run

_ABSOLUTE: Final = re.compile(r"(?<![\w.:/-])/[^\s/:,;'\"()]+(?:/[^\s/:,;'\"()]+)+")
"""A file or folder in a message; no part of an address on the web."""


def short(name: str) -> str:
    """A folder by its last two names: a report is sent to people whom the rest does not concern."""
    path = Path(name)
    return "/".join(path.parts[1:][-2:]) or name if path.is_absolute() else name


def short_within(message: str, folders: Iterable[str] = ()) -> str:
    """With every file and folder so. `folders` are those that are known: their names may have blanks."""
    for folder in sorted(filter(os.path.isabs, folders), key=len, reverse=True):
        message = re.sub(rf"(?<![\w.-]){re.escape(folder)}", lambda match: short(match[0]), message)
    return _ABSOLUTE.sub(lambda match: short(match[0]), message)


def folders_of(run: Run) -> list[str]:
    return [run.dataset, run.recipe.model, run.recipe.adapter or ""]


def rounded(value: float | None, digits: int = 3, sign: str = "") -> str:
    return "-" if value is None or np.isnan(value) else f"{value:{sign}.{digits}f}"
