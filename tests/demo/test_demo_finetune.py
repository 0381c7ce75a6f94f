"""The demo of fine-tuning, in a few steps on a few pictures: what it does, not how well the model learns."""

from pathlib import Path

import pytest
from steps import invoke

from rococap import db, queue
from rococap.cli import setup
from rococap.demo import finetune, unseen
from rococap.errors import RococapError
from rococap.progress import silent
from rococap.results.manifest import TRAINING


@pytest.mark.slow
def test_it_captions_what_was_held_out_before_and_after_training_and_continues(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["demo", "--finetune", "--images", "16", "--workers", "1", "--steps", "2"]
    told = invoke(*asked)
    assert told.exit_code == 0, told.output
    folder = tmp_path / "demo" / "finetune"
    assert "2 steps of training on 12 pictures." in told.stdout
    rows = {line[:17]: line.split() for line in told.stdout.splitlines() if line.startswith(("never seen", "known"))}
    assert rows["never seen before"][3:5] == ["2", "0.0%"]
    assert rows["known before     "][2:4] == ["2", "100.0%"]
    assert unseen.NEW in (folder / "full-2-1.html").read_text("utf-8")
    assert (folder / "full-2-1" / TRAINING).exists()
    database = db.connect(str(folder / "rococap.db"))
    with db.transaction(database) as conn:
        done = {(one.run, one.split): (one.done, one.total) for one in queue.counts(conn)}
        assert queue.get_run(conn, "full-2-1").recipe.model == str(folder / "full-2-1")
    database.dispose()
    assert done == {("default", "train"): (0, 12), ("default", "test"): (4, 4), ("full-2-1", "test"): (4, 4)}

    weights = (folder / "full-2-1" / "model.safetensors").stat().st_mtime_ns
    again = invoke(*asked)
    assert again.stdout.split("exactly:")[1] == told.stdout.split("exactly:")[1]
    assert not {"drawing phantoms …", "fine-tuning …"} & set(again.stdout.splitlines())
    assert (folder / "full-2-1" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_picture_that_is_both_trained_on_and_held_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(finetune, "mixed", lambda split, number: (unseen.NEW, unseen.draw(number)))
    with pytest.raises(RococapError, match=r"4 pictures of .* are both trained on and held out"):
        finetune.run(tmp_path, 16, 1, "full", 2, 1, silent)


def test_options_of_the_training_go_with_finetune():
    result = invoke("demo", "--steps", "3")
    assert result.exit_code == 2
    assert "--steps goes with --finetune." in result.stderr


def test_without_a_terminal_a_long_step_tells_every_quarter_of_a_minute_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = [0.0]
    monkeypatch.setattr(setup, "monotonic", lambda: clock[0])
    progress = setup._steps()
    for second in range(20):
        clock[0] = second
        progress("fine-tuning", 2 * second, 40)
    progress("writing the report", 0, 1)
    assert capsys.readouterr().out.splitlines() == ["fine-tuning …", "fine-tuning … 30 of 40", "writing the report …"]
