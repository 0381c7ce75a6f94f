"""Adapters, quantised weights and spread models: each with the real demonstration model."""

import importlib.util
import json
import logging
import re
import shutil
from pathlib import Path

import engine_steps
import pytest
import torch
from adapters import beside, write_adapter
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from engine_steps import captions, error_of, mixed_pictures, texts
from families import FAMILIES
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from rococap.demo import MODEL
from rococap.engines import Options, hf, weights
from rococap.engines.continuous import ContinuousDecoder
from rococap.engines.files import folder_digest
from rococap.engines.hf import TransformersEngine
from rococap.engines.static import StaticDecoder
from rococap.errors import ModelError
from rococap.recipe import Recipe


def loaded(model: Path = MODEL, options: Options | None = None, **recipe: object) -> TransformersEngine:
    return engine_steps.loaded(model, options or Options(device="cpu", batch_size=5), **{"max_new_tokens": 24} | recipe)


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
        f"The adapter {other} was trained on Qwen/Qwen2-VL-7B-Instruct, not on {MODEL}. Name that model with "
        "--model or, if both are the same, enqueue a run with --adapter-base any"
    )
    path.write_text(json.dumps(config | {"target_modules": ["c_attn"], "base_model_name_or_path": None}))
    assert error_of(Recipe(model=str(MODEL), adapter=str(other))).startswith(
        f"The adapter {other} does not fit {MODEL}: "
    )


SPELLINGS = [
    "/home/trainer/.cache/modelscope/hub/models/Qwen/Qwen2___5-VL-7B-Instruct",
    "/home/trainer/.cache/modelscope/hub/models/Qwen--Qwen2.5-VL-7B-Instruct/snapshots/master",
    "/home/trainer/.cache/huggingface/hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/895c3a49bc3fa70a340399125",
    "/home/trainer/.cache/huggingface/hub/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/895c3a49bc3fa70a340399125/",
    "/data/models--Qwen--Qwen2.5-VL-7B-Instruct",
    "C:\\Users\\me\\models\\Qwen2.5-VL-7B-Instruct",
    "C:\\Users\\me\\.cache\\huggingface\\hub\\models--Qwen--Qwen2.5-VL-7B-Instruct\\snapshots\\895c3a49",
    "unsloth/Qwen2.5-VL-7B-Instruct-unsloth-bnb-4bit",
    "unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit",
    "someone/Qwen2.5-VL-7B-Instruct-bnb-8bit",
    "unsloth/qwen2.5-vl-7b-instruct",
    "/data/Qwen2.5-VL-7B-Instruct/",
]
OTHERS = [
    "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen2.5-VL-7B",
    "Qwen/Qwen2.5-VL-7B-Instruct-AWQ",
    "/home/trainer/.cache/huggingface/hub/models--Qwen--Qwen2-VL-7B-Instruct/snapshots/Qwen2.5-VL-7B-Instruct",
    "/home/trainer/checkpoints/final",
]


def named(adapter: Path, folder: Path, base: object) -> Path:
    """The same adapter, which says that it was trained on this."""
    copy = Path(shutil.copytree(adapter, folder))
    amend(copy / "adapter_config.json", base_model_name_or_path=base)
    return copy


