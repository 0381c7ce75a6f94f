"""Scores in the card of the model that captioned."""

import json
from pathlib import Path

import pytest
from samples import caption, fill, register, texts, write_shard
from sqlalchemy import Engine
from steps import refused, said

from rococap import db
from rococap.engines.files import folder_digest
from rococap.recipe import Recipe
from rococap.scores import leaks

CARD = "# A model\n\n## Scores\n\n<!-- scores -->\n\nNone yet.\n\n<!-- end of scores -->\n\n## Recipe\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my models" / "tuned"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def evaluate(engine: Engine, url: str, tmp_path: Path, model: Path) -> tuple[str, ...]:
    """The command that evaluates three captions of four by the model, of which two are right."""
    root = tmp_path / "set"
    run = fill(engine, root, 4, recipe=Recipe(model=str(model)))
    caption(engine, run, texts("Original caption 0.", "Original caption 1.", "Something else entirely."))
    return ("evaluate", "--db", url, "--split", "train", "--output", str(tmp_path / "scores.csv"))


def hashed(engine: Engine, *hashes: str) -> None:
    with db.transaction(engine, write=True) as conn:
        rows = [(number, leaks.ALGORITHM, one * (leaks.BITS // 4)) for number, one in enumerate(hashes, 1)]
        db.execute(conn, "INSERT INTO image_hashes VALUES (?, ?, ?)", rows)


def test_scores_replace_those_of_before_and_nothing_else(evaluate, engine, model, tmp_path):
    shown = said(*evaluate, "--card", str(model))
    assert f"{model}: scores in the model card" in shown
    card = (model / "README.md").read_text()
    before, _, after = CARD.partition("\n\nNone yet.\n\n")
    assert card.startswith(f"{before}\n\n### train\n\n3 captions of run `default`")
    assert card.endswith(after)
    scores = json.loads((tmp_path / "scores.json").read_text())["runs"][0]
    low, high = scores["intervals"]["bleu_1"]
    assert f"| BLEU-1 (0 to 1) | {scores['metrics']['bleu_1']:.3f} | {low:.3f} to {high:.3f} |\n" in card
    assert "**Warning:** default has not captioned 1 picture of train" in card
    assert "near-duplicates in other splits was not examined" in card

    said(*evaluate, "--card", str(model))
    assert (model / "README.md").read_text() == card


def test_scores_without_near_duplicates_stand_beside_the_others(evaluate, engine, model, tmp_path):
    write_shard(tmp_path / "set", "test", range(1))
    register(engine, tmp_path / "set", ["test"], recipe=Recipe(model=str(model)))
    hashed(engine, "0", "5", "a", "f", "a")
    said(*evaluate, "--card", str(model))
    card = (model / "README.md").read_text()
    assert "| score | value | 95 % interval | without near-duplicates |" in card
    assert card.splitlines()[[line[:9] for line in card.splitlines()].index("| BLEU-1 ")].endswith(" | 1.000 |")
    assert "a near-duplicate in another split, which the last column leaves out: 1." in card


def test_where_it_was_trained_is_a_warning_without_paths(evaluate, model, tmp_path):
    marker = {"dataset": str(tmp_path / "set"), "splits": ["train"]}
    (model / "rococap_training.json").write_text(json.dumps(marker))
    said(*evaluate, "--card", str(model))
    card = (model / "README.md").read_text()
    assert "**Warning:** my models/tuned was trained on train of this data set" in card
    assert str(tmp_path) not in card


def test_scores_of_other_weights_are_refused(evaluate, engine, model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    told = refused("--db", "sqlite:///rococap.db", *evaluate, "--card", str(other))
    assert told.startswith(
        f"{other / 'README.md'} is no model card with a place for scores. Name the --output of a fine-"
    )
    (other / "README.md").write_text(CARD)
    assert f"None of the runs captions with {other}" in refused(*evaluate, "--card", str(other))
    with db.transaction(engine, write=True) as conn:
        resolved = json.dumps({"digest": folder_digest(model)})
        db.execute(conn, "UPDATE runs SET resolved = ?", (resolved,))
    said(*evaluate, "--card", str(model))
    before = (model / "README.md").read_text()
    (model / "config.json").write_text("{ }")
    assert "holds other weights than those that run 'default' captioned with" in refused(
        *evaluate, "--card", str(model)
    )
    assert (model / "README.md").read_text() == before
