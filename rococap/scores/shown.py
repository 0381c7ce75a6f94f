"""Formats folders, messages and numbers for a report, which may be sent to people without access to this machine."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np

from rococap.queue import Run

_ABSOLUTE: Final = re.compile(r"(?<![\w.:/-])/[^\s/:,;'\"()]+(?:/[^\s/:,;'\"()]+)+")
"""An absolute path in a message, but not the path of a URL."""


def short(name: str) -> str:
    """An absolute path reduced to its last two names; any other name unchanged. The rest of the path is nobody else's
    business.
    """
    path = Path(name)
    return "/".join(path.parts[1:][-2:]) or name if path.is_absolute() else name


def short_within(message: str, folders: Iterable[str] = ()) -> str:
    """The message with every absolute path shortened. `folders` are known paths, which are found even if their names
    contain spaces.
    """
    for folder in sorted(filter(os.path.isabs, folders), key=len, reverse=True):
        message = re.sub(rf"(?<![\w.-]){re.escape(folder)}", lambda match: short(match[0]), message)
    return _ABSOLUTE.sub(lambda match: short(match[0]), message)


def folders_of(run: Run) -> list[str]:
    """The names of a run's data set, model and adapter, each of which may be a local path."""
    return [run.dataset, run.recipe.model, run.recipe.adapter or ""]


def rounded(value: float | None, digits: int = 3, sign: str = "") -> str:
    """The number with `digits` decimals, or "-" if it is None or NaN; `sign="+"` shows the sign of positive ones."""
    return "-" if value is None or np.isnan(value) else f"{value:{sign}.{digits}f}"
