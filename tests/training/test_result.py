"""The result captions like any other model, says what made it, and evaluate warns where it was trained."""

import json
import shutil

import pytest
from engine_steps import captions as engine_captions
from engine_steps import loaded, mixed_pictures, texts
from samples import register, write_shard
from steps import captions, refused, said
from training_steps import MODEL, RECIPE, ready, train

from rococap import db, queue
from rococap.engines.files import folder_digest
from rococap.results.manifest import TRAINING


@pytest.fixture
def tuned(engine, tmp_path):
    """An adapter that has learned one caption, whatever the picture."""
    write_shard(tmp_path, "train", range(4), captions=dict.fromkeys(range(4), "A chest X-ray."))
    register(engine, tmp_path, ["train"], recipe=RECIPE)
    train(engine, tmp_path / "tuned", max_steps=25, batch_size=4, lr=1e-2, dropout=0.0, save_every=25)
    return tmp_path / "tuned"


def test_a_run_with_the_adapter_says_what_it_learned_and_evaluate_warns(tuned, url, engine):
    said("enqueue", "--db", url, "--run", "tuned", "--from", "default", "--adapter", str(tuned))
    said("worker", "--db", url, "--run", "tuned", "--device", "cpu", "--no-self-check")
    assert set(captions(engine).values()) == {"A chest X-ray."}
    assert "Not evaluated yet" in (tuned / "README.md").read_text()
    evaluate = ("evaluate", "--db", url, "--run", "tuned", "--split", "train", "--json")
    shown = said(*evaluate, "--card", str(tuned))
    assert "was trained on train of this data set" in shown
    card = (tuned / "README.md").read_text()
    assert "4 captions of run `tuned`" in card
    assert "tuned was trained on train of this data set" in card
    assert "Not evaluated yet" not in card


def test_the_marker_says_what_made_it(tuned, engine, tmp_path):
    marker = json.loads((tuned / TRAINING).read_text())
    assert marker["dataset"] == str(tmp_path)
    assert (marker["splits"], marker["pictures"], marker["steps"], marker["seed"]) == (["train"], 4, 25, 1)
    assert (marker["base"], marker["base_digest"]) == (str(MODEL), folder_digest(MODEL))
    assert marker["plan"]["prompt"] == RECIPE.prompt
    assert marker["versions"].keys() == {"rococap", "torch", "transformers", "accelerate", "peft"}
    assert len(marker["pictures_digest"]) == 64


def test_the_folder_brings_processor_template_and_a_card_without_paths(tuned, tmp_path):
    names = {path.name for path in tuned.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"} <= names
    processor = json.loads((tuned / "processor_config.json").read_text())
    assert processor == json.loads((MODEL / "processor_config.json").read_text())
    card = (tuned / "README.md").read_text()
    assert 'license: "cc-by-nc-sa-4.0"' in card
    assert "Not for clinical use" in card
    assert str(tmp_path) not in card
    assert str(MODEL.parent) not in card


def test_full_tuning_leaves_a_model_that_captions_without_its_base(engine, url, tmp_path):
    write_shard(tmp_path, "train", range(4), captions=dict.fromkeys(range(4), "A chest X-ray."))
    base = shutil.copytree(MODEL, tmp_path / "base")
    register(engine, tmp_path, ["train"], recipe=RECIPE)
    tuned = tmp_path / "tuned"
    common = ("--db", url, "--split", "train", "--model", str(base), "--device", "cpu", "--output", str(tuned))
    steps = ("--method", "full", "--max-steps", "25", "--batch-size", "4", "--lr", "1e-3")
    printed = said("finetune", *common, *steps)
    assert "25 steps on 4 pictures" in printed
    assert f"enqueue --run tuned --from default --model {tuned}" in printed
    shutil.rmtree(base)
    said("enqueue", "--db", url, "--run", "tuned", "--from", "default", "--model", str(tuned))
    said("worker", "--db", url, "--run", "tuned", "--device", "cpu", "--no-self-check")
    with db.transaction(engine) as conn:
        assert queue.get_run(conn, "tuned").recipe.model == str(tuned)
    assert set(captions(engine).values()) == {"A chest X-ray."}


def test_the_command_reports_as_json_and_refuses_bad_options(engine, url, tmp_path):
    ready(engine, tmp_path, 4)
    common = ("finetune", "--db", url, "--split", "train", "--device", "cpu", "--output", str(tmp_path / "tuned"))
    shown = json.loads(said(*common, "--max-steps", "1", "--batch-size", "2", "--json"))
    assert (shown["is_finished"], shown["steps"], shown["examples"]) == (True, 1, 4)
    assert "none of" in refused(*common, "--modality", "photograph", code=2)
    assert "--accumulate goes with a number" in refused(*common, "--accumulate", "2", code=2)
    other = ("--output", str(tmp_path / "other"))
    assert "no device 'gpu'" in refused(*common, *other, "--device", "gpu")
    assert "so not 'cuda:99'" in refused(*common, *other, "--device", "cuda:99")
    assert not (tmp_path / "other").exists()


def test_a_merged_adapter_is_a_plain_model_that_says_the_same(engine, tmp_path):
    ready(engine, tmp_path)
    tuned, merged = tmp_path / "tuned", tmp_path / "merged"
    train(engine, tuned, max_steps=6, lr=1e-2, target="language+vision")
    assert "holds the whole model" in said("finetune", "--merge", str(tuned), "--output", str(merged))
    assert not (merged / "adapter_config.json").exists()
    images = mixed_pictures()
    plain, adapted, whole = (
        texts(engine_captions(loaded(model, adapter=lora), images))
        for model, lora in ((MODEL, None), (MODEL, str(tuned)), (merged, None))
    )
    assert whole == adapted != plain
    assert len(set(whole)) > 1
    assert json.loads((merged / TRAINING).read_text())["merged"] is True
    assert "exists and is not empty" in refused("finetune", "--merge", str(tuned), "--output", str(merged))
    assert "holds no LoRA" in refused("finetune", "--merge", str(merged), "--output", str(tmp_path / "again"))
