"""Exports and scores of captions with the edits of readers, beside those of the machine's."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest
from samples import caption, fill, register, texts, write_shard
from sqlalchemy import Engine
from steps import captions, invoke, refused, said, select, writing

from rococap import db, queue, review
from rococap.errors import RococapError
from rococap.queue import Run
from rococap.results import export, restore
from rococap.results.checkpoints import write_checkpoints
from rococap.results.snapshot import COLUMNS
from rococap.scores import evaluate, metrics

MACHINE = ["CT of the left lung.", "MRI of the brain.", "!!!!!!!!!!!!!!!!!!!!!!!!", "X-ray of the chest."]
EDITED = ["CT of the right lung.", *MACHINE[1:2], "Ultrasound of the liver.", MACHINE[3]]
JUDGED = (1, 2)
"""The pictures with a verdict: one that was not edited, one that was."""
AT = "1970-01-01T00:00:0{}.000Z"


@pytest.fixture
def run(database: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Six pictures of which four are captioned, two edited and two judged."""
    monkeypatch.setenv("ROCOCAP_DB", database.url.render_as_string(hide_password=False))
    monkeypatch.chdir(tmp_path)
    run = fill(database, tmp_path / "set", 6)
    caption(database, run, texts(*MACHINE))
    jobs = [job for (job,) in select(database, "SELECT job_id FROM captions ORDER BY 1")]
    with writing(database) as conn:
        for at in (0, 2):
            review.edit(conn, run, jobs[at], "ann", EDITED[at], seen=None, now=2_000)
        undone = review.edit(conn, run, jobs[3], "bob", "Undone.", seen=None, now=2_000)
        review.undo(conn, run, undone.id, "bob", now=3_000)
        for at in JUDGED:
            review.add_review(conn, run, jobs[at], "ann", "major", errors=["side"], now=3_000)
            review.add_review(conn, run, jobs[at], "bob", "minor", errors=["side", "missed"], now=4_000)
    return run


