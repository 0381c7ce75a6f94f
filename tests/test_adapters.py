"""Adapters, quantised weights and spread models: each with the real demonstration model."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_engines import captions, error_of, mixed_pictures, texts
from transformers import AutoModelForImageTextToText

from rococap.demo import MODEL
from rococap.engines import Options, hf
from rococap.engines.checkpoint import folder_digest
from rococap.engines.continuous import ContinuousDecoder
from rococap.engines.hf import TransformersEngine
from rococap.engines.static import StaticDecoder
from rococap.errors import ModelError
from rococap.recipe import Recipe


def loaded(model: Path = MODEL, options: Options | None = None, **recipe: object) -> TransformersEngine:
    engine = TransformersEngine(
        Recipe(**{"model": str(model), "dtype": "float32", "max_new_tokens": 24} | recipe),
        options or Options(device="cpu", batch_size=5),
    )
    engine.load()
    return engine


def write_adapter(folder: Path, **config: object) -> Path:
    """A LoRA with weights large enough to change what the demonstration model says."""
    base = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(20)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"))


def test_an_adapter_changes_what_is_said_and_stands_in_what_the_run_pins(adapter):
    plain, adapted = loaded(), loaded(adapter=str(adapter))
    images = mixed_pictures()
    said = texts(captions(adapted, images))
    assert said != texts(captions(plain, images))
    assert said == texts(captions(adapted, images, 1))
    assert isinstance(adapted.decoder, ContinuousDecoder)
    assert adapted.info.resolved() == plain.info.resolved() | {"adapter": folder_digest(adapter)}
    assert "peft" in adapted.info.versions


def test_an_adapter_says_what_peft_says(adapter):
    from peft import PeftModel

    base = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    engine = loaded(adapter=str(adapter))
    (image, *_) = mixed_pictures()
    inputs = engine.processor(text=[engine.prompt], images=[image], return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert texts(captions(engine, [image])) == [engine.processor.tokenizer.decode(new, skip_special_tokens=True)]


def test_an_adapter_of_another_model_is_refused(tmp_path, adapter):
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    path = other / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen2-VL-7B-Instruct"}))
    assert error_of(Recipe(model=str(MODEL), adapter=str(other))) == (
        f"The adapter {other} was trained on Qwen/Qwen2-VL-7B-Instruct, not on {MODEL}. Name that with --model. "
        "If both are one model: enqueue a run with --adapter-base any"
    )
    path.write_text(json.dumps(config | {"target_modules": ["c_attn"], "base_model_name_or_path": None}))
    assert error_of(Recipe(model=str(MODEL), adapter=str(other))).startswith(
        f"The adapter {other} does not fit {MODEL}: "
    )


def test_an_adapter_that_lacks_weights_is_refused(tmp_path, adapter):
    half = Path(shutil.copytree(adapter, tmp_path / "half"))
    path = half / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj", "v_proj", "k_proj"]}))
    assert error_of(Recipe(model=str(MODEL), adapter=str(half))).startswith(
        f"The adapter {half} does not fit {MODEL}: Found missing adapter keys"
    )


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    assert error_of(Recipe(model=str(MODEL), adapter=str(tmp_path))) == (
        f"{tmp_path} is no adapter: it has no adapter_config.json. Name a folder or hub id in PEFT's format."
    )


def test_a_damaged_adapter_is_refused(tmp_path, adapter):
    damaged = Path(shutil.copytree(adapter, tmp_path / "damaged"))
    recipe = Recipe(model=str(MODEL), adapter=str(damaged))
    (damaged / "adapter_model.safetensors").write_bytes(b"no weights")
    assert error_of(recipe).startswith(f"The adapter {damaged} does not fit {MODEL}: ")
    for config in ("no json", "[]"):
        (damaged / "adapter_config.json").write_text(config)
        assert error_of(recipe) == (
            f"The adapter {damaged} has a damaged adapter_config.json. Copy or download it again."
        )
    (damaged / "adapter_model.safetensors").unlink()
    assert error_of(recipe) == (f"The adapter {damaged} has no adapter_model.safetensors. Copy or download it again.")


@pytest.mark.parametrize(
    ("package", "recipe", "message"),
    [
        ("peft", {"adapter": "/x"}, "Adapters need PEFT. Install it: pip install 'rococap[peft]'"),
        (
            "bitsandbytes",
            {"load_in": "4bit"},
            "--load-in needs bitsandbytes. Install it: pip install 'rococap[bitsandbytes]'",
        ),
    ],
)
def test_an_extra_that_is_not_installed_is_named(monkeypatch, package, recipe, message):
    find = hf.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == package else find(name, *more))
    assert error_of(Recipe(model=str(MODEL), **recipe)) == message


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_caption_and_say_so(bits):
    engine = loaded(load_in=bits)
    said = captions(engine, mixed_pictures())
    assert len(set(texts(said))) > 6
    assert all(caption.failure is None for caption in said)
    layer = engine.loaded.model.model.language_model.layers[0].mlp.up_proj
    assert type(layer).__module__.startswith("bitsandbytes")
    assert "bitsandbytes" in engine.info.versions


def test_an_adapter_goes_on_quantised_weights(adapter):
    engine = loaded(load_in="4bit", adapter=str(adapter))
    assert texts(captions(engine, mixed_pictures())) != texts(captions(loaded(load_in="4bit"), mixed_pictures()))


def test_a_model_is_spread_only_where_there_are_gpus():
    with pytest.raises(ModelError) as caught:
        loaded(options=Options(device="cpu", device_map="auto"))
    assert str(caught.value) == "--device-map auto spreads a model over GPUs, and there is none. Leave it out."


class Card(TransformersEngine):
    """The CPU, taken for a GPU with so much memory."""

    free = 0

    def _fits(self, name: str, source: dict[str, object]) -> bool:
        self.device, device = torch.device("cuda:0"), self.device
        try:
            return super()._fits(name, source)
        finally:
            self.device = device


@pytest.mark.parametrize(("free", "is_spread"), [(9_000_000, False), (8_000_000, True)])
def test_a_model_is_spread_by_accelerate_only_where_it_does_not_fit(monkeypatch, caplog, free, is_spread):
    """1.74 million parameters of 4 bytes, in four fifths of what is free."""
    monkeypatch.setattr(hf, "_free_bytes", lambda device: free)
    load, asked = hf._load_model, []
    monkeypatch.setattr(hf, "_load_model", lambda *given: asked.append(given[2]) or load(*given))
    recipe = Recipe(model=str(MODEL), dtype="float32", max_new_tokens=24)
    engine = Card(recipe, Options(device="cpu", batch_size=5, device_map="auto"))
    with caplog.at_level(logging.INFO):
        engine.load()
    assert asked == [{"dtype": torch.float32} | ({"device_map": "auto"} if is_spread else {})]
    assert ("fits on cuda:0: it is not spread over all GPUs" in caplog.text) != is_spread
    assert texts(captions(engine, mixed_pictures())) == texts(captions(loaded(), mixed_pictures()))


def test_a_model_on_several_devices_is_decoded_in_static_batches(monkeypatch):
    engine = loaded()
    engine.loaded.model.hf_device_map = {"model.visual": 0, "model.language_model": 1}
    assert isinstance(engine._choose_decoder(), StaticDecoder)
