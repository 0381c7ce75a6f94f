"""What each score notices: table, plot and JSON, from a split or from a file."""

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import steps
from places import SHARED
from samples import register, write_shard

from rococap.errors import RococapError, RunError
from rococap.results.manifest import manifest_path
from rococap.scores import changes, evaluate, facts, metrics, probe
from rococap.scores.evaluate import NotComputed, Pair

REAL = SHARED / "captions" / "roco_v1_2000.csv"
TEXTS = [
    "CT of the chest showing a 3 cm mass in the left lung.",
    "Axial MRI of the brain shows no lesion in the right temporal lobe.",
    "Chest X-ray demonstrating a pleural effusion on the left.",
    "Ultrasound of the liver: a cyst of 12 mm, without calcification.",
    "Radiograph of the right knee.",
    "CT.",
]
CHANGES = list(changes.changes([]))


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "open_wordnet", lambda: SimpleNamespace(synsets=lambda word: []))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "RESAMPLES", 50)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.fixture
def file(here: Path) -> Path:
    rows = "".join(f'picture_{n},"{text}"\n' for n, text in enumerate(TEXTS))
    path = here / "captions.csv"
    path.write_text(f"ID,Caption\n{rows}picture_9,\n", encoding="utf-8")
    return path


def pairs(*texts: str) -> list[Pair]:
    return [Pair(0, f"p{n}", text, "", text, "") for n, text in enumerate(texts)]


# --- What is measured ------------------------------------------------------------------------------------------


def test_each_change_is_scored_against_the_original_where_it_applies(file):
    probed = probe.probe(probe.of_file(file))
    assert probed.n == 6
    assert {name: change.n for name, change in probed.changes.items()} == {
        "side_swap": 4,
        "negation_flip": 4,
        "modality_swap": 6,
        "region_swap": 5,
        "measurement_change": 2,
        "other_picture": 6,
        "shuffle_words": 5,
        "cut_half": 5,
        "rephrase": 3,
    }
    side = probed.changes["side_swap"].scores
    assert (side["fact_side"].unchanged, side["fact_side"].changed, side["fact_side"].fall) == (1, 0, 1)
    assert (side["fact_modality"].fall, side["fact_modality"].is_seen) == (0, False)
    assert 0 < side["rouge_l"].fall < 0.2
    assert side["rouge_l"].ci[0] <= side["rouge_l"].fall <= side["rouge_l"].ci[1]
    assert probed.changes["measurement_change"].scores["rouge1_imageclef"].fall == 0
    assert probed.changes["shuffle_words"].scores["rouge_1"].fall == pytest.approx(0)
    assert not probed.changes["shuffle_words"].scores["bleu_1"].is_seen
    assert probed.changes["modality_swap"].scores["concept_f1"].fall > 0.9


def test_the_scores_of_a_change_are_those_of_evaluate_over_its_captions(file):
    originals = probe.of_file(file)
    found = probe.probe(originals).changes["cut_half"].scores
    rows = [at for at, pair in enumerate(originals) if pair.reference != "CT."]
    cut = [changes.cut_half(pair.reference, None) for pair in originals]
    words = [metrics.tokens(text or pair.text) for text, pair in zip(cut, originals, strict=True)]
    cider = metrics.cider_d(words, [[metrics.tokens(pair.reference)] for pair in originals])
    assert found["cider_d"].changed == pytest.approx(cider[rows].mean())
    counts = [metrics.bleu_statistics(words[at], [metrics.tokens(originals[at].reference)]) for at in rows]
    assert found["bleu_2"].changed == pytest.approx(metrics.bleu(sum(map(evaluate.np.array, counts)))[1])


def test_originals_and_changed_captions_are_drawn_together():
    """Drawn apart, the interval of a fall that is the same for every caption would be wide."""
    lengths = evaluate.Metric(
        "n", ("n",), lambda pairs, rows: ({"n": float(len(pairs[at].text.split()))} for at in rows)
    )
    texts = [f"right {'word ' * n}" for n in range(1, 40)]
    halved = probe.probe(pairs(*texts), plugins=[lengths]).changes["side_swap"].scores["n"]
    assert (halved.fall, halved.ci) == (0, (0, 0))
    assert halved.unchanged == 21


def test_one_caption_has_no_interval_and_nothing_is_seen():
    found = probe.probe(pairs("The left lung."))
    rouge = found.changes["side_swap"].scores["rouge_l"]
    assert (rouge.ci, rouge.is_seen, found.changes["other_picture"].n) == (None, False, 0)
    assert "two captions" in found.not_computed["cider_d"]