def read(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pandas()
    if path.suffix == ".jsonl":
        return pd.read_json(path, lines=True, dtype=False)
    return pd.read_csv(path)


def test_each_kind_of_captions_has_a_file_of_its_own_and_the_machines_stays_byte_for_byte(database, run, tmp_path):
    plain = export.export(database, run, "train", tmp_path / "before.csv").path
    for kind in ("machine", "edited", "reviewed"):
        said("export", "--split", "train", "--captions", kind)
    folder = tmp_path / "results_medical"
    assert sorted(path.name for path in folder.glob("medical*")) == [
        "medical_captions_train.csv",
        "medical_captions_train.edited.csv",
        "medical_captions_train.edited.json",
        "medical_captions_train.json",
        "medical_captions_train.reviewed.csv",
        "medical_captions_train.reviewed.json",
    ]
    assert (folder / "medical_captions_train.csv").read_bytes() == plain.read_bytes()
    edited, judged = (read(folder / f"medical_captions_train.{kind}.csv") for kind in ("edited", "reviewed"))
    assert tuple(edited.columns) == tuple(judged.columns) == COLUMNS
    assert list(edited["generated_caption"]) == EDITED
    assert list(judged["generated_caption"]) == [EDITED[at] for at in JUDGED]
    manifests = [json.loads((folder / f"medical_captions_train{kind}.json").read_text()) for kind in ("", ".edited")]
    assert [one.get("captions") for one in manifests] == [None, "edited"]
    assert manifests[1]["note"] == "Machine-generated captions with the edits of readers. Not for clinical use."


@pytest.mark.every_database
def test_other_formats_say_who_and_when(database, run, tmp_path):
    expected = {
        "edited_by": ["ann", None, "ann", "bob"],
        "edited_at": [AT.format(2), None, AT.format(2), AT.format(3)],
    }
    for ending in ("parquet", "jsonl"):
        path = export.export(database, run, "train", tmp_path / f"x.{ending}", captions="edited").path
        frame = read(path)
        assert tuple(frame.columns) == (*COLUMNS, *expected)
        found = frame.astype(object).where(frame.notna(), None)
        assert {name: list(found[name]) for name in expected} == expected
        judged = read(export.export(database, run, "train", tmp_path / f"y.{ending}", captions="reviewed").path)
        people = ["reviewed_by", "reviewed_at", "verdict", "errors"]
        assert [list(judged[name]) for name in people] == [
            *(["bob"] * 2, [AT.format(4)] * 2, ["minor"] * 2, ["side,missed"] * 2)
        ]


def test_an_export_holds_no_edit_that_was_made_after_it_began(database, run, tmp_path, monkeypatch):
    pages = export.pages

    def edit_first(*args, **options):
        with writing(database) as conn:
            job = db.execute(conn, "SELECT min(job_id) FROM captions").scalar_one()
            seen = db.execute(conn, "SELECT id FROM edits WHERE job_id = ?", (job,)).scalar_one()
            review.edit(conn, run, job, "cy", "Of the middle of the export.", seen=seen)
        return pages(*args, **options)

    monkeypatch.setattr(export, "pages", edit_first)
    path = export.export(database, run, "train", tmp_path / "x.csv", captions="edited").path
    assert list(read(path)["generated_caption"]) == EDITED


def hub(folder: Path) -> dict[str, tuple[str, str | None, list[str]]]:
    [path] = (folder / "data").iterdir()
    rows = pq.read_table(path).to_pylist()
    return {row["image_id"]: (row["generated_caption"], row["edited_by"], row["flags"]) for row in rows}


def tars(folder: Path) -> dict[str, tuple[str, str | None, list[str]]]:
    with tarfile.open(folder / "train-000000.tar") as tar:
        texts = [member for member in tar if member.name.endswith((".txt", ".json"))]
        found = {member.name: tar.extractfile(member).read().decode() for member in texts}
    facts = {name[:-5]: json.loads(text) for name, text in found.items() if name.endswith(".json")}
    return {name: (found[f"{name}.txt"], fact["edited_by"], fact["flags"]) for name, fact in facts.items()}


@pytest.mark.parametrize(("format", "reader"), [("hf", hub), ("webdataset", tars)])
def test_folders_hold_the_edited_texts_and_no_flag_of_the_machines(
    database, run, tmp_path, format: str, reader: Callable[[Path], dict]
):
    assert said("export", "--split", "train", "--format", format, "--captions", "edited").splitlines()[0] == (
        f"results_medical/medical_captions_{format}.edited train: 4 captions; 2 of the split are not done"
    )
    folder = tmp_path / "results_medical" / f"medical_captions_{format}.edited"
    assert reader(folder) == {
        "train_00000": (EDITED[0], "ann", []),
        "train_00001": (EDITED[1], None, []),
        "train_00002": (EDITED[2], "ann", []),
        "train_00003": (EDITED[3], "bob", []),
    }
    manifest = json.loads(next(folder.glob("rococap*.json")).read_text())
    assert manifest["captions"] == "edited"
    assert manifest["splits"]["train"]["flags"] == {}
    message = refused("export", "--split", "train", "--format", format, "--output", str(folder))
    assert "holds another export" in message


def test_the_card_says_that_readers_edited_the_captions(database, run, tmp_path):
    said("export", "--split", "train", "--format", "hf", "--captions", "reviewed")
    card = (tmp_path / "results_medical" / "medical_captions_hf.reviewed" / "README.md").read_text()
    assert "only pictures with a reader's verdict are included" in card
    assert "not reviewed by clinicians" not in card
    assert "| `reviewed_by`, `reviewed_at` |" in card
    assert "| train | 2 | 4 | 0 |" in card
    said("export", "--split", "train", "--format", "hf")
    plain = (tmp_path / "results_medical" / "medical_captions_hf" / "README.md").read_text()
    assert "not reviewed by clinicians" in plain
    assert "edited_by" not in plain


def test_a_submission_holds_the_edited_texts(database, run, tmp_path):
    said("export", "--split", "train", "--format", "imageclef", "--captions", "edited", "--allow-missing")
    frame = pd.read_csv(tmp_path / "results_medical" / "submission_train.edited.csv", keep_default_na=False)
    assert list(frame["Caption"]) == [*EDITED, "", ""]
    message = refused("export", "--split", "train", "--format", "imageclef", "--captions", "reviewed")
    assert message.startswith("4 of 6 pictures of train have no verdict, and ImageCLEF rejects a submission")


def test_options_that_contradict_each_other_are_refused(run):
    train = ("export", "--split", "train")
    assert refused(*train, "--captions", "edited", "--text", "original", "--format", "messages", code=2).startswith(
        "--captions is about the run's captions"
    )
    assert refused(*train, "--captions", "reviewed", "--require-complete", code=2).startswith("--captions reviewed is")


def test_a_folder_of_reviewed_captions_needs_a_verdict(database, tmp_path, monkeypatch):
    monkeypatch.setenv("ROCOCAP_DB", str(database.url))
    caption(database, fill(database, tmp_path / "set", 2), texts("A CT."))
    message = refused("export", "--split", "train", "--format", "hf", "--captions", "reviewed")
    assert message.startswith("No picture of train has a verdict in run 'default' yet.")


# --- A run keeps what the machine said -------------------------------------------------------------------------


@pytest.mark.every_database
def test_checkpoints_hold_the_machines_texts_and_restore_takes_only_those(database, run, tmp_path):
    with writing(database) as conn:
        db.execute(conn, "UPDATE jobs SET status = 'cancelled', finished_at = 5 WHERE status = 'pending'")
        db.execute(conn, "UPDATE tallies SET status = 'cancelled' WHERE status = 'pending'")
    folder = tmp_path / "results_medical"
    export.export(database, run, "train", folder / "medical_captions_train.edited.csv", captions="edited")
    write_checkpoints(database, run, "train", folder, 25)
    assert list(pd.read_csv(folder / "checkpoint_train_000001.csv")["generated_caption"]) == MACHINE
    edited = folder / "medical_captions_train.edited.csv"
    other = db.connect(f"sqlite:///{tmp_path}/other.db")
    new = fill(other, tmp_path / "set", 6)
    renamed = shutil.copy(edited, tmp_path / "captions.csv")
    shutil.copy(folder / "medical_captions_train.edited.json", tmp_path / "captions.json")
    alone = shutil.copy(edited, tmp_path / "x.reviewed.csv")
    for kind in ("edited", "reviewed"):
        export.export(database, run, "train", tmp_path / f"{kind}.parquet", captions=kind)
        (tmp_path / f"{kind}.parquet.json").unlink()
    files = [edited, renamed, alone, tmp_path / "edited.parquet", tmp_path / "reviewed.parquet"]
    for path in map(Path, files):
        with pytest.raises(RococapError) as caught:
            restore.restore(other, new, path)
        assert str(caught.value) == (
            f"{path} holds captions with the edits of readers, and a run keeps what the machine said. Restore the "
            "checkpoint segments or an export without --captions; then bring the edits back: rococap reviews "
            "--import FILE"
        )
    assert captions(other) == {}
    assert restore.restore(other, new, folder / "checkpoint_train_000001.csv").restored == 4
    other.dispose()


def test_a_published_folder_with_edits_is_not_restored(database, run, tmp_path):
    said("export", "--split", "train", "--format", "hf", "--captions", "edited")
    [path] = (tmp_path / "results_medical" / "medical_captions_hf.edited" / "data").iterdir()
    assert "holds captions with the edits of readers" in refused("restore", str(path))


# --- Scores ----------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_edited_captions_are_scored_apart(database, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "open_wordnet", lambda: SimpleNamespace(synsets=lambda word: []))
    originals = {0: "CT of the right lung.", 1: "MRI of the brain.", 2: "Ultrasound of the liver.", 3: "An X-ray."}
    write_shard(tmp_path / "set", "train", range(4), captions=originals)
    register(database, tmp_path / "set", ["train"])
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "default")
    caption(database, run, texts(*MACHINE))
    jobs = [job for (job,) in select(database, "SELECT job_id FROM captions ORDER BY 1")]
    machine = evaluate.to_json(evaluate.evaluate(database, [], ["train"]))
    with writing(database) as conn:
        for at in (0, 2):
            review.edit(conn, run, jobs[at], "ann", EDITED[at], seen=None)
    edited = evaluate.to_json(evaluate.evaluate(database, [], ["train"], captions="edited"))
    assert edited["captions"] == "edited"
    before, after = machine["runs"][0]["metrics"], edited["runs"][0]["metrics"]
    assert after["bleu_4"] > before["bleu_4"]
    assert (before["flagged"], after["flagged"]) == (0.25, 0.0)
    names = {name for (name,) in select(database, "SELECT DISTINCT metric FROM scores")}
    assert {name for name in names if ":" in name} == {f"edited:{name}" for name in names if ":" not in name}
    stored = select(database, "SELECT * FROM scores ORDER BY job_id, metric")
    assert evaluate.to_json(evaluate.evaluate(database, [], ["train"])) == machine
    assert select(database, "SELECT * FROM scores ORDER BY job_id, metric") == stored


def test_the_scores_of_edited_captions_have_a_file_of_their_own(run, monkeypatch):
    monkeypatch.setattr(metrics, "open_wordnet", lambda: SimpleNamespace(synsets=lambda word: []))
    told = said("evaluate", "--split", "train", "--captions", "edited")
    assert "scores_train_default.edited.parquet: 4 captions" in told
    assert not Path("results_medical/scores_train_default.parquet").exists()
    assert invoke("evaluate", "--split", "train", "--captions", "reviewed").exit_code == 2
