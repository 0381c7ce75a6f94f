"""The JSON beside every file that says what made it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from rococap import __version__
from rococap.queue import Run

if TYPE_CHECKING:
    pass
from rococap.files import ending

MANIFEST = "rococap.json"
"""In every folder that `publish` writes: only such folders are ever replaced."""
STRIPPED = "strip_reasoning"


def stripped(strip_reasoning: bool) -> dict[str, bool]:
    """How a manifest states it."""
    return {STRIPPED: True} if strip_reasoning else {}


def manifest_path(path: Path) -> Path:
    """`x.json` beside `x.csv`; beside another format of the same name, `x.parquet.json`."""
    return path.with_suffix(".json") if ending(path) == ".csv" else path.with_name(f"{path.name}.json")


def manifest_of(run: Run) -> dict[str, Any]:
    """What made the captions: enough to say so beside them, and to restore them."""
    return {
        "run": run.name,
        "dataset": run.dataset,
        "dataset_revision": run.dataset_revision,
        "recipe": asdict(run.recipe),
        "recipe_hash": run.recipe.hash,
        "resolved": run.resolved,
        "rococap": __version__,
        "note": "Machine-generated captions, not reviewed by clinicians. Not for clinical use.",
    }


def is_ours(there: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Other tools may have a file of that name."""
    return there is not None and isinstance(there.get("splits"), dict)


def is_another(there: dict[str, Any], new: dict[str, Any]) -> bool:
    return any(there.get(name) != new[name] for name in ("run", "recipe_hash", "format"))


def lost_splits(there: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [split for split in there["splits"] if split not in new["splits"]]


def as_options(others: Sequence[str], new: dict[str, Any]) -> str:
    return " ".join(f"--split {split}" for split in (*others, *new["splits"]))
