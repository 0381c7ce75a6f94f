"""Scores beside the captions: computed once, summed up rightly, and honest about what is missing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import steps
from samples import caption, fill, register, texts, write_shard
from sqlalchemy import Engine

from rococap import db, queue
from rococap.errors import RunError
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.scores import evaluate, facts, metrics

ORIGINALS = [
    "CT of the chest with a mass in the left lung.",
    "MRI of the brain showing a lesion (arrow).",
    "Chest X-ray, PA view, of a man with pneumonia.",
    "Ultrasound of the liver with a stone.",
    "CT of the abdomen: a cyst in the right kidney.",
    "MRI of the spine with a herniated disc at L4/L5.",
]
CUIS = [
    ["C0040405"],
    ["C0024485"],
    ["C1306645", "C0817096", "C1996865"],
    ["C0041618"],
    ["C0040405", "C0022646"],
    [],
]
CAPTIONS = [*ORIGINALS[:4], "CT with a mass.", "nothing"]


def originals(root: Path, **others: str) -> None:
    captions = dict(enumerate(ORIGINALS)) | {int(n.removeprefix("n")): text for n, text in others.items()}
    write_shard(root, "train", range(len(ORIGINALS)), captions=captions, cuis=dict(enumerate(CUIS)))


def make(database: Engine, root: Path, name: str = "default", model: str = "tests/small") -> Run:
    originals(root)
    register(database, root, ["train"], run=name, recipe=Recipe(model=model))
    with db.transaction(database) as conn:
        return queue.get_run(conn, name)


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every machine has it, and opening it takes two seconds: METEOR's own tests are in test_metrics.py."""
    monkeypatch.setattr(metrics, "open_wordnet", lambda: SimpleNamespace(synsets=lambda word: []))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


