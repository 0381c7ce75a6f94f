"""The vLLM engine beside the transformers engine, on the demonstration model; and what it says where vLLM is not.

`make test-vllm` runs what needs vLLM, in a virtual environment of its own.
"""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from rococap import db
from rococap.data.datasets import locate
from rococap.demo import MODEL
from rococap.demo.phantoms import HELD_OUT_SEEDS, draw, write_dataset
from rococap.engines import Completion, Engine, Options, Prepared, Request, load_engine, vllm
from rococap.engines.files import folder_digest
from rococap.engines.hf import TransformersEngine
from rococap.engines.vllm import VLLMEngine
from rococap.errors import ModelError, PictureError
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB of every engine: several are loaded at once

RECIPE = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
SIZES = [(112, 112), (300, 60), (64, 200), (30, 30), (250, 250), (90, 140), (500, 400), (28, 600)]
PHANTOMS = [draw(seed).image.convert("RGB") for seed in HELD_OUT_SEEDS["validation"][:24]]
PICTURES = [picture.resize(size) for picture, size in zip(PHANTOMS, SIZES, strict=False)] + PHANTOMS[len(SIZES) :]


def needs_vllm(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.vllm(pytest.mark.filterwarnings("ignore")(test))  # warnings of vLLM's own


class Pictures:
    """A Source over pictures that are there from the start, handed out `at_most` at a time."""

    def __init__(self, engine: Engine, images: Sequence[Image.Image], at_most: int = 1000) -> None:
        self.prepared = [engine.prepare(job_id, Request([image])) for job_id, image in enumerate(images)]
        self.at_most = at_most
        self.rows: list[int] = []
        self.lost: set[int] = set()

    def take(self, most: int, wait: float | None) -> list[Prepared]:
        n = min(most, self.at_most)
        taken, self.prepared = self.prepared[:n], self.prepared[n:]
        return taken

    def step(self, rows: int) -> set[int]:
        self.rows.append(rows)
        return self.lost


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[..., VLLMEngine]]:
    """Loads engines, and closes them at the end: the first that is closed ends what all of a process share."""
    engines = []

    def load(folder: Path, **changes: object) -> VLLMEngine:
        recipe = Recipe(**{"model": str(folder), "dtype": "float32", "max_new_tokens": 64} | changes)
        engines.append(VLLMEngine(recipe, Options(engine="vllm", batch_size=16)))
        engines[-1].load()
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def engine(load) -> VLLMEngine:
    return load(MODEL)


@pytest.fixture(scope="module")
def transformers() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(RECIPE, Options(device="cpu", batch_size=16))
    engine.load()
    yield engine
    engine.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def captions(engine: Engine, images: Sequence[Image.Image], at_most: int = 1000) -> list[Completion]:
    return sorted(engine.run(Pictures(engine, images, at_most)), key=lambda completion: completion.job_id)


def said(completions: Sequence[Completion]) -> list[tuple[str, str, int, int]]:
    return [(c.text, c.finish_reason, c.prompt_tokens, c.new_tokens) for c in completions]


# --- without vLLM ----------------------------------------------------------------------------------------------


def error_of(recipe: Recipe, options: Options) -> str:
    with pytest.raises(ModelError) as error:
        load_engine(recipe, options).load()
    return str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="it is installed here")
def test_without_vllm_the_error_says_how_to_install_it():
    assert error_of(RECIPE, Options(engine="vllm")) == (
        "The engine vllm is not installed. Install it: pip install 'rococap[vllm]'"
    )


@pytest.mark.parametrize(("field", "value"), [("adapter", "some/adapter"), ("load_in", "4bit"), ("load_in", "8bit")])
def test_a_recipe_that_vllm_does_not_follow_to_the_letter_is_refused(field, value):
    assert error_of(Recipe(**{field: value}), Options(engine="vllm")) == (
        f"{field}: the vllm engine does not support {value!r}. Use --engine transformers."
    )


@pytest.mark.parametrize(
    ("beside", "index", "is_refused"),
    [
        ("adapter_model.safetensors", False, True),
        ("adapter_model.safetensors", True, False),
        ("adapter_model.bin", False, False),  # where there are safetensors, it reads no other files
        ("training_args.bin", False, False),
    ],
)
def test_an_adapter_that_vllm_would_read_as_weights_is_refused(folder, beside, index, is_refused):
    (folder / beside).touch()
    if index:
        (folder / "model.safetensors.index.json").write_text("{}")
    if not is_refused:
        vllm._refuse_adapter_beside(folder, "a model")
        return
    with pytest.raises(ModelError) as caught:
        vllm._refuse_adapter_beside(folder, "a model")
    assert str(caught.value) == (
        f"vLLM would load {beside}, which is in the same folder as the weights of a model, as a part of them. Move it "
        "elsewhere, or use --engine transformers, which ignores it."
    )


def test_a_way_of_decoding_is_refused_since_vllm_has_its_own():
    assert error_of(RECIPE, Options(engine="vllm", decode="static")) == (
        "decode: the vllm engine does not support 'static'. Use --engine transformers."
    )