def test_a_score_that_rises_is_told_from_none():
    assert probe.Fall(1, 1.1, -0.1, (-0.2, -0.05)).is_seen
    assert not probe.Fall(1, 0.9, 0.1, (-0.05, 0.2)).is_seen
    assert not probe.Fall(1, 1 - 1e-16, 1e-16, (1e-16, 1e-16)).is_seen


def test_a_plugin_is_probed_and_one_that_fails_is_not_computed(here, file):
    (here / "probe_plugin.py").write_text(
        "def same(captions, references):\n    return [float(a == b) for a, b in zip(captions, references)]\n"
        "def fails(captions, references):\n    raise ValueError('no model')\n"
    )
    command = f"{shlex.quote(sys.executable)} -c 'exit(3)'"
    result = steps.invoke(
        *("probe", "--captions", str(file), "--also", "probe_plugin:same", "--also", "probe_plugin:fails"),
        *("--also-command", f"dies={command}"),
    )
    assert result.exit_code == 0, result.output
    same = next(line for line in result.output.splitlines() if line.startswith("same "))
    assert same.split() == ["same", "1.000", "1.000", "1.000", "1.000"]
    assert "fails: not computed: It failed: ValueError: no model." in result.output
    assert "dies: not computed: Its command ended with exit code 3." in result.output


def test_an_extra_score_is_probed_only_on_request(file, monkeypatch):
    monkeypatch.setattr(metrics, "meteor_1_5_statistics", lambda pairs: ([1.0] * 23 for _ in pairs))
    assert "meteor_1_5" not in probe.probe(probe.of_file(file)).names
    assert "meteor_1_5" in probe.probe(probe.of_file(file), also=["meteor_1_5"]).names


def test_without_wordnet_meteor_is_not_computed(file, monkeypatch):
    monkeypatch.setattr(metrics, "open_wordnet", lambda: None)
    found = probe.probe(probe.of_file(file))
    assert "WordNet is not installed" in found.not_computed["meteor_nltk"]
    assert "meteor_nltk" not in found.names


def test_a_score_that_is_computed_for_some_changes_only_is_shown_for_these(file):
    def score(pairs, rows):
        if any("MRI of the chest" in pair.text for pair in pairs):
            raise NotComputed("It does not like MRI of the chest.")
        return ({"moody": 1.0} for _ in rows)

    found = probe.probe(probe.of_file(file), plugins=[evaluate.Metric("moody", ("moody",), score)])
    assert "moody" not in found.changes["modality_swap"].scores
    assert found.changes["side_swap"].scores["moody"].fall == 0


# --- Files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "ID,Caption\nx,A scan.\n",
        "\ufeffid,caption\nx,A scan.\n",
        "image_id,original_caption,generated_caption\nx,A scan.,Another.\n",
        "split,roco_id,caption\nvalidation,x, A scan.\n",
    ],
)
def test_captions_are_read_from_the_files_of_others_and_from_exports(here, content):
    (here / "x.csv").write_text(content, encoding="utf-8")
    (pair,) = probe.of_file(here / "x.csv")
    assert (pair.image_id, pair.text.strip(), pair.reference.strip()) == ("x", "A scan.", "A scan.")


def test_an_export_that_was_made_safe_for_spreadsheets_is_read_as_it_was(here):
    (here / "x.csv").write_text("image_id,original_caption\nx,'=A1\n")
    manifest_path(here / "x.csv").write_text('{"excel_safe": true}')
    assert probe.of_file(here / "x.csv")[0].text == "=A1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a CSV file in UTF-8"),
        (b"ID,Caption\nx,\xff\n", "cannot be read as a CSV file in UTF-8"),
        (b'ID,Caption\nx,"open\n', "cannot be read as a CSV file in UTF-8"),
        (b"ID,Text\nx,y\n", "has no columns ID and Caption: it has ID, Text. Rename them"),
        (b"ID,Caption\nx,a\ny,b\nx,c\n", "has several rows with the ID 'x': leave one of each."),
        (b"ID,Caption\nx,\ny,  \n", "has no captions"),
        (b"ID,Caption\n", "has no captions"),
    ],
)
def test_a_file_without_captions_is_refused(here, content, message):
    (here / "x.csv").write_bytes(content)
    with pytest.raises(RococapError) as raised:
        probe.of_file(here / "x.csv")
    assert message in str(raised.value)


# --- Splits ----------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_the_originals_of_a_split_are_probed_without_a_caption_being_made(database, here, monkeypatch):
    monkeypatch.setattr(probe, "PAGE", 4)
    write_shard(here / "set", "validation", range(6), captions=dict(enumerate(TEXTS)) | {5: " "})
    register(database, here / "set", ["validation"])
    found = probe.of_split(database, None, "validation")
    assert [pair.text for pair in found] == TEXTS[:5]
    assert [pair.cui for pair in found] == ["C0040405"] * 5


