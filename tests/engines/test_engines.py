"""The transformers engine, with the real demonstration model on real and drawn pictures."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import families
import pytest
import torch
from engine_steps import PHANTOMS, Pictures, captions, error_of, loaded, memory_for, mixed_pictures, texts
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForImageTextToText
from transformers.integrations import sdpa_attention

from rococap.demo import MODEL
from rococap.engines import Completion, Options, Request
from rococap.engines.checkpoint import choose_dtype
from rococap.engines.decoding import Row, collate, is_out_of_memory, share
from rococap.engines.files import folder_digest
from rococap.engines.hf import TransformersEngine
from rococap.engines.static import _Meter
from rococap.recipe import Recipe

RECIPE = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")


@pytest.fixture(scope="module", params=["continuous", "static"])
def engine(request) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(RECIPE, Options(device="cpu", batch_size=16, decode=request.param))
    engine.load()
    yield engine
    engine.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


# --- captions --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(engine) -> list[Completion]:
    """What is said of each of the mixed pictures by itself."""
    return captions(engine, mixed_pictures(), 1)


def test_a_batch_of_mixed_sizes_says_the_same_as_one_picture_at_a_time(engine, alone):
    together = captions(engine, mixed_pictures(), 5)
    assert texts(together) == texts(alone)
    assert [c.new_tokens for c in together] == [c.new_tokens for c in alone]
    assert len(set(texts(alone))) > 6, "a model that says the same of every picture would prove nothing"


def test_right_padding_would_be_noticed(engine, alone, monkeypatch):
    def pad_right(tensor, width, fill=0):
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]), value=fill)

    monkeypatch.setattr("rococap.engines.decoding.pad_left", pad_right)  # of the prompts
    monkeypatch.setattr("rococap.engines.precompute.pad_left", pad_right)  # of their positions
    assert texts(captions(engine, mixed_pictures(), 5)) != texts(alone)


def test_a_collated_batch_is_what_the_processor_makes_of_the_pictures_together(engine):
    images = mixed_pictures()[:4]
    ours = collate(
        [engine.prepare(n, Request([image])).inputs.tensors for n, image in enumerate(images)], engine.loaded.pad
    )
    theirs = engine.processor(text=[engine.prompt] * 4, images=images, return_tensors="pt", padding=True)
    assert ours.keys() == theirs.keys()
    assert {name: torch.equal(ours[name], theirs[name]) for name in ours} == dict.fromkeys(ours, True)


def test_a_prompt_that_was_kept_for_a_pictures_shape_is_what_the_processor_says(engine):
    images = [PHANTOMS[0].image.convert("RGB").resize(size) for size in [(112, 112), (150, 90), (112, 112), (150, 90)]]
    ours = [engine.prepare(0, Request([image])).inputs.tensors for image in images]
    theirs = [dict(engine.processor(text=[engine.prompt], images=[image], return_tensors="pt")) for image in images]
    assert ours[2]["input_ids"] is ours[0]["input_ids"], "it was not kept"
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in its)


def test_every_picture_taken_gets_one_completion_with_its_measures(engine):
    started = time.perf_counter()
    completions = captions(engine, [phantom.image.convert("RGB") for phantom in PHANTOMS], 5)
    elapsed_ms = (time.perf_counter() - started) * 1000
    assert [c.job_id for c in completions] == list(range(12))
    assert {c.finish_reason for c in completions} == {"stop"}
    assert [c.batch_size for c in completions] == [5] * 10 + [2 if engine.options.decode == "static" else 5] * 2
    assert all(0 < c.prefill_ms < c.processing_ms <= c.latency_ms for c in completions)
    assert sum(c.processing_ms for c in completions) < elapsed_ms
    ends = [len(engine.processor.tokenizer(c.text)["input_ids"]) + 1 for c in completions]
    assert [c.new_tokens for c in completions] == ends
    assert engine.loaded.pad not in [engine.processor.tokenizer(c.text)["input_ids"][-1] for c in completions]


def test_a_caption_that_is_cut_says_so(folder):
    engine = loaded(folder, max_new_tokens=5)
    (completion,) = captions(engine, [PHANTOMS[0].image.convert("RGB")])
    assert (completion.finish_reason, completion.new_tokens) == ("length", 5)


def test_a_steps_time_is_shared_over_the_rows_that_were_active_in_it(engine):
    rows = [Row(picture, 0.0, []) for picture in Pictures(engine, [PHANTOMS[0].image.convert("RGB")] * 3).prepared]
    share(rows, 0.3)
    share([rows[0], rows[2]], 0.4)
    share([rows[2]], 1.0)
    assert [round(row.share_ms) for row in rows] == [300, 100, 1300]
    assert [row.batch_size for row in rows] == [3, 3, 3]


def test_a_static_batchs_time_goes_to_the_rows_that_have_not_ended(engine):
    source = Pictures(engine, [PHANTOMS[0].image.convert("RGB")] * 3)
    rows = [Row(picture, 0.0, []) for picture in source.prepared]
    meter = _Meter(source, rows, engine.loaded)
    meter.since = 0.0
    meter._share(0.3)
    meter.active = {0, 2}
    meter._share(0.4)
    meter.active = {2}
    meter._share(1.0)
    assert [round(row.share_ms) for row in rows] == [150, 100, 750]
    assert [round(row.prefill_ms) for row in rows] == [100, 100, 100]


def test_abandoned_rows_end_and_have_no_completion(engine):
    engine.decoder.limit = 16
    source = Pictures(engine, [phantom.image.convert("RGB") for phantom in PHANTOMS[:4]])
    source.lost = {1, 3}
    assert [c.job_id for c in engine.run(source)] == [0, 2]
    source = Pictures(engine, [phantom.image.convert("RGB") for phantom in PHANTOMS[:4]])
    source.lost = {0, 1, 2, 3}
    assert list(engine.run(source)) == []
    assert source.steps == 1


# --- settings --------------------------------------------------------------------------------------------------


def test_a_checkpoints_own_sampling_and_penalty_do_not_apply(engine, folder):
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 9.0}
    (folder / "generation_config.json").write_text(json.dumps(config))
    images = [phantom.image.convert("RGB") for phantom in PHANTOMS]
    assert texts(captions(loaded(folder), images)) == texts(captions(engine, images))


def test_the_recipes_pixel_bounds_hold_for_a_folder_as_qwen2_vl_was_published(folder):
    # a flat preprocessor_config.json with min_pixels and max_pixels, as in 2024
    processor = json.loads((folder / "processor_config.json").read_text())
    old = processor["image_processor"] | {"min_pixels": 3136, "max_pixels": 12845056}
    old.pop("size", None)
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(old | {"processor_class": "Qwen2VLProcessor"}))
    picture = Image.new("RGB", (900, 700))
    grid = loaded(folder, max_pixels=10_000).prepare(1, Request([picture])).inputs.tensors["image_grid_thw"]
    assert grid.tolist() == [[1, 6, 8]]
    grid = (
        loaded(folder, min_pixels=100_352, max_pixels=200_704)
        .prepare(1, Request([Image.new("RGB", (56, 56))]))
        .inputs.tensors["image_grid_thw"]
    )
    assert grid.prod() * 196 >= 100_352


def test_dtype_auto_is_float32_on_the_cpu_and_a_named_one_holds():
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_dtype_auto_is_bfloat16_where_the_gpu_has_it_and_float16_else(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda:0")) == dtype


def test_the_info_says_what_was_loaded(engine):
    info = engine.info
    assert (info.name, info.dtype, info.device, info.revision) == ("transformers", "float32", "cpu", "")
    assert info.digest == folder_digest(MODEL)
    assert info.versions["torch"].startswith("2.")


def test_the_digest_changes_with_a_weight_and_not_with_a_readme(folder):
    before = folder_digest(folder)
    (folder / "README.md").write_text("other words")
    assert folder_digest(folder) == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert folder_digest(folder) != before


# --- trouble ---------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_and_loses_no_picture(engine, alone):
    with memory_for(engine, rows=3):
        completions = captions(engine, mixed_pictures(), 8)
    assert texts(completions) == texts(alone)
    assert engine.batch_size == 2
    assert {c.batch_size for c in completions} <= {2, 3}
    assert all(c.flags == "" for c in completions)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_only_allocations_that_failed_in_a_library_count_as_out_of_memory(message, expected):
    assert is_out_of_memory(RuntimeError(message)) == expected
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


def test_an_error_of_the_device_ends_the_engine(engine):
    def refuse(module: object, args: object, inputs: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    hook = engine.loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            captions(engine, mixed_pictures()[:2])
    finally:
        hook.remove()


def test_cudnn_attention_is_off_before_the_first_attention_and_stored_with_the_versions(engine):
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        again = loaded(MODEL)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert again.info.versions["cudnn_attention"] == "off"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def test_out_of_memory_under_way_begins_again_with_half_the_rows(engine, alone):
    source = Pictures(engine, mixed_pictures())
    engine.decoder.limit = 8
    with memory_for(engine) as _, ExitStack() as later:

        def step(rows: int) -> set[int]:
            source.steps += 1
            if source.steps == 10:
                later.enter_context(memory_for(engine, rows=5))
            return set()

        source.step = step
        completions = sorted(engine.run(source), key=lambda completion: completion.job_id)
    assert texts(completions) == texts(alone)
    assert engine.batch_size <= 5


def test_a_picture_too_large_alone_is_captioned_in_fewer_pixels_and_flagged(engine):
    images = [PHANTOMS[0].image.convert("RGB"), PHANTOMS[1].image.convert("RGB").resize((224, 448))]
    small, large = (picture.n_tokens for picture in Pictures(engine, images).prepared)
    assert large > small
    with memory_for(engine, tokens=small):
        first, second = captions(engine, images, 4)
    assert (first.flags, second.flags) == ("", "fewer_pixels")
    assert second.failure is None
    assert second.text
    assert second.prompt_tokens <= small


def test_a_picture_that_does_not_fit_however_small_fails_alone(engine):
    def refuse(module: object, args: object, inputs: dict[str, torch.Tensor]) -> None:
        grid = inputs["grid_thw"]
        if bool((grid[:, 1] > 4 * grid[:, 2]).any()):  # a strip stays one when it is made smaller
            raise torch.OutOfMemoryError("CUDA out of memory.")

    images = [phantom.image.convert("RGB") for phantom in PHANTOMS[:4]]
    images[2] = images[2].resize((56, 1120))
    hook = engine.loaded.model.model.visual.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        completions = captions(engine, images, 4)
    finally:
        hook.remove()
    assert [c.failure and c.failure.code for c in completions] == [None, None, "out_of_memory", None]
    assert all(c.text for c in completions if c.failure is None)


def test_logits_that_are_not_finite_are_a_failure_and_never_a_caption(folder):
    engine = loaded(folder)
    with torch.no_grad():
        engine.loaded.model.get_input_embeddings().weight[5] = float("nan")  # tied: one token's logit is NaN
    (completion,) = captions(engine, [PHANTOMS[0].image.convert("RGB")])
    assert completion.failure.code == "non_finite"
    assert "float32" in completion.failure.message


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert error_of(Recipe(model=str(folder))).startswith(f"The folder {folder} contains no model that can be loaded: ")


def test_weights_that_were_cut_off_are_refused(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100_000])
    assert error_of(Recipe(model=str(folder))).startswith(f"The folder {folder} contains no model that can be loaded: ")


def test_a_checkpoint_that_lacks_a_weight_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("patch_embed.proj.weight"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert error_of(Recipe(model=str(folder))) == (
        f"{folder} lacks 1 weights (model.visual.patch_embed.proj.weight …). Download it again, or name another."
    )


def amend(path: Path, part: str | None = None, **changes: object) -> None:
    content = json.loads(path.read_text())
    (content if part is None else content[part]).update(changes)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("part", "changes", "weight", "stored", "wanted"),
    [
        ("text_config", {"vocab_size": 600}, "language_model.embed_tokens", "568 x 128", "600 x 128"),
        ("text_config", {"hidden_size": 64}, "language_model.embed_tokens", "568 x 128", "568 x 64"),
        ("text_config", {"intermediate_size": 512}, "language_model.layers.0.mlp.down_proj", "128 x 384", "128 x 512"),
        (
            "vision_config",
            {"patch_size": 16},
            "visual.patch_embed.proj",
            "128 x 3 x 2 x 14 x 14",
            "128 x 3 x 2 x 16 x 16",
        ),
    ],
)
def test_weights_of_other_shapes_than_the_config_says_are_refused(folder, part, changes, weight, stored, wanted):
    amend(folder / "config.json", part, **changes)
    assert error_of(Recipe(model=str(folder))) == (
        f"{folder}: the weight model.{weight}.weight has the shape {stored} in the file, but {wanted} in config.json, "
        "so these belong to two models. Copy the config.json that was saved with the weights, or download both again."
    )


def test_a_config_with_fewer_layers_than_the_weights_is_refused(folder):
    amend(folder / "config.json", "text_config", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    message = error_of(Recipe(model=str(folder)))
    assert message.startswith(f"{folder}: config.json has no layer for 12 weights (model.language_model.layers.2.")
    assert message.endswith(
        " …), so these belong to two models. Copy the config.json that was saved with the weights, or download both "
        "again."
    )


def test_weights_that_are_not_the_models_are_told_of(folder, caplog):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"extra_head.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    loaded(folder)
    assert f"{folder}: 1 weights are not part of the model and are ignored (extra_head.weight …)" in caplog.text


@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"],
)
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "is not valid JSON (Expecting value: line 1 column 1 (char 0))."),
        (
            "version https://git-lfs.github.com/spec/v1",
            "is not valid JSON (Expecting value: line 1 column 1 (char 0)).",
        ),
        ('{"a": ', "is not valid JSON (Expecting value: line 1 column 7 (char 6))."),
        ("[]", "is damaged: it contains no JSON object."),
        ("null", "is damaged: it contains no JSON object."),
    ],
)
def test_a_file_of_a_model_that_is_damaged_is_named(folder, file, content, fault):
    (folder / file).write_text(content)
    assert error_of(Recipe(model=str(folder))) == f"{folder / file} {fault} Copy or download it again."


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": {}}'),
        ("processor_config.json", "{}"),
        ("chat_template.json", "{}"),
        ("model.safetensors", ""),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
        ("model.safetensors.index.json", "{}"),
        ("pytorch_model.bin", "no pickle"),
    ],
)
def test_a_model_that_is_damaged_otherwise_is_refused_in_one_line(folder, file, content):
    if file.startswith(("model", "pytorch")):
        (folder / "model.safetensors").unlink()
    if file == "chat_template.json":
        (folder / "chat_template.jinja").unlink()
    (folder / file).write_text(content)
    message = error_of(Recipe(model=str(folder)))
    assert message.startswith(f"The folder {folder} contains no model that can be loaded: ")
    assert "\n" not in message


def test_a_field_of_the_config_that_is_of_another_type_is_refused(folder):
    amend(folder / "config.json", image_token_id="<|image_pad|>")
    assert error_of(Recipe(model=str(folder))) == (
        f"The folder {folder} contains no model that can be loaded: StrictDataclassFieldValidationError: Validation "
        "error for field 'image_token_id'. Copy or download it again, or name another."
    )


def test_a_tokenizer_without_its_vocabulary_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    assert error_of(Recipe(model=str(folder))) == (
        f"The tokenizer of {folder} has 8 tokens, and config.json says that number 566 stands for a picture: its "
        "tokenizer.json is missing, or another model's. Copy or download it again."
    )


def test_the_patches_of_a_picture_are_projected_as_the_stock_model_does(engine):
    stock = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    ours, theirs = (model.model.visual.patch_embed for model in (engine.loaded.model, stock))
    patches = torch.randn(20, 3 * 2 * 14 * 14)
    assert torch.allclose(ours(patches), theirs(patches), atol=1e-5)
    assert ours.proj.forward.__qualname__.startswith("_multiply")
    larger = torch.randn(2, 3, 4, 14, 14)  # no single patch
    assert torch.allclose(ours.proj(larger), theirs.proj(larger), atol=1e-5)


def copies_told_of(caplog, model: Path = MODEL) -> list[str]:
    loaded(model, Options(device="cpu", batch_size=5))
    return [message for message in caplog.messages if "-fold at every decode step" in message]


def test_a_transformers_that_copies_keys_and_values_at_each_step_is_named_with_the_remedy(monkeypatch, caplog):
    monkeypatch.delattr(sdpa_attention, "pack_gqa", raising=False)
    assert copies_told_of(caplog) == [
        f"transformers {version('transformers')} copies the keys and values of this model 2-fold at every decode step, "
        "which slows captioning down. Upgrade it: pip install -U 'transformers>=5.23,<6'"
    ]


def test_a_model_whose_query_heads_share_no_keys_is_not_warned_of(monkeypatch, caplog, tmp_path):
    monkeypatch.delattr(sdpa_attention, "pack_gqa", raising=False)
    monkeypatch.setitem(families.TEXT, "num_key_value_heads", families.TEXT["num_attention_heads"])
    assert copies_told_of(caplog, families.qwen2_vl(tmp_path)) == []


def test_the_installed_transformers_is_warned_of_only_if_it_copies_keys_at_a_decode_step(monkeypatch, caplog):
    attention, heads = functional.scaled_dot_product_attention, set()

    def attend(query: torch.Tensor, key: torch.Tensor, *args: object, **named: object) -> torch.Tensor:
        if named.get("attn_mask") is not None and key.shape[2] > query.shape[2]:
            heads.add(key.shape[1])
        return attention(query, key, *args, **named)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    captions(loaded(options=Options(device="cpu", batch_size=5)), mixed_pictures(), 5)
    assert heads == ({4} if copies_told_of(caplog) else {2}), "the demo model has 4 heads for queries and 2 for keys"


def test_a_folder_that_is_not_there_is_refused():
    assert error_of(Recipe(model="./nowhere")) == (
        "There is no model folder ./nowhere. Name an existing folder or a hub id with --model."
    )


def test_an_unknown_hub_model_offline_is_refused():
    message = error_of(Recipe(model="nobody/no-such-model"))
    assert message.startswith("The model nobody/no-such-model (revision main) is not available: ")
    assert message.endswith("download it on a machine with access to the hub: hf download nobody/no-such-model")


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    """transformers asks it for every file, five times each: two and a half minutes until it says so."""
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    code = (
        "from rococap.engines import Options, load_engine; from rococap.recipe import Recipe\n"
        "load_engine(Recipe(model='nobody/nothing'), Options(device='cpu')).load()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | hub, capture_output=True, text=True, timeout=120
    )
    assert "rococap.errors.ModelError: The model nobody/nothing (revision main) is not available: " in done.stderr
    assert done.stderr.count("the hub cannot be reached") == 1
    assert "Retrying" not in done.stderr


def test_a_model_without_an_image_processor_is_refused(folder):
    (folder / "processor_config.json").unlink()
    assert "contains no model that can be loaded: Can't load image processor" in error_of(Recipe(model=str(folder)))


def test_a_device_that_this_machine_does_not_have_is_refused():
    assert error_of(RECIPE, "cuda:99") == (
        f"This machine has {torch.cuda.device_count()} CUDA devices, so not 'cuda:99'. Use --device auto or cpu."
    )
    assert error_of(RECIPE, "gpu") == "There is no device 'gpu'. Use auto, cpu or cuda:0."
