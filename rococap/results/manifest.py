"""Manifests: the JSON file beside every export, which records the run, recipe and model that made it.

`publish` and `hub` also read the manifest of an existing folder to decide whether it may be replaced.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

from rococap import __version__
from rococap.files import ending
from rococap.queue import Run

STRIPPED = "strip_reasoning"
"""The manifest key of captions from which the reasoning was removed."""

TRAINING = "rococap_training.json"
"""A file in the folder of a trained adapter or model, which says what it was trained on. `evaluate` reads its keys
`dataset`, a name, and `splits`, a list."""
MODEL_CARD = "README.md"
"""The model card in the same folder. `evaluate --card` replaces what is between these two lines of it."""
SCORES_BEGIN = "<!-- scores -->"
SCORES_END = "<!-- end of scores -->"


def stripped(strip_reasoning: bool) -> dict[str, bool]:
    """The manifest entry for captions from which the reasoning was removed; empty if it was not."""
    return {STRIPPED: True} if strip_reasoning else {}


def manifest_path(path: Path) -> Path:
    """The manifest of an exported file: `x.json` for `x.csv`, `x.parquet.json` for `x.parquet`."""
    return path.with_suffix(".json") if ending(path) == ".csv" else path.with_name(f"{path.name}.json")


def manifest_of(run: Run) -> dict[str, Any]:
    """The entries that all manifests share: what made the captions, as needed to document and to restore them."""
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


def is_ours(existing: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether rococap wrote this manifest: another tool may use a file of the same name."""
    return existing is not None and isinstance(existing.get("splits"), dict)


def is_another(existing: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the existing manifest is of another run, recipe or format than the new one, or of other texts: `text` is
    only in manifests of the format messages, `captions` not in those of the machine's captions.
    """
    names = ("run", "recipe_hash", "format", "text", "captions")
    return any(existing.get(name) != new.get(name) for name in names)


def lost_splits(existing: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The splits that would be lost if the new export replaced the existing one."""
    return [split for split in existing["splits"] if split not in new["splits"]]


def as_options(others: Sequence[str], new: dict[str, Any]) -> str:
    """The command-line options that export the new splits together with the others."""
    return " ".join(f"--split {split}" for split in (*others, *new["splits"]))