def test_vllm_is_not_imported_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # to import it raises, also where it is installed
    module = runpy.run_path(vllm.__file__, run_name="rococap.engines.vllm")
    module["VLLMEngine"](Recipe(), Options(engine="vllm"))


# --- captions --------------------------------------------------------------------------------------------------


@needs_vllm
def test_it_says_the_same_as_transformers_in_as_many_tokens(engine, transformers):
    ours, theirs = captions(transformers, PICTURES), captions(engine, PICTURES)
    assert said(theirs) == said(ours)
    assert len({completion.text for completion in theirs}) > 12, "one caption for all would prove nothing"


@needs_vllm
def test_pictures_that_join_the_running_ones_change_nothing(engine):
    assert said(captions(engine, PICTURES, at_most=1)) == said(captions(engine, PICTURES))


@needs_vllm
def test_every_picture_taken_gets_one_completion_with_its_measures(engine):
    source = Pictures(engine, PHANTOMS)
    started = time.perf_counter()
    completions = list(engine.run(source))
    elapsed_ms = (time.perf_counter() - started) * 1000
    assert sorted(c.job_id for c in completions) == list(range(24))
    assert {c.finish_reason for c in completions} == {"stop"}
    assert all(0 < c.prefill_ms < c.processing_ms <= c.latency_ms for c in completions)
    assert all(1 < c.batch_size <= 16 for c in completions)
    assert sum(c.processing_ms for c in completions) < elapsed_ms
    assert source.rows[0] == 0, "the first step reads prompts, and decodes nothing"
    assert sum(source.rows) == sum(c.new_tokens - 1 for c in completions)


@needs_vllm
def test_the_recipes_prompt_as_messages_is_answered_as_captioning_is(engine):
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": RECIPE.prompt}]}]
    source = Pictures(engine, [])
    source.prepared = [engine.prepare(job_id, Request([image], asked)) for job_id, image in enumerate(PICTURES)]
    answers = sorted(engine.run(source), key=lambda completion: completion.job_id)
    assert said(answers) == said(captions(engine, PICTURES))


@needs_vllm
def test_a_requests_own_limit_holds_and_changes_no_neighbour(engine):
    whole = captions(engine, PICTURES[:4])
    source = Pictures(engine, [])
    limits = [None, 3, 64, 1]
    source.prepared = [
        engine.prepare(job_id, Request([image], max_new_tokens=limit))
        for job_id, (image, limit) in enumerate(zip(PICTURES[:4], limits, strict=True))
    ]
    answers = sorted(engine.run(source), key=lambda completion: completion.job_id)
    assert said([answers[0], answers[2]]) == said([whole[0], whole[2]])
    assert [(answer.finish_reason, answer.new_tokens) for answer in (answers[1], answers[3])] == [
        ("length", 3),
        ("length", 1),
    ]


@needs_vllm
def test_the_tokens_told_are_those_of_the_completion(engine):
    class Listening(Pictures):
        def tokens(self, job_id: int, start: int, ids: Sequence[int]) -> None:
            assert start == len(told.setdefault(job_id, []))
            told[job_id] += ids

    told: dict[int, list[int]] = {}
    for completion in engine.run(Listening(engine, PICTURES)):
        ids = told[completion.job_id]
        assert engine.loaded.tokenizer.decode(ids, skip_special_tokens=True) == completion.text
        assert len(ids) == completion.new_tokens - (completion.finish_reason == "stop")


@needs_vllm
def test_several_pictures_in_a_request_are_refused(engine):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    with pytest.raises(PictureError, match="The engine vllm takes one picture in a request, not 2"):
        engine.prepare(1, Request(PICTURES[:2], messages))


@needs_vllm
def test_a_caption_that_is_cut_says_so(load):
    (completion,) = captions(load(MODEL, max_new_tokens=5), PICTURES[:1])
    assert (completion.finish_reason, completion.new_tokens) == ("length", 5)


@needs_vllm
def test_abandoned_rows_end_and_have_no_completion(engine):
    source = Pictures(engine, PICTURES[:4])
    source.lost = {1, 3}
    assert sorted(c.job_id for c in engine.run(source)) == [0, 2]
    source = Pictures(engine, PICTURES[:4])
    source.lost = {0, 1, 2, 3}
    assert list(engine.run(source)) == []
    assert len(source.rows) == 1
    assert len(captions(engine, PICTURES[:4])) == 4, "what was abandoned left nothing behind"


# --- settings --------------------------------------------------------------------------------------------------


@needs_vllm
def test_a_checkpoints_own_sampling_and_penalty_do_not_apply(engine, folder, load):
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 9.0}
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert said(captions(load(folder), PICTURES)) == said(captions(engine, PICTURES))