def test_a_split_without_originals_is_refused(database, here, url):
    write_shard(here / "set", "test", range(6), captions=dict.fromkeys(range(6), ""))
    register(database, here / "set", ["test"])
    result = steps.invoke("--db", url, "probe", "--split", "test")
    assert result.exit_code == 1
    assert "The pictures of test have no original captions, and a probe changes these. Probe another" in result.stderr
    with pytest.raises(RunError, match="has no pictures of train"):
        probe.of_split(database, None, "train")


# --- The command -----------------------------------------------------------------------------------------------


def test_json_has_the_shape_that_is_documented(database, here, url):
    write_shard(here / "set", "train", range(6), captions=dict(enumerate(TEXTS)))
    register(database, here / "set", ["train"])
    result = steps.invoke("--db", url, "probe", "--split", "train", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert set(told) == {"n", "changes"}
    assert list(told["changes"]) == CHANGES
    assert set(told["changes"]["side_swap"]) == {"n", "scores"}
    assert set(told["changes"]["side_swap"]["scores"]["rouge_l"]) == {"unchanged", "changed", "fall", "ci"}
    for change in told["changes"].values():
        assert "concept_f1" in change["scores"]
        assert "concept_f1_ref" not in change["scores"], "no change of a caption moves it"
        for fall in change["scores"].values():
            assert fall["fall"] == pytest.approx(fall["unchanged"] - fall["changed"])
            assert fall["ci"][0] <= fall["fall"] + 1e-9
    assert Path("results_medical/probe_train.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_fit_and_say_what_each_score_misses(file):
    result = steps.invoke("probe", "--captions", str(file), "--plot", "x.png")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    headers = " ".join(line.removeprefix("score") for line in lines if line.startswith("score "))
    assert headers.split() == CHANGES
    missed = result.output.partition("Cannot be told from no change:\n")[2].partition("\n\n")[0]
    assert "bleu_1, rouge_1: shuffle_words" in missed
    below = " ".join(result.output.partition("Lower the score less than rephrase:\n")[2].split())
    assert "rouge_l" in below
    assert Path("x.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Name either a --split or a file of --captions."),
        (["--split", "test", "--captions", "captions.csv"], "Name either a --split or a file of --captions."),
        (["--captions", "captions.csv", "--run", "x"], "leave it out with --captions"),
        (["--captions", "no.csv"], "'no.csv' does not exist"),
        (["--captions", "captions.csv", "--also", "nothing"], "There is no score 'nothing'"),
    ],
)
def test_wrong_usage_is_told(file, args, message):
    result = steps.invoke("probe", *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_captions_that_no_change_applies_to_are_refused(here):
    path = here / "short.csv"
    path.write_text("ID,Caption\nx,Fracture.\n")
    result = steps.invoke("probe", "--captions", str(path))
    assert result.exit_code == 1
    assert "No change applies to these captions. Name a split, or a file with more of them." in result.stderr


@pytest.mark.skipif(not REAL.exists(), reason="shared/ is not there")
def test_fact_scores_notice_a_wrong_side_and_a_wrong_negation_in_real_captions(monkeypatch):
    monkeypatch.setattr(probe, "METRICS", [one for one in evaluate.METRICS if one.name == "facts"])
    two = {"side_swap": changes.side_swap, "negation_flip": changes.negation_flip}
    monkeypatch.setattr(probe, "changes", lambda texts: two)
    found = probe.probe(probe.of_file(REAL)).changes
    assert found["side_swap"].scores["fact_side"].fall >= 0.8
    assert found["negation_flip"].scores["fact_negation"].fall >= 0.6
    assert found["side_swap"].n > 400
    assert found["negation_flip"].n > 600


@pytest.mark.skipif(not REAL.exists(), reason="shared/ is not there")
def test_most_flipped_negations_of_real_captions_lower_the_score_of_facts():
    """Of all flips, also of those in which no finding is read."""
    texts = [pair.text for pair in probe.of_file(REAL)]
    flipped = [changes.apply("negation_flip", changes.negation_flip, text) for text in texts]
    flips = [
        (facts.facts_of(one), facts.facts_of(text)) for one, text in zip(flipped, texts, strict=True) if one is not None
    ]
    counts = [facts.agreements(*pair)["negation"].counts if all(pair) else (0, 0, 0, 0) for pair in flips]
    assert len(counts) > 600
    assert sum(any(one[1:]) for one in counts) >= 0.9 * len(counts)
