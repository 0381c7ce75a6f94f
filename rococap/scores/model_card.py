"""Writes scores into the card of a fine-tuned model, between two lines that fine-tuning has put there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rococap.engines.files import folder_digest
from rococap.errors import RococapError
from rococap.files import replacing
from rococap.queue import Run
from rococap.results.manifest import MODEL_CARD, SCORES_BEGIN, SCORES_END
from rococap.scores.evaluate import Evaluation
from rococap.scores.explained import explained
from rococap.scores.shown import folders_of, rounded, short_within


def check(folder: Path) -> None:
    """Raises RococapError if the folder has no model card with a place for scores."""
    _around_scores(folder)


def write(folder: Path, evaluation: Evaluation, results: Mapping[str, Any]) -> None:
    """Replaces the scores in the model card by those of the runs that caption with the model or adapter in the folder.

    `results` is the object from `evaluate.to_json`. Raises RococapError if there is no such run, or if the folder has
    other weights now.
    """
    before, after = _around_scores(folder)
    sections: list[str] = []
    for scored, of_run in zip(evaluation.scored, results["runs"], strict=True):
        if _captions_with(scored.run, folder):
            sections += _section(scored.run, of_run, results["rococap"])
    if not sections:
        raise RococapError(f"None of the runs captions with {folder}: name one that does with --run.")
    with replacing(folder / MODEL_CARD) as partial:
        text = "\n\n".join([f"{before}{SCORES_BEGIN}", *sections, f"{SCORES_END}{after}"])
        partial.write_text(text, encoding="utf-8")


def _around_scores(folder: Path) -> tuple[str, str]:
    card = folder / MODEL_CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, begin, rest = text.partition(SCORES_BEGIN)
    _, end, after = rest.partition(SCORES_END)
    if not (begin and end):
        raise RococapError(
            f"{card} is no model card with a place for scores. Name the --output of a fine-tuning or, if you have "
            f"edited the card, put these two lines where the scores belong: {SCORES_BEGIN} {SCORES_END}"
        )
    return before, after


def _captions_with(run: Run, folder: Path) -> bool:
    used, key = (run.recipe.adapter, "adapter") if run.recipe.adapter else (run.recipe.model, "digest")
    if not Path(used).is_dir() or not folder.samefile(used):
        return False
    captioned = (run.resolved or {}).get(key)  # a server does not tell
    if captioned and captioned != folder_digest(folder):
        raise RococapError(
            f"{folder} holds other weights than those that run {run.name!r} captioned with. Caption with these in "
            f"another run: rococap enqueue --run NEW --from {run.name}"
        )
    return True


def _section(run: Run, results: Mapping[str, Any], version: str) -> Iterator[str]:
    yield f"### {results['split']}"
    yield f"{results['n']:,} captions of run `{run.name}`, scored by rococap {version} against the original captions."
    for warning in results["warnings"]:
        yield f"**Warning:** {short_within(warning, folders_of(run))}"
    without = results["without_near_duplicates"]
    yield _table(results, without if without and without["left_out"] else None)
    yield _about_near_duplicates(without)


def _table(results: Mapping[str, Any], without: Mapping[str, Any] | None) -> str:
    header = ["score", "value", "95 % interval", *(["without near-duplicates"] if without else [])]
    rows = [header, ["---"] * len(header)]
    for name, value in results["metrics"].items():
        interval = results["intervals"].get(name)
        rows.append(
            [
                " ".join(filter(None, (explained(name).title, f"({explained(name).scale})"))),
                rounded(value),
                f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "-",
                *([rounded(without["metrics"].get(name))] if without else []),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _about_near_duplicates(without: Mapping[str, Any] | None) -> str:
    if without is None:
        return "Whether pictures have near-duplicates in other splits was not examined (`rococap doctor --leaks`)."
    found = (
        f"Pictures with a near-duplicate in another split, which the last column leaves out: {without['left_out']:,}."
        if without["left_out"]
        else "None of these pictures is known to have a near-duplicate in another split."
    )
    unseen = f" Pictures that were not examined: {without['not_hashed']:,}." if without["not_hashed"] else ""
    return found + unseen