@needs_vllm
def test_a_repetition_penalty_counts_as_in_transformers(load):
    recipe = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32", repetition_penalty=1.3)
    transformers = TransformersEngine(recipe, Options(device="cpu"))
    transformers.load()
    theirs = captions(load(MODEL, repetition_penalty=1.3), PICTURES)
    assert said(theirs) == said(captions(transformers, PICTURES))
    assert said(theirs) != said(captions(load(MODEL), PICTURES))


@needs_vllm
def test_the_recipes_pixel_bounds_hold(load):
    engine = load(MODEL, max_pixels=10_000)
    rows = captions(engine, [Image.new("RGB", (900, 700)), Image.new("RGB", (56, 56))])
    transformers = TransformersEngine(engine.recipe, Options(device="cpu"))
    transformers.load()
    ours = [transformers.prepare(1, Request([Image.new("RGB", size)])).n_tokens for size in [(900, 700), (56, 56)]]
    assert [row.prompt_tokens for row in rows] == ours == [17 + 12, 17 + 4]


@needs_vllm
def test_the_recipes_pixel_bounds_hold_for_a_folder_as_qwen2_vl_was_published(folder, load):
    # a flat preprocessor_config.json with min_pixels and max_pixels, as in 2024
    processor = json.loads((folder / "processor_config.json").read_text())
    old = processor["image_processor"] | {"min_pixels": 3136, "max_pixels": 12845056}
    old.pop("size", None)
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(old | {"processor_class": "Qwen2VLProcessor"}))
    (completion,) = captions(load(folder, max_pixels=10_000), [Image.new("RGB", (900, 700))])
    assert completion.prompt_tokens == 17 + 12
    (completion,) = captions(load(folder, min_pixels=100_352, max_pixels=200_704), [Image.new("RGB", (56, 56))])
    assert (completion.prompt_tokens - 17) * 784 >= 100_352


@needs_vllm
def test_the_info_says_what_was_loaded(engine):
    info = engine.info
    assert (info.name, info.dtype, info.device, info.revision) == ("vllm", "float32", "cpu", "")
    assert info.digest == folder_digest(MODEL)
    assert info.versions.keys() == {"rococap", "vllm", "torch", "transformers", "pillow"}


@needs_vllm
def test_dtype_auto_is_float32_on_the_cpu(load):
    assert load(MODEL, dtype="auto").info.dtype == "float32"


# --- trouble ---------------------------------------------------------------------------------------------------


@needs_vllm
def test_a_picture_too_long_for_the_model_fails_alone(folder, load):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    images = [*PHANTOMS[:2], PHANTOMS[2].resize((600, 600)), *PHANTOMS[3:6]]
    completions = captions(load(folder), images)
    failures = [completion.failure for completion in completions]
    assert [failure and failure.code for failure in failures] == [None, None, "unprocessable", None, None, None]
    assert not failures[2].transient
    assert failures[2].message.startswith("vLLM rejects this picture: ")
    assert "length" in failures[2].message
    assert all(completion.text for completion in completions if completion.failure is None)


@needs_vllm
def test_logits_that_are_not_numbers_are_a_failure_and_never_a_caption(folder, load):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name][5] = float("nan")  # tied: one token's logit is NaN
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (completion,) = captions(load(folder), PICTURES[:1])
    assert completion.failure.code == "non_finite"
    assert "float32" in completion.failure.message


@needs_vllm
def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    message = error_of(Recipe(model=str(folder)), Options(engine="vllm"))
    assert message.startswith(f"The folder {folder} contains no model that can be loaded: ")


@needs_vllm
def test_a_folder_that_is_not_there_is_refused():
    assert error_of(Recipe(model="./nowhere"), Options(engine="vllm")) == (
        "There is no model folder ./nowhere. Name an existing folder or a hub id with --model."
    )


@needs_vllm
def test_a_device_that_this_vllm_does_not_run_on_is_refused():
    assert error_of(RECIPE, Options(engine="vllm", device="cuda:0")) == (
        "This build of vLLM runs on cpu, not on 'cuda:0'. Use --device auto or cpu."
    )


# --- the whole worker ------------------------------------------------------------------------------------------


@needs_vllm
def test_a_worker_with_vllm_captions_a_run_and_leaves_its_provenance(tmp_path):
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    write_dataset(tmp_path / "set", {"train": 40})
    database = db.connect(url)
    enqueue(database, locate(str(tmp_path / "set"), ["train"]), ["train"], run="default", recipe=RECIPE)
    command = [sys.executable, "-m", "rococap", "--db", url, "worker", "--engine", "vllm", "--batch-size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with db.transaction(database) as conn:
        assert db.execute(conn, "SELECT status, count(*) FROM jobs GROUP BY 1").fetchall() == [("done", 40)]
        assert db.execute(conn, "SELECT count(*) FROM captions WHERE text <> ''").scalar() == 40
        (worker,) = db.execute(conn, "SELECT engine, device, versions FROM workers").fetchall()
    database.dispose()
    assert worker[:2] == ("vllm", "cpu")
    assert "vllm" in json.loads(worker[2])