@pytest.fixture
def run(database: Engine, root: Path) -> Run:
    return make(database, root)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(metric, captions) of each time that scores are computed."""
    calls: list[tuple[str, int]] = []

    def counted(metric: evaluate.Metric) -> evaluate.Metric:
        def score(pairs, wanted):
            calls.append((metric.name, len(wanted)))
            return metric.score(pairs, wanted)

        return replace(metric, score=score)

    monkeypatch.setattr(evaluate, "METRICS", tuple(map(counted, evaluate.METRICS)))
    return calls


def told(database: Engine, *names: str) -> dict:
    return evaluate.to_json(evaluate.evaluate(database, names, ["train"]))


def of(database: Engine, *names: str) -> dict:
    return told(database, *names)["runs"][0]


# --- Once ------------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_what_was_scored_is_not_scored_again(database, run, computed):
    caption(database, run, texts(*CAPTIONS))
    first = told(database)
    assert computed == [(one.name, 6) for one in evaluate.METRICS if not one.extra]
    computed.clear()
    assert told(database) == first
    assert computed == []


@pytest.mark.every_database
def test_a_new_caption_costs_itself_but_in_cider_d(database, run, computed):
    caption(database, run, texts(*CAPTIONS[:4]))
    told(database)
    computed.clear()
    caption(database, run, texts(*CAPTIONS[4:]), now=2_000)
    found = of(database)
    assert dict(computed) == {"overlap": 2, "meteor_nltk": 2, "concepts": 2, "facts": 2, "cider_d": 6}
    assert found["n"] == 6
    words = [metrics.tokens(text) for text in CAPTIONS]
    expected = metrics.cider_d(words, [[metrics.tokens(text)] for text in ORIGINALS])
    assert found["metrics"]["cider_d"] == pytest.approx(expected.mean())


@pytest.mark.every_database
def test_captions_that_were_made_while_the_clock_ran_ahead_are_scored(database, run):
    with db.transaction(database) as conn:
        future = db.now(conn) + 7_200_000
    caption(database, run, texts(*CAPTIONS[:2]), now=future)
    caption(database, run, texts(*CAPTIONS[2:]))
    assert of(database)["n"] == 6


def test_an_original_that_changed_has_its_caption_scored_anew(database, run, root, computed):
    caption(database, run, texts(*CAPTIONS))
    before = of(database)["metrics"]
    computed.clear()
    originals(root, n1="Something else altogether.")
    register(database, root, ["train"])
    after = of(database)["metrics"]
    assert dict(computed) == {"overlap": 1, "meteor_nltk": 1, "concepts": 1, "facts": 1, "cider_d": 6}
    assert after["rouge_l"] < before["rouge_l"] - 0.1
    computed.clear()
    assert of(database)["metrics"] == after
    assert computed == []


def test_a_matcher_that_changed_has_concepts_read_anew(database, run, computed, monkeypatch):
    caption(database, run, texts(*CAPTIONS))
    told(database)
    computed.clear()
    newer = [replace(one, edition="2") if one.name == "concepts" else one for one in evaluate.METRICS]
    monkeypatch.setattr(evaluate, "METRICS", tuple(newer))
    told(database)
    assert computed == [("concepts", 6)]


def test_evaluating_that_is_killed_keeps_what_it_had(database, run, computed, monkeypatch):
    caption(database, run, texts(*CAPTIONS))
    monkeypatch.setattr(evaluate, "STORE", 2)
    real = metrics.bleu_statistics
    left = iter(range(5))

    def killed(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(metrics, "bleu_statistics", killed)
    with pytest.raises(KeyboardInterrupt):
        told(database)
    monkeypatch.setattr(metrics, "bleu_statistics", real)
    computed.clear()
    told(database)
    assert dict(computed)["overlap"] == 2


def test_what_was_killed_goes_on_with_all_originals_also_where_it_hangs_on_them(database, run, computed):
    caption(database, run, texts(*CAPTIONS))
    expected = of(database)["metrics"]["cider_d"]
    with db.transaction(database, write=True) as conn:
        db.execute(conn, "DELETE FROM scores WHERE metric = 'cider_d' AND job_id > 3")
    computed.clear()
    assert of(database)["metrics"]["cider_d"] == expected
    assert computed == [("cider_d", 3)]


# --- Numbers ---------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_libraries(database, run):
    from sacrebleu.metrics.bleu import BLEU

    caption(database, run, texts(*CAPTIONS))
    found = of(database)["metrics"]
    lines, references = ([" ".join(metrics.tokens(text)) for text in side] for side in (CAPTIONS, ORIGINALS))
    bleu = BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(lines, [references])
    assert found["bleu_4"] == pytest.approx(bleu.score / 100, abs=1e-12)
    assert found["length_ratio"] == pytest.approx(bleu.ratio)
    pairs = list(zip(CAPTIONS, ORIGINALS, strict=True))
    assert found["rouge_l"] == pytest.approx(np.mean([metrics.rouge(*pair)["rouge_l"] for pair in pairs]))
    assert found["rouge1_imageclef"] == pytest.approx(np.mean([metrics.rouge1_imageclef(*pair) for pair in pairs]))


def test_concepts_are_scored_against_the_curated_ones(database, run):
    caption(database, run, texts(*CAPTIONS))
    with_concepts = evaluate.evaluate(database, [], ["train"]).scored[0].values
    # Of the kidney, C0022646, the matcher knows nothing; the last picture has no concepts, and none are read.
    assert with_concepts["concept_f1"].tolist() == [1, 1, 1, 1, 1, 1]
    assert with_concepts["concept_f1_ref"].tolist() == [1, 1, 1, 1, 1, 0]
    assert np.isnan(with_concepts["concept_recall"]).tolist() == [False] * 5 + [True]


def test_by_modality_of_the_original_concepts(database, run):
    caption(database, run, texts(*CAPTIONS))
    found = of(database)
    assert {name: one["n"] for name, one in found["by_modality"].items()} == {
        "CT": 2, "MRI": 1, "X-ray": 1, "ultrasound": 1, "unknown": 1,
    }  # fmt: skip
    assert found["by_modality"]["MRI"]["metrics"]["bleu_4"] == pytest.approx(1)
    assert found["by_modality"]["unknown"]["metrics"]["bleu_1"] == 0
    assert found["by_modality"]["unknown"]["metrics"]["concept_recall"] is None
    n = sum(one["n"] * one["metrics"]["cider_d"] for one in found["by_modality"].values())
    assert found["metrics"]["cider_d"] == pytest.approx(n / 6)


def test_the_order_of_the_captions_changes_nothing(database, run, root):
    other = make(database, root, "other", "tests/other")
    caption(database, run, texts(*CAPTIONS))
    for at in (5, 0, 3, 1, 2, 4):
        skip = sum(1 for n in range(at) if n in pending(database, other))
        caption(database, other, texts(CAPTIONS[at]), skip=skip, now=1_000 + at)
    one, two = told(database, "default", "other")["runs"]
    assert one["metrics"] == two["metrics"]


def pending(database: Engine, run: Run) -> set[int]:
    with db.transaction(database) as conn:
        sql = (
            "SELECT i.image_id FROM jobs j JOIN images i ON i.id = j.image_id "
            "WHERE j.run_id = ? AND j.status = 'pending'"
        )
        return {int(row[0].removeprefix("train_")) for row in db.execute(conn, sql, (run.id,))}


def test_white_space_of_any_kind_shifts_no_pair(database, run):
    awkward = [text.replace(" ", space) for text, space in zip(ORIGINALS, "\r\v\f\u2028\x85\n", strict=True)]
    caption(database, run, texts(*awkward))
    found = of(database)
    assert (found["n"], found["metrics"]["bleu_4"], found["metrics"]["rouge_l_coco"]) == (6, 1, 1)


def test_an_interval_holds_its_score_and_is_the_same_again(database, run):
    caption(database, run, texts(*CAPTIONS))
    found = of(database)
    for name, value in found["metrics"].items():
        low, high = found["intervals"][name]
        assert low <= value <= high, name
    assert found["intervals"]["bleu_1"][0] < found["intervals"]["bleu_1"][1]
    assert of(database) == found


def test_the_interval_is_as_wide_as_the_normal_one_of_a_mean(database, run):
    caption(database, run, texts(*CAPTIONS))
    (scored,) = evaluate.evaluate(database, [], ["train"]).scored
    rng = np.random.default_rng(3)
    values = rng.normal(0.5, 0.1, 400)
    many = replace(
        scored,
        pairs=[scored.pairs[0]] * 400,
        modalities=["CT"] * 400,
        counts={},
        values={"x": values},
    )
    low, high = evaluate.summarise(many).intervals["x"]
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 5)


# --- Two runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def two(database: Engine, root: Path, run: Run) -> tuple[Run, Run]:
    return run, make(database, root, "other", "tests/other")


def test_a_run_against_its_like_differs_in_nothing(database, two):
    for run in two:
        caption(database, run, texts(*CAPTIONS))
    (paired,) = told(database, "default", "other")["paired"]
    assert (paired["runs"], paired["n"], paired["split"]) == (["default", "other"], 6, "train")
    assert set(paired["differences"].values()) == {0}
    assert set(paired["p"].values()) == {1}


def test_two_runs_are_compared_on_the_pictures_that_both_captioned(database, two):
    caption(database, two[0], texts(*CAPTIONS[:4]))
    caption(database, two[1], texts("nothing", *CAPTIONS[3:]), skip=2)
    found = told(database, "default", "other")
    (paired,) = found["paired"]
    assert paired["n"] == 2
    assert paired["differences"]["rouge_l_coco"] == pytest.approx(-0.5)
    assert [one["missing"] for one in found["runs"]] == [2, 2]


def test_equal_captions_differ_in_nothing_although_one_run_has_more(database, two):
    """CIDEr-D of each run weighs words by its own originals; that of the pair by those of both."""
    caption(database, two[0], texts(*CAPTIONS))
    caption(database, two[1], texts(*CAPTIONS[:4]))
    found = told(database, "default", "other")
    assert found["runs"][0]["metrics"]["cider_d"] != found["runs"][1]["metrics"]["cider_d"]
    (paired,) = found["paired"]
    assert (paired["n"], set(paired["differences"].values()), set(paired["p"].values())) == (4, {0}, {1})


def test_an_extra_score_that_hangs_on_all_originals_is_not_paired_over_a_part(database, two, monkeypatch):
    monkeypatch.setattr(metrics, "bertscore", lambda pairs, references: iter([0.5] * len(pairs)))
    for run, n in zip(two, (6, 4), strict=True):
        caption(database, run, texts(*CAPTIONS[:n]))
    found = evaluate.to_json(evaluate.evaluate(database, ["default", "other"], ["train"], also=["bertscore_f1"]))
    assert [one["metrics"]["bertscore_f1"] for one in found["runs"]] == [0.5, 0.5]
    assert "bertscore_f1" not in found["paired"][0]["differences"]


def test_runs_without_a_picture_in_common_have_no_difference(database, two):
    caption(database, two[0], texts(*CAPTIONS[:3]))
    caption(database, two[1], texts(*CAPTIONS[3:]), skip=3)
    (paired,) = told(database, "default", "other")["paired"]
    assert (paired["n"], paired["differences"], paired["p"]) == (0, {}, {})


def test_one_caption_has_no_interval_and_no_cider_d(database, run):
    caption(database, run, texts(CAPTIONS[0]))
    found = of(database)
    assert set(found["intervals"].values()) == {None}
    assert found["metrics"]["bleu_1"] == 1
    assert found["not_computed"]["cider_d"] == "It weights words by their rarity, which needs at least two captions."


def test_a_run_that_is_always_worse_is_so_by_more_than_chance(tmp_path, database):
    one = fill(database, tmp_path / "many", 12, run="one")
    other = fill(database, tmp_path / "many", 12, run="other", recipe=Recipe(model="tests/other"))
    caption(database, one, texts(*(f"Original caption {n}." for n in range(12))))
    caption(database, other, texts(*(f"Original picture {n}." for n in range(12))))
    (paired,) = told(database, "one", "other")["paired"]
    for name in ("bleu_1", "rouge_1", "rouge_l_coco", "cider_d"):
        assert paired["differences"][name] < 0, name
        assert paired["p"][name] < 0.01, name  # all 12 alike by chance: 2 of 4,096
    assert paired["p"]["flagged"] == 1


def test_a_score_that_one_run_lacks_is_in_no_difference(database, two, monkeypatch):
    for run in two:
        caption(database, run, texts(*CAPTIONS))
    told(database, "default")
    monkeypatch.setattr(metrics, "open_wordnet", lambda: None)
    found = told(database, "default", "other")
    assert "meteor_nltk" in found["runs"][0]["metrics"]
    assert "meteor_nltk" in found["runs"][1]["not_computed"]
    assert "meteor_nltk" not in found["paired"][0]["differences"]


# --- Honest ----------------------------------------------------------------------------------------------------


def test_without_wordnet_meteor_is_not_computed_and_says_why(database, run, monkeypatch):
    caption(database, run, texts(*CAPTIONS))
    monkeypatch.setattr(metrics, "open_wordnet", lambda: None)
    found = of(database)
    assert "meteor_nltk" not in found["metrics"]
    assert found["not_computed"]["meteor_nltk"] == f"WordNet is not installed. {metrics.WORDNET_COMMAND}"


def test_a_split_that_is_not_done_says_so(database, run):
    caption(database, run, texts(*CAPTIONS[:4]))
    found = of(database)
    assert (found["n"], found["missing"]) == (4, 2)
    assert found["warnings"] == ["default has not captioned 2 pictures of train: the scores leave them out."]


@pytest.mark.parametrize(
    ("marker", "warns"),
    [
        ('{{"dataset": "{set}", "splits": ["train"]}}', True),
        ('{{"dataset": "{set}", "splits": ["test"]}}', False),
        ('{{"dataset": "/another", "splits": ["train"]}}', False),
        ('{{"dataset": "{set}", "splits": null}}', False),
        ("not JSON", False),
        ("null", False),
    ],
)
def test_an_adapter_that_was_trained_on_the_split_is_told(database, root, tmp_path, marker, warns):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "rococap_training.json").write_text(marker.format(set=root))
    originals(root)
    register(database, root, ["train"], recipe=Recipe(model="tests/small", adapter=str(adapter)))
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "default")
    caption(database, run, texts(*CAPTIONS))
    assert [f"{adapter} was trained on train" in text for text in of(database)["warnings"]] == [True] * warns


def test_a_run_of_a_part_of_the_split_says_so(database, root):
    originals(root)
    register(database, root, ["train"], limit=2)
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "default")
    caption(database, run, texts(*CAPTIONS[:2]))
    found = of(database)
    assert (found["missing"], found["warnings"]) == (
        0,
        ["default was enqueued with only 2 of the 6 pictures of train."],
    )


def test_flagged_captions_are_counted(database, run):
    caption(
        database, run, [{"text": text, "flags": flags} for text, flags in zip(CAPTIONS, ["", "loop"] * 3, strict=True)]
    )
    assert of(database)["metrics"]["flagged"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("names", "splits", "message"),
    [
        (["nobody"], ["train"], "nobody"),
        (["default", "default"], ["train"], "named twice"),
        (["default"], ["train"], "captioned nothing of train yet. Caption pictures: rococap worker --run default"),
        ([], ["test"], "has no pictures of test. Register them"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_next_step(database, run, names, splits, message):
    with pytest.raises(RunError, match=message):
        evaluate.evaluate(database, names, splits)


def test_what_takes_an_extra_is_computed_where_it_is_asked_for(database, run, computed, monkeypatch):
    caption(database, run, texts(*CAPTIONS[:5]))
    assert "meteor_1_5" not in of(database)["metrics"] | of(database)["not_computed"]
    monkeypatch.setattr(metrics, "meteor_1_5_statistics", lambda pairs: ([1.0] * 23 for _ in pairs))
    found = evaluate.to_json(evaluate.evaluate(database, [], ["train"], also=["meteor_1_5"]))
    assert list(found["packages"]) == ["sacrebleu", "rouge-score", "nltk", "pycocoevalcap"]
    (asked,) = found["runs"]
    assert asked["metrics"]["meteor_1_5"] == pytest.approx(metrics.meteor_1_5(np.ones(23) * 5)[0])
    computed.clear()
    assert of(database)["metrics"]["meteor_1_5"] == asked["metrics"]["meteor_1_5"]
    assert computed == []
    caption(database, run, texts(*CAPTIONS[5:]), now=2_000)
    found = of(database)
    assert found["not_computed"]["meteor_1_5"] == "Not all captions are scored yet: --also meteor_1_5"
    assert "meteor_1_5" not in found["metrics"]


@pytest.mark.parametrize(
    ("name", "function", "error", "reason"),
    [
        ("meteor_1_5", "meteor_1_5_statistics", ImportError("x"), "pip install 'rococap[coco]'"),
        ("meteor_1_5", "meteor_1_5_statistics", FileNotFoundError("java"), "apt-get install default-jre-headless"),
        ("bertscore_f1", "bertscore", ImportError("x"), "pip install 'rococap[bertscore]'"),
        ("bertscore_f1", "bertscore", OSError("offline"), "microsoft/deberta-xlarge-mnli is not in the cache"),
    ],
)
def test_an_extra_that_is_not_here_says_what_installs_it(database, run, monkeypatch, name, function, error, reason):
    def fail(*args):
        raise error

    caption(database, run, texts(*CAPTIONS))
    monkeypatch.setattr(metrics, function, fail)
    found = evaluate.to_json(evaluate.evaluate(database, [], ["train"], also=[name]))["runs"][0]
    assert reason in found["not_computed"][name]
    assert name not in found["metrics"]


# --- What is written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_the_scores_of_each_caption_are_written_in_data_set_order(database, two, tmp_path, suffix):
    for run in two:
        caption(database, run, texts(*CAPTIONS))
    path = tmp_path / "out" / f"scores{suffix}"
    found = evaluate.evaluate(database, ["default", "other"], ["train"])
    assert evaluate.write(found, path, {"a": 1}) == 12
    match suffix:
        case ".parquet":
            rows = pd.read_parquet(path)
        case ".csv":
            rows = pd.read_csv(path)
        case _:
            rows = pd.read_json(path, lines=True)
    assert list(rows.columns[:7]) == list(evaluate.TEXTS)
    assert rows["generated_caption"].tolist() == CAPTIONS * 2
    assert rows["split"].unique().tolist() == ["train"]
    assert rows.groupby("run")["rouge_l"].mean().to_dict() == pytest.approx(
        {one["run"]: one["metrics"]["rouge_l"] for one in evaluate.to_json(found)["runs"]}
    )
    assert rows["concept_recall"].isna().tolist() == ([False] * 5 + [True]) * 2


def test_a_score_that_a_run_lacks_is_empty_in_its_rows(database, two, tmp_path, monkeypatch):
    for run in two:
        caption(database, run, texts(*CAPTIONS))
    told(database, "default")
    monkeypatch.setattr(metrics, "open_wordnet", lambda: None)
    evaluate.write(evaluate.evaluate(database, ["default", "other"], ["train"]), tmp_path / "x.parquet", {})
    rows = pd.read_parquet(tmp_path / "x.parquet")
    assert rows["meteor_nltk"].isna().tolist() == [False] * 6 + [True] * 6


# --- The command -----------------------------------------------------------------------------------------------


def test_reasoning_is_scored_unless_it_is_to_be_stripped(database, tmp_path):
    run = make(database, tmp_path / "set")
    reasoned = [f"<think>A lung, or a bone?</think>\n\n{text}" for text in ORIGINALS]
    caption(database, run, texts(*reasoned))
    whole = evaluate.to_json(evaluate.evaluate(database, [], ["train"]))
    told = evaluate.to_json(evaluate.evaluate(database, [], ["train"], strip_reasoning=True))
    assert told["strip_reasoning"] is True
    assert "strip_reasoning" not in whole
    assert told["runs"][0]["metrics"]["rouge_l"] == 1.0
    assert whole["runs"][0]["metrics"]["rouge_l"] < 0.9
    again = evaluate.to_json(evaluate.evaluate(database, [], ["train"]))
    assert again == whole, "what was kept of the one is not taken for the other"


def test_the_command_strips_reasoning_and_says_so_beside_the_scores(database, tmp_path, url, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caption(database, make(database, tmp_path / "set"), texts("<think>A lung?</think> A scan."))
    assert invoke(url, "--split", "train", "--strip-reasoning", "--output", "x.csv").exit_code == 0
    assert list(pd.read_csv("x.csv")["generated_caption"]) == ["A scan."]
    assert json.loads(Path("x.json").read_text())["strip_reasoning"] is True


def invoke(url: str, *args: str):
    return steps.invoke("--db", url, "evaluate", *args)


@pytest.fixture
def here(database: Engine, two: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in two:
        caption(database, run, texts(*CAPTIONS[:5]))


def test_the_command_prints_json_and_writes_the_scores(url, here):
    result = invoke(url, "--split", "train", "--run", "default", "--json")
    assert result.exit_code == 0, result.output
    (one,) = json.loads(result.stdout)["runs"]
    assert (one["run"], one["split"], one["n"]) == ("default", "train", 5)
    assert {
        *("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_1", "rouge_l", "cider_d", "rouge1_imageclef"),
        *("concept_f1", "concept_recall", "length_ratio", "flagged"),
    } <= set(one["metrics"])
    assert "Warning: default has not captioned 1 picture of train" in result.stderr
    assert json.loads(Path("results_medical/scores_train_default.parquet.json").read_text()) == json.loads(
        result.stdout
    )
    assert set(json.loads(result.stdout)["packages"]) == {"sacrebleu", "rouge-score", "nltk"}
    assert len(pd.read_parquet("results_medical/scores_train_default.parquet")) == 5


def test_tables_of_long_names_and_of_many_runs_fit_and_say_where_the_rest_is(url, here, database, root):
    long = "qwen2-vl-7b-instruct-medical-prompt-structured-with-lora"
    caption(database, make(database, root, long, "tests/long"), texts(*CAPTIONS[:5]))
    two = invoke(url, "--split", "train", "--run", "default", "--run", long)
    assert two.exit_code == 0, two.output
    assert max(map(len, two.stdout.splitlines())) <= 80 + len(long)  # the line that names the runs
    assert "…" not in next(line for line in two.stdout.splitlines() if line.startswith("cider_d "))
    three = invoke(url, "--split", "train", "--run", "default", "--run", long, "--run", "other")
    assert "For intervals and differences of more than two runs: --json, or rococap report" in three.stdout


def test_a_split_that_is_not_captioned_is_told_and_the_others_are_scored(url, here):
    result = invoke(url, "--split", "all", "--run", "default")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-2:] == [
        "default has captioned nothing of validation yet.",
        "default has captioned nothing of test yet.",
    ]
    assert "validation" not in result.stdout


def test_many_runs_are_numbered_in_the_name_of_their_file(two, database):
    for run in two:
        caption(database, run, texts(*CAPTIONS))
    found = evaluate.evaluate(database, ["default", "other"], ["train"])
    assert evaluate.default_path(found, "scores", ".csv").name == "scores_train_default+other.csv"
    for one in found.scored:
        one.run = replace(one.run, name=one.run.name * 20)
    assert evaluate.default_path(found, "scores", ".csv").name.startswith("scores_train_2-runs-")


def test_the_help_of_the_command_names_every_extra_score():
    text = " ".join(steps.invoke("evaluate", "--help").output.split())
    assert [metric.name for metric in evaluate.METRICS if metric.extra and metric.name not in text] == []


@pytest.mark.parametrize("names", [[], ["--run", "default", "--run", "other"]])
def test_the_command_prints_tables_of_80_columns(url, here, names):
    result = invoke(url, "--split", "train", *names)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert "train: 5 captions of default" in lines[0]
    assert any(line.startswith("bleu_4 ") for line in lines)
    assert any(line.startswith("CT ") for line in lines)
    assert ("difference" in result.stdout) == bool(names)


def test_the_command_refuses_a_file_that_it_cannot_write_before_it_scores(url, here, computed):
    result = invoke(url, "--split", "train", "--output", "scores.xlsx")
    assert (result.exit_code, computed) == (1, [])
    assert "scores.xlsx does not end in one of .csv, .parquet, .jsonl" in result.stderr


def test_a_second_call_imports_neither_torch_nor_nltk(url, here, tmp_path):
    assert invoke(url, "--split", "train", "--run", "default").exit_code == 0
    code = (
        "import sys; from rococap.cli import cli\n"
        f"cli(['--db', {url!r}, 'evaluate', '--split', 'train', '--run', 'default'], standalone_mode=False)\n"
        "print(sorted({'torch', 'nltk', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


# --- without originals -----------------------------------------------------------------------------------------

AGAINST_ORIGINALS = [
    *(*evaluate.BLEUS, "rouge_1", "rouge_l", "rouge_l_coco", "rouge1_imageclef", "meteor_nltk", "cider_d"),
    "concept_f1_ref",
    *evaluate.FACTS,
]


def scored_of(database: Engine, root: Path, captions: dict[int, str], cuis: dict[int, list[str]]) -> evaluate.Scored:
    write_shard(root, "train", range(len(ORIGINALS)), captions=captions, cuis=cuis)
    register(database, root, ["train"])
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "default")
    caption(database, run, texts(*CAPTIONS))
    (scored,) = evaluate.evaluate(database, ["default"], ["train"]).scored
    return scored


def test_without_originals_scores_against_them_are_not_computed_for_that_reason(database, root):
    scored = scored_of(database, root, dict.fromkeys(range(6), ""), dict(enumerate(CUIS)))
    metrics = evaluate.summarise(scored).metrics
    assert set(metrics) == {"concept_f1", "concept_recall", "flagged"}
    assert scored.not_computed == dict.fromkeys(AGAINST_ORIGINALS, evaluate.NO_ORIGINALS)
    assert "no originals" in evaluate.NO_ORIGINALS
    assert scored.warnings == ["default has no originals for train: scores against originals are not computed."]


def test_without_originals_and_concepts_only_flags_are_told(database, root):
    scored = scored_of(database, root, dict.fromkeys(range(6), " \n"), {n: [] for n in range(6)})
    assert set(evaluate.summarise(scored).metrics) == {"flagged"}
    assert scored.not_computed["concept_f1"] == evaluate.NO_CONCEPTS


def test_captions_without_an_original_do_not_weigh_on_the_scores_of_the_others(database, root, tmp_path):
    labelled = dict(enumerate(ORIGINALS))
    scored = scored_of(database, root, labelled | {1: "", 4: ""}, dict(enumerate(CUIS)))
    assert scored.warnings[0] == "2 captions of train have no original: scores against originals leave them out."
    some = [n for n in range(6) if n not in (1, 4)]
    pairs = [pair for pair in scored.pairs if pair.reference]
    assert len(pairs) == len(some)
    for metric in evaluate.METRICS:
        if metric.extra:
            continue
        of_others = list(metric.score(pairs, range(len(pairs))))
        for name in metric.scores:
            if name in scored.values and name not in metric.of_concepts:
                values = scored.values[name]
                assert np.isnan(values[[1, 4]]).all()
                expected = np.array([one[name] for one in of_others], dtype=float)
                if name in evaluate.FACTS:
                    expected = facts.f1(expected)
                np.testing.assert_array_equal(values[some], expected)
    bleu = evaluate.summarise(scored).metrics["bleu_1"]
    counts = scored.counts["bleu"][some].sum(axis=0)
    assert bleu == evaluate.COUNTED["bleu"][1](counts)[0]
    assert np.isnan(evaluate._by_caption(scored)["bleu_1"][[1, 4]]).all()
    assert not np.isnan(scored.values["concept_f1"][[1, 4]]).any()


def test_two_runs_without_originals_are_paired_by_what_they_have(database, root):
    scored_of(database, root, dict.fromkeys(range(6), ""), dict(enumerate(CUIS)))
    register(database, root, ["train"], run="other", recipe=Recipe(model="tests/other"))
    with db.transaction(database) as conn:
        other = queue.get_run(conn, "other")
    caption(database, other, texts(*CAPTIONS[::-1][:4]))
    (paired,) = evaluate.evaluate(database, ["default", "other"], ["train"]).paired
    assert (paired.n, set(paired.differences)) == (4, {"concept_f1", "concept_recall", "flagged"})


def test_evaluate_says_that_there_are_no_originals(database, root, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scored_of(database, root, dict.fromkeys(range(6), ""), dict(enumerate(CUIS)))
    result = steps.invoke("--db", url, "evaluate", "--split", "train")
    assert result.exit_code == 0, result.output
    assert "concept_f1_ref: not computed: There are no originals: the data" in " ".join(result.output.split())
    assert "default has no originals for train" in result.stderr
    compared = steps.invoke("--db", url, "compare", "default")
    assert compared.output.splitlines()[-1].endswith("6 pictures, no original captions")


# --- Facts -----------------------------------------------------------------------------------------------------

STATED = [
    "CT of the chest with a mass in the left lung, no effusion.",
    "MRI of the brain.",
    "Axial CT.",
    "Radiographie du thorax de face et de profil.",
    "",
    "MRI of the spine.",
]


def test_facts_are_scored_counted_and_left_out_where_they_cannot_be_read(database, root):
    captions = dict(enumerate(STATED))
    write_shard(root, "train", range(6), captions=captions, cuis=dict(enumerate(CUIS)))
    register(database, root, ["train"])
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "default")
    caption(
        database,
        run,
        texts("CT, mass in the right lung and an effusion.", "CT of the brain.", "Axial CT.", "CT.", "CT.", ""),
    )
    evaluation = evaluate.evaluate(database, [], ["train"])
    (scored,) = evaluation.scored
    told = evaluate.to_json(evaluation)["runs"][0]
    nan = np.nan
    np.testing.assert_array_equal(scored.values["fact_side"], [0, nan, nan, nan, nan, nan])
    np.testing.assert_array_equal(scored.values["fact_modality"], [1, 0, 1, nan, nan, 0])
    assert told["metrics"]["fact_modality"] == 0.5
    assert told["facts"]["fact_modality"] == {"n": 4, "agreeing": 2, "invented": 0, "missed": 1, "opposite": 1}
    assert told["facts"]["fact_negation"] == {"n": 1, "agreeing": 0, "invented": 0, "missed": 0, "opposite": 1}
    assert told["facts"]["fact_sequence"]["n"] == 0
    assert told["not_computed"]["fact_sequence"] == evaluate.NO_FACTS
    assert told["by_modality"]["MRI"]["facts"]["fact_modality"]["opposite"] == 1
    assert any("1 of 6 captions of default for train (17%) or their originals are not in English" in one
               for one in scored.warnings)  # fmt: skip


def test_the_facts_of_each_caption_are_in_the_file(database, run, tmp_path):
    caption(database, run, texts("CT, right lung.", *CAPTIONS[1:]))
    evaluation = evaluate.evaluate(database, [], ["train"])
    evaluate.write(evaluation, tmp_path / "scores.parquet", evaluate.to_json(evaluation))
    rows = pd.read_parquet(tmp_path / "scores.parquet")
    columns = [f"fact_side{end}" for end in ("", *(f"_{what}" for what in evaluate.COUNTS))]
    assert rows[columns].iloc[0].tolist() == [0, 0, 0, 0, 1]
    assert rows["fact_side"].isna().tolist() == [False, True, True, True, False, True]


def test_where_no_text_is_english_facts_are_not_computed(database, root):
    scored = scored_of(database, root, dict.fromkeys(range(6), "胸部X线显示左侧"), dict(enumerate(CUIS)))
    assert set(evaluate.FACTS) <= set(scored.not_computed)
    assert "in none of the 6 pairs are both in English" in scored.not_computed["fact_side"]


def test_evaluate_prints_how_many_facts_agree(database, run, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caption(database, run, texts("CT, right lung.", *CAPTIONS[1:]))
    told = steps.invoke("--db", url, "evaluate", "--split", "train").stdout.splitlines()
    assert [line.split() for line in told if line.startswith("side ")] == [["side", "default", "2", "0", "0", "1", "1"]]