def amend(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """The demonstration model under a name of the hub."""
    return Path(shutil.copytree(MODEL, tmp_path_factory.mktemp("models") / "Qwen2.5-VL-7B-Instruct"))


@pytest.fixture(scope="module")
def adapted(adapter) -> list[str]:
    return texts(captions(loaded(adapter=str(adapter)), mixed_pictures()[:4]))


@pytest.mark.parametrize("base", SPELLINGS)
def test_another_spelling_of_the_models_name_is_accepted_and_told_of(tmp_path, adapter, qwen, adapted, caplog, base):
    there = named(adapter, tmp_path / "adapter", base)
    with caplog.at_level(logging.INFO):
        engine = loaded(qwen, adapter=str(there))
    assert f"the adapter {there} was trained on {base}, assumed to be the same model as {qwen}" in caplog.text
    assert texts(captions(engine, mixed_pictures()[:4])) == adapted


@pytest.mark.parametrize("path", ["Qwen2___5-VL-7B-Instruct", "models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/895c"])
def test_the_model_itself_may_be_named_in_another_spelling(tmp_path, adapter, adapted, path):
    model = Path(shutil.copytree(MODEL, tmp_path / path))
    engine = loaded(model, adapter=str(named(adapter, tmp_path / "adapter", "Qwen/Qwen2.5-VL-7B-Instruct")))
    assert texts(captions(engine, mixed_pictures()[:4])) == adapted


@pytest.mark.parametrize("base", OTHERS)
def test_another_name_is_refused_unless_the_run_accepts_any(tmp_path, adapter, qwen, adapted, caplog, base):
    there = named(adapter, tmp_path / "adapter", base)
    assert error_of(Recipe(model=str(qwen), adapter=str(there))) == (
        f"The adapter {there} was trained on {base}, not on {qwen}. Name that model with --model or, if both "
        "are the same, enqueue a run with --adapter-base any"
    )
    engine = loaded(qwen, adapter=str(there), adapter_base="any")
    assert f"the adapter {there} was trained on {base}: applied to {qwen}, as the run requires" in caplog.text
    assert texts(captions(engine, mixed_pictures()[:4])) == adapted


def test_two_models_of_caches_whose_folders_have_one_name_are_two(tmp_path, adapter):
    model = Path(shutil.copytree(MODEL, tmp_path / "Qwen--Qwen2.5-VL-3B-Instruct" / "snapshots" / "master"))
    there = named(adapter, tmp_path / "adapter", "/home/trainer/models/Qwen--Qwen2.5-VL-7B-Instruct/snapshots/master")
    assert error_of(Recipe(model=str(model), adapter=str(there))).startswith(f"The adapter {there} was trained on ")


@pytest.mark.parametrize("base", ["", None])
def test_an_adapter_that_names_no_model_is_put_on_the_one_that_is_named(tmp_path, adapter, qwen, adapted, base):
    engine = loaded(qwen, adapter=str(named(adapter, tmp_path / "adapter", base)))
    assert texts(captions(engine, mixed_pictures()[:4])) == adapted


def test_shapes_must_fit_whatever_base_the_run_accepts(tmp_path, adapter):
    there = named(adapter, tmp_path / "adapter", "some/other")
    weights = load_file(there / "adapter_model.safetensors")
    narrow = {key: tensor[:, :64] if "lora_A" in key else tensor for key, tensor in weights.items()}
    save_file({key: tensor.contiguous() for key, tensor in narrow.items()}, there / "adapter_model.safetensors")
    message = error_of(Recipe(model=str(MODEL), adapter=str(there), adapter_base="any"))
    assert message.startswith(f"The adapter {there} does not fit {MODEL}: size mismatch for base_model.model.")
    assert "\n" not in message


def test_an_adapter_of_a_model_with_more_layers_is_refused(tmp_path, adapter):
    there = named(adapter, tmp_path / "adapter", "some/other")
    weights = load_file(there / "adapter_model.safetensors")
    deeper = {key.replace("layers.2", "layers.3"): tensor for key, tensor in weights.items() if "layers.2" in key}
    save_file(weights | {key: tensor.clone() for key, tensor in deeper.items()}, there / "adapter_model.safetensors")
    message = error_of(Recipe(model=str(MODEL), adapter=str(there), adapter_base="any"))
    assert message.startswith(
        f"The adapter {there} does not fit {MODEL}: the model has no place for 4 of its weights ("
    )
    assert message.endswith(" …). Name the model that it was trained on with --model.")


# --- as earlier releases of transformers named the weights -------------------------------------------------------

EARLIER = {
    "qwen2_vl": {"model.language_model": "model", "model.visual": "visual"},
    "qwen2_5_vl": {"model.language_model": "model", "model.visual": "visual"},
    "qwen3_vl": {"model.language_model": "model", "model.visual": "visual"},
    "internvl": {"model.language_model": "language_model.model", "model.vision_tower": "vision_tower"},
    "gemma3": {"model.language_model": "language_model.model", "model.vision_tower": "vision_tower.vision_model"},
}
TARGETS = {
    "qwen2_vl": ["q_proj", "v_proj", "qkv"],
    "qwen2_5_vl": ["q_proj", "v_proj", "qkv", "down_proj"],
    "qwen3_vl": ["q_proj", "linear_fc1"],
    "internvl": ["q_proj", "v_proj"],
    "gemma3": ["q_proj", "v_proj"],
}


def write_lora(folder: Path, model: Path, **settings: object) -> Path:
    """Of any model: weights large enough to change what it says."""
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(1)
    tuned = get_peft_model(base, LoraConfig(**{"r": 4, "init_lora_weights": False} | settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.mul_(4)
    tuned.save_pretrained(folder)
    return folder


def as_saved_earlier(adapter: Path, folder: Path, names: dict[str, str]) -> Path:
    copy = Path(shutil.copytree(adapter, folder))
    weights = load_file(copy / "adapter_model.safetensors")
    renamed = {with_earlier_name(key, names, "base_model.model."): tensor for key, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, copy / "adapter_model.safetensors")
    return copy


def with_earlier_name(key: str, names: dict[str, str], prefix: str = "") -> str:
    module = key.removeprefix(prefix)
    for now, then in names.items():
        if module.startswith(f"{now}."):
            return prefix + then + module.removeprefix(now)
    return key


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["merger"]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_every_kind_of_lora_with_earlier_names_says_the_same(tmp_path, settings):
    new = write_lora(tmp_path / "new", MODEL, **settings)
    old = as_saved_earlier(new, tmp_path / "old", EARLIER["qwen2_vl"])
    said = [texts(captions(loaded(adapter=str(one)), mixed_pictures()[:4])) for one in (new, old)]
    assert said[0] == said[1] != texts(captions(loaded(), mixed_pictures()[:4]))


@pytest.mark.parametrize("family", EARLIER)
def test_an_adapter_with_the_names_of_an_earlier_transformers_says_the_same(family, tmp_path):
    model = FAMILIES[family](tmp_path / "model")
    new = write_lora(tmp_path / "new", model, target_modules=TARGETS[family])
    old = as_saved_earlier(new, tmp_path / "old", EARLIER[family])
    images = mixed_pictures()[:4]
    plain, wanted, said = (
        texts(captions(loaded(model, **how), images)) for how in ({}, {"adapter": str(new)}, {"adapter": str(old)})
    )
    assert said == wanted
    assert said != plain


def test_the_names_of_an_earlier_transformers_hold_in_an_adapters_configuration_too(tmp_path):
    names = EARLIER["qwen2_vl"]
    modules = [f"model.language_model.layers.{layer}.self_attn.{one}_proj" for layer in range(3) for one in "qv"]
    patterns = {"rank_pattern": {modules[0]: 2}, "alpha_pattern": {modules[1]: 64, modules[0]: 3}}
    new = write_lora(tmp_path / "new", MODEL, target_modules=modules, **patterns)
    old = as_saved_earlier(new, tmp_path / "old", names)
    wanted = texts(captions(loaded(adapter=str(new)), mixed_pictures()[:4]))
    earlier = {
        name: {with_earlier_name(module, names): value for module, value in pattern.items()}
        for name, pattern in patterns.items()
    }
    for targets in ([with_earlier_name(module, names) for module in modules], r"^model\..*\.(q_proj|v_proj)$"):
        amend(old / "adapter_config.json", target_modules=targets, **earlier)
        assert texts(captions(loaded(adapter=str(old)), mixed_pictures()[:4])) == wanted


def test_a_pattern_over_the_earlier_names_puts_nothing_on_modules_that_it_did_not_mean(tmp_path):
    """`^model` was the language model, and is all of the model today."""
    model = FAMILIES["internvl"](tmp_path / "model")
    new = write_lora(tmp_path / "new", model, target_modules=r"^model\.language_model\..*(q_proj|v_proj)$")
    old = as_saved_earlier(new, tmp_path / "old", EARLIER["internvl"])
    amend(old / "adapter_config.json", target_modules=r".*model.*(q_proj|v_proj)$")
    images = mixed_pictures()[:4]
    wanted = texts(captions(loaded(model, adapter=str(new)), images))
    assert texts(captions(loaded(model, adapter=str(old)), images)) == wanted


def test_an_adapter_of_earlier_names_that_lacks_weights_is_refused(tmp_path, adapter):
    old = as_saved_earlier(adapter, tmp_path / "old", EARLIER["qwen2_vl"])
    amend(old / "adapter_config.json", target_modules=["q_proj", "v_proj", "k_proj"])
    assert error_of(Recipe(model=str(MODEL), adapter=str(old))).startswith(
        f"The adapter {old} does not fit {MODEL}: Found missing adapter keys"
    )


def test_an_adapter_in_a_pickle_with_earlier_names_says_the_same(tmp_path, adapter, adapted):
    old = as_saved_earlier(adapter, tmp_path / "old", EARLIER["qwen2_vl"])
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    assert texts(captions(loaded(adapter=str(old)), mixed_pictures()[:4])) == adapted


def test_an_adapter_that_changes_the_prompt_alone_is_refused(tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    PeftModel(base, PromptTuningConfig(num_virtual_tokens=2, token_dim=128, num_layers=3)).save_pretrained(tmp_path)
    assert error_of(Recipe(model=str(MODEL), adapter=str(tmp_path), adapter_base="any")) == (
        f"The adapter {tmp_path} does not fit {MODEL}: PROMPT_TUNING changes the prompt and not the weights. Name a "
        "LoRA."
    )


# --- beside a model's weights, or in their place -----------------------------------------------------------------


def test_an_adapter_beside_a_models_weights_is_told_of_and_not_put_on(tmp_path, adapter, caplog):
    model = beside(adapter, tmp_path / "merged")
    engine = loaded(model)
    images = mixed_pictures()[:4]
    assert texts(captions(engine, images)) == texts(captions(loaded(), images))
    assert (
        f"{model} comes with an adapter, which is not applied. If it was not merged into the weights, "
        f"enqueue a run with --adapter {model}"
    ) in caplog.text
    assert "adapter" not in engine.info.resolved()


def test_an_adapter_beside_a_models_weights_is_put_on_once_if_the_recipe_names_it(tmp_path, adapter, adapted, caplog):
    model = beside(adapter, tmp_path / "both")
    engine = loaded(model, adapter=str(model), adapter_base="any")
    assert texts(captions(engine, mixed_pictures()[:4])) == adapted
    assert "comes with an adapter, which is not applied" not in caplog.text


def test_another_adapter_than_the_one_beside_the_weights_is_put_on_alone(tmp_path, adapter, adapted, caplog):
    model = beside(write_adapter(tmp_path / "other", lora_alpha=64), tmp_path / "both")
    engine = loaded(model, adapter=str(adapter), adapter_base="any")
    assert texts(captions(engine, mixed_pictures()[:4])) == adapted
    assert "comes with an adapter, which is not applied" in caplog.text


def test_quantised_weights_get_no_adapter_that_lies_beside_them_either(tmp_path, adapter):
    engine = loaded(beside(adapter, tmp_path / "both"), load_in="4bit")
    assert texts(captions(engine, mixed_pictures()[:4])) == texts(
        captions(loaded(load_in="4bit"), mixed_pictures()[:4])
    )


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_in_the_place_of_a_model_is_refused_with_the_right_option(tmp_path, adapter, has_config):
    there = named(
        adapter, tmp_path / "adapter", "/home/trainer/.cache/huggingface/hub/models--Qwen--Qwen2-VL-2B/snapshots/1a2b"
    )
    if has_config:  # as some tools save it
        shutil.copy(MODEL / "config.json", there)
    assert error_of(Recipe(model=str(there))) == (
        f"{there} is an adapter, not a model. Name the model that it was trained on: --model Qwen/Qwen2-VL-2B "
        f"--adapter {there}"
    )
    amend(there / "adapter_config.json", base_model_name_or_path=None)
    assert error_of(Recipe(model=str(there))) == (
        f"{there} is an adapter, not a model. Name its model with --model: --adapter {there}"
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
        f"{tmp_path} is not an adapter: it has no adapter_config.json. Name a folder or hub id in PEFT's format."
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
    find = importlib.util.find_spec
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


def quantised(engine: TransformersEngine) -> set[str]:
    """The names of the layers that bitsandbytes quantised."""
    layers = engine.loaded.model.named_modules()
    return {name for name, layer in layers if isinstance(layer, Linear4bit | Linear8bitLt)}


IN_LANGUAGE_LAYERS = re.compile(r"model\.(language_model|text_model)\.layers\.\d+\.")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("family", ["demo", *FAMILIES])
def test_only_the_layers_of_the_language_model_are_quantised_in_every_family(tmp_path, family, bits, monkeypatch):
    monkeypatch.setattr(hf, "reduce_kernels", lambda model, device: None)  # which renames layers
    folder = MODEL if family == "demo" else FAMILIES[family](tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    engine = loaded(folder, load_in=bits)
    layers = {name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear)}
    inside = {name for name in layers if IN_LANGUAGE_LAYERS.match(name)}
    assert quantised(engine) == inside
    assert any("vis" in name for name in layers - inside)
    assert "lm_head" in layers - inside
    weights = dict(engine.loaded.model.named_parameters())
    for name, weight in plain.named_parameters():
        if name.rpartition(".")[0] not in inside:
            assert torch.equal(weights[name], weight), name
    said = captions(engine, mixed_pictures()[:4])
    assert all(caption.failure is None and caption.new_tokens > 1 for caption in said)
    assert len(set(texts(said))) == 4, "the picture must decide what is said"


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_that_the_head_shares_with_the_embeddings_stay_shared(bits):
    model = loaded(load_in=bits).loaded.model
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [None, "8bit", "4bit"])
def test_the_estimate_of_the_memory_is_what_the_weights_take(bits, dtype):
    engine = loaded(load_in=bits, dtype=dtype)
    source = {"revision": "main", "local_files_only": True, "trust_remote_code": False}
    parameters = engine.loaded.model.parameters()
    taken = sum(parameter.nbytes for parameter in parameters)
    assert weights.n_bytes(str(MODEL), source, engine.dtype, bits) == taken


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_weights_of_other_shapes_than_the_config_says_are_refused(tmp_path, bits):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    amend(folder / "config.json", text_config=config["text_config"] | {"intermediate_size": 512})
    assert error_of(Recipe(model=str(folder), load_in=bits)).startswith(
        f"{folder}: the weight model.language_model.layers.0.mlp.gate_proj.weight has the shape 384 x 128 in the file, "
        "but 512 x 128 in config.json"
    )


def test_an_adapter_goes_on_quantised_weights(adapter):
    engine = loaded(load_in="4bit", adapter=str(adapter))
    assert texts(captions(engine, mixed_pictures())) != texts(captions(loaded(load_in="4bit"), mixed_pictures()))


def test_a_model_is_spread_only_where_there_are_gpus():
    with pytest.raises(ModelError) as caught:
        loaded(options=Options(device="cpu", device_map="auto"))
    assert str(caught.value) == "--device-map auto spreads a model over GPUs, but there are none. Leave it out."


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
    load, asked = weights.load, []
    monkeypatch.setattr(weights, "load", lambda *given: asked.append(given[2]) or load(*given))
    recipe = Recipe(model=str(MODEL), dtype="float32", max_new_tokens=24)
    engine = Card(recipe, Options(device="cpu", batch_size=5, device_map="auto"))
    with caplog.at_level(logging.INFO):
        engine.load()
    assert asked == [{"dtype": torch.float32} | ({"device_map": "auto"} if is_spread else {})]
    assert ("fits on cuda:0, so it is not spread over all GPUs" in caplog.text) != is_spread
    assert texts(captions(engine, mixed_pictures())) == texts(captions(loaded(), mixed_pictures()))


def test_a_model_on_several_devices_is_decoded_in_static_batches(monkeypatch):
    engine = loaded()
    engine.loaded.model.hf_device_map = {"model.visual": 0, "model.language_model": 1}
    assert isinstance(engine._choose_decoder(), StaticDecoder)
