"""The combined score of ImageCLEFmedical Caption 2026, from parts that are made up."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import steps
from samples import caption, fill, texts

from rococap.recipe import Recipe
from rococap.scores import evaluate, imageclef, metrics

PARTS = {
    "bertscore_f1": 0.6,
    "rouge1_imageclef": 0.3,
    "medimageinsight": 0.2,
    "bleurt": 0.4,
    "umls_f1": 0.2,
    "alignscore": 0.1,
}
PLUGINS = """
VALUES = {"medimageinsight": 0.2, "bleurt": 0.4, "umls_f1": 0.2, "alignscore": 0.1}
def __getattr__(name):
    return lambda captions, references: [VALUES[name] for _ in captions]
def holes(captions, references):
    return [None, *(0.4 for _ in captions[1:])]
"""


def columns(**parts: float) -> dict[str, evaluate.Vector]:
    return {name: np.array([value]) for name, value in parts.items()}


def told(values: dict[str, evaluate.Vector]) -> dict[str, float]:
    return {name: float(value[0]) for name, value in imageclef.combine(values).items()}


def test_relevance_is_the_mean_of_four_parts_factuality_of_two_and_overall_of_both():
    expected = {"imageclef_relevance": 0.45, "imageclef_factuality": 0.15, "imageclef_overall": 0.3}
    assert told(columns(**PARTS)) == pytest.approx(expected)


def test_a_negative_cosine_of_a_picture_counts_as_0():
    assert told(columns(**PARTS | {"medimageinsight": -0.5}))["imageclef_relevance"] == pytest.approx(1.3 / 4)


def test_the_published_overall_of_the_first_place_is_the_mean_of_its_two():
    parts = dict.fromkeys(PARTS, 0.5786) | {"medimageinsight": 0.5786 / 2.5, "umls_f1": 0.1724, "alignscore": 0.1724}
    assert told(columns(**parts))["imageclef_overall"] == pytest.approx(0.3755)


@pytest.mark.parametrize("absent", PARTS)
def test_there_is_no_overall_without_every_part(absent):
    found = told(columns(**{name: value for name, value in PARTS.items() if name != absent}))
    assert list(found) == ["imageclef_relevance" if absent in ("umls_f1", "alignscore") else "imageclef_factuality"]
    assert imageclef.missing("imageclef_overall", columns(**PARTS)) == []


# --- evaluate --imageclef --------------------------------------------------------------------------------------


@pytest.fixture
def asked(database, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of an evaluation of two runs by plug-ins for four of the parts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "imageclef_parts", raising=False)
    monkeypatch.setattr(metrics, "open_wordnet", lambda: SimpleNamespace(synsets=lambda word: []))
    monkeypatch.setattr(metrics, "bertscore", lambda pairs, references: iter([0.6] * len(pairs)))
    (tmp_path / "imageclef_parts.py").write_text(PLUGINS)
    for name, n in (("default", 6), ("other", 4)):
        run = fill(database, tmp_path / "set", 6, run=name, recipe=Recipe(model=f"tests/{name}"))
        caption(database, run, texts(*[f"Original caption {at}." for at in range(n)]))
    also = [f"--also=imageclef_parts:{name}" for name in ("medimageinsight", "bleurt", "umls_f1", "alignscore")]
    return ["--db", url, "evaluate", "--split", "train", "--imageclef", "2026", *also]


def test_the_combined_scores_stand_beside_their_parts_with_intervals(asked):
    result = steps.invoke(*asked, "--run", "default", "--also", "bertscore_f1", "--json")
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    assert run["metrics"]["rouge1_imageclef"] == 1
    assert run["metrics"]["imageclef_relevance"] == pytest.approx((0.6 + 1 + 0.5 + 0.4) / 4)
    assert run["metrics"]["imageclef_overall"] == pytest.approx((0.625 + 0.15) / 2)
    assert run["intervals"]["imageclef_overall"] == pytest.approx([0.3875, 0.3875])
    assert not any(name.startswith("imageclef") for name in run["not_computed"])


def test_parts_that_are_not_there_are_named_and_no_overall_is_printed(asked):
    result = steps.invoke(*[one for one in asked if "bleurt" not in one], "--run", "default")
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "imageclef_factuality 0.150" in told
    assert (
        "imageclef_relevance, imageclef_overall: not computed: It lacks bertscore_f1, bleurt, for all captions or for "
        "some. Add --also bertscore_f1 and plug-ins named bleurt (--also or --also-command NAME=…); if one is "
        "there, it must score every caption that has an original."
    ) in told
    assert not any(line.startswith("imageclef_overall ") for line in result.output.splitlines())


def test_a_part_that_some_captions_lack_makes_no_overall(asked):
    with_holes = [one.replace("imageclef_parts:bleurt", "bleurt=imageclef_parts:holes") for one in asked]
    result = steps.invoke(*with_holes, "--run", "default", "--also", "bertscore_f1", "--json")
    (run,) = json.loads(result.stdout)["runs"]
    assert run["metrics"]["bleurt"] == pytest.approx(0.4)
    assert "It lacks bleurt, for all captions or for some." in run["not_computed"]["imageclef_overall"]
    assert "imageclef_relevance" not in run["metrics"]


def test_runs_are_compared_by_what_bertscore_over_their_common_pictures_does_not_change(asked):
    result = steps.invoke(*asked, "--run", "default", "--run", "other", "--also", "bertscore_f1", "--json")
    told = json.loads(result.stdout)
    assert "imageclef_overall" in told["runs"][1]["metrics"]
    assert "imageclef_overall" not in told["paired"][0]["differences"]
    assert told["paired"][0]["differences"]["imageclef_factuality"] == 0


def test_without_the_option_nothing_is_combined(asked):
    result = steps.invoke(*[one for one in asked if one not in ("--imageclef", "2026")], "--run", "default", "--json")
    (run,) = json.loads(result.stdout)["runs"]
    assert not any(name.startswith("imageclef") for name in [*run["metrics"], *run["not_computed"]])
