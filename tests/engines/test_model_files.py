"""What a model's files say before anything is loaded, in a folder and in the hub's cache."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from adapters import beside
from adapters import write_adapter as write_lora
from families import FAMILIES, PLACEHOLDERS
from huggingface_hub import constants
from places import TESTS
from samples import write_shard
from steps import refused, said

from rococap import db, queue
from rococap.demo import MODEL
from rococap.engines import files
from rococap.errors import ModelError

COMMIT = "895c3a49bc3fa70a340399125c650a463535e71c"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def dataset() -> str:
    write_shard(Path("set"), "train", range(5))
    return "set"


def write_adapter(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | config))
    (folder / "adapter_model.safetensors").touch()
    return folder


def enqueue(*more: str) -> str:
    return said("enqueue", "--split", "train", "--dataset", "set", "--model", str(MODEL), *more)


def refusal(dataset: str, model: str | Path, *more: str, code: int = 1) -> str:
    message = refused("enqueue", "--split", "train", "--dataset", dataset, "--model", str(model), *more, code=code)
    with db.transaction(db.connect("sqlite:///rococap.db")) as conn:
        assert queue.list_runs(conn) == [], "it was registered all the same"
    return message


def in_the_cache(cache: Path, model: str, folder: Path) -> Path:
    """A model's folder as a download leaves it."""
    repo = cache / f"models--{model.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, repo / "snapshots" / COMMIT))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# --- folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "the model that it was trained on: --model Qwen/Qwen2.5-VL-7B-Instruct"),
        (
            f"/home/trainer/.cache/huggingface/hub/models--Qwen--Qwen2-VL-2B-Instruct/snapshots/{COMMIT}",
            "the model that it was trained on: --model Qwen/Qwen2-VL-2B-Instruct",
        ),
        ("/home/me/base", "the model that it was trained on: --model /home/me/base"),
        ("/home/me/my base", "the model that it was trained on: --model '/home/me/my base'"),
        (None, "its model with --model:"),
    ],
)
def test_an_adapter_given_as_a_model_is_refused_with_the_option_for_it(dataset, tmp_path, base, told):
    folder = write_adapter(tmp_path / "lora", base_model_name_or_path=base)
    expected = f"{folder} is an adapter, not a model. Name {told} --adapter {folder}"
    assert refusal(dataset, folder) == expected
    shutil.copy(MODEL / "config.json", folder)
    assert refusal(dataset, folder) == expected, "a config.json beside it makes no model of it"


def test_a_model_with_an_adapter_beside_its_weights_is_registered(dataset, tmp_path):
    folder = Path(shutil.copytree(MODEL, tmp_path / "both"))
    write_adapter(folder)
    assert said("enqueue", "--split", "train", "--dataset", dataset, "--model", str(folder)).startswith("default train")


@pytest.mark.parametrize("below", [None, "checkpoint-500", "my (last) one", f"snapshots/{COMMIT}"])
def test_a_folder_that_holds_no_model_is_refused_with_the_one_below_it(dataset, tmp_path, below):
    folder = tmp_path / "output"
    folder.mkdir()
    if below is not None:
        shutil.copytree(MODEL, folder / below)
    told = "Name another folder, or a hub id, with --model." if below is None else None
    told = told or f"Name the one below it: --model {shlex.quote(str(folder / below))}"
    assert refusal(dataset, folder) == f"The folder {folder} contains no model: it has no config.json. {told}"


@pytest.mark.parametrize("content", ["", "no json", '{"model_type": '])
def test_a_config_that_is_no_json_is_refused_when_a_run_is_registered(dataset, tmp_path, content):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / "config.json").write_text(content)
    assert refusal(dataset, folder).startswith(f"{folder / 'config.json'} is not valid JSON (")


def test_an_adapter_folder_that_is_damaged_is_named(dataset, tmp_path):
    folder = write_adapter(tmp_path / "lora")
    (folder / "adapter_config.json").write_text("[]")
    assert refusal(dataset, folder) == (
        f"{folder / 'adapter_config.json'} is damaged: it contains no JSON object. Copy or download it again."
    )


# --- the base of an adapter ------------------------------------------------------------------------------------


def recipe_of(run: str) -> dict[str, object]:
    with db.transaction(db.connect("sqlite:///rococap.db")) as conn:
        return json.loads(queue.get_run(conn, run).recipe.to_json())


def test_a_run_says_that_its_adapter_may_be_of_a_model_by_another_name(dataset, tmp_path):
    adapter = str(write_adapter(tmp_path / "lora"))
    enqueue("--adapter", adapter, "--adapter-base", "any")
    assert recipe_of("default")["adapter_base"] == "any"
    enqueue("--adapter", adapter, "--run", "strict")
    assert "adapter_base" not in recipe_of("strict")


def test_the_base_of_no_adapter_is_a_usage_error(dataset):
    message = refusal(dataset, MODEL, "--adapter-base", "any", code=2)
    assert message.endswith("--adapter-base goes with an adapter: name one with --adapter.")


def test_a_run_from_another_takes_its_adapter_on_a_base_of_any_name(dataset, tmp_path):
    adapter = str(write_adapter(tmp_path / "lora"))
    enqueue("--adapter", adapter)
    said("enqueue", "--run", "again", "--from", "default", "--adapter-base", "any")
    assert (recipe_of("again")["adapter"], recipe_of("again")["adapter_base"]) == (adapter, "any")
    enqueue("--run", "plain")
    message = refused("enqueue", "--run", "new", "--from", "plain", "--adapter-base", "any", code=2)
    assert message.endswith("name one with --adapter.")


# --- prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "token"), [(family, one) for family in FAMILIES for one in PLACEHOLDERS[family]])
def test_a_prompt_that_holds_a_token_for_a_picture_is_refused_when_it_is_registered(dataset, tmp_path, family, token):
    folder = FAMILIES[family](tmp_path / family)
    assert refusal(dataset, folder, "--prompt", f"Describe {token}.") == (
        f"prompt contains {token}, which {folder} would take for one more picture. Leave it out: the chat "
        "template inserts the picture by itself."
    )


@pytest.mark.parametrize("prompt", ["Is there an <image>?", "Describe it <b>well</b>.", "im_end |image_pad| <|x|>"])
def test_other_signs_in_a_prompt_are_text(dataset, prompt):
    assert enqueue("--prompt", prompt) == "default train: 5 new, 0 known, 0 changed\n"


@pytest.mark.parametrize("gone", ["tokenizer.json", "tokenizer_config.json"])
def test_either_file_of_a_tokenizer_tells_its_tokens(tmp_path, gone):
    """Published folders list them in both, or in one of them."""
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    listed = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = {str(token["id"]): {"content": token["content"]} for token in listed}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    (folder / gone).unlink()
    assert files.placeholders(str(folder), "main") >= {"<|image_pad|>", "<|video_pad|>"}


def test_a_model_in_the_hubs_cache_is_looked_into(dataset, cache):
    in_the_cache(cache, "nobody/demo", MODEL)
    assert refusal(dataset, "nobody/demo", "--prompt", "<|image_pad|> What is it?").startswith(
        "prompt contains <|image_pad|>, which nobody/demo would take for one more picture."
    )


def test_a_model_that_is_not_there_yet_is_registered_whatever_the_prompt_holds(dataset, cache):
    assert said(
        "enqueue", "--split", "train", "--dataset", dataset, "--model", "nobody/new", "--prompt", "<|image_pad|>"
    )


def test_of_a_files_tokens_only_the_prompt_is_asked(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"image_token_id": 3, "video_token_id": "x"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"image_token": {"content": "[IMG]"}}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<picture>": 3, "<other>": 4}))
    assert files.placeholders(str(tmp_path), "main") - {""} == {"[IMG]", "<picture>"}
    files.refuse_placeholders("<other>", {"[IMG]", "", "\n"}, "a model")
    with pytest.raises(ModelError, match=r"^prompt contains \[IMG\], which a model would take"):
        files.refuse_placeholders("a\n[IMG]", {"[IMG]", "", "\n"}, "a model")


def test_a_run_is_registered_without_torch_and_transformers(dataset, tmp_path):
    code = (
        "import sys; from rococap.cli import cli\n"
        f"cli(['enqueue', '--split', 'train', '--dataset', 'set', '--model', {str(MODEL)!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- as the hub's cache has them, loaded -------------------------------------------------------------------------

LOAD = """
import sys, torch
from rococap.demo.phantoms import draw
from rococap.engines import Options, load_engine
from rococap.recipe import Recipe
sys.path.insert(0, sys.argv[1])
from engine_steps import captions, texts
recipe = Recipe(model="nobody/demo", dtype="float32", max_new_tokens=24)
engine = load_engine(recipe, Options(device="cpu", batch_size=4))
engine.load()
print(texts(captions(engine, [draw(seed).image.convert("RGB") for seed in range(3)])))
print(engine.info.resolved())
"""


def load(cache: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", LOAD, str(TESTS)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_an_adapter_beside_the_weights_on_the_hub_is_not_put_on(tmp_path):
    in_the_cache(tmp_path / "plain", "nobody/demo", MODEL)
    in_the_cache(tmp_path / "both", "nobody/demo", beside(write_lora(tmp_path / "lora"), tmp_path / "model"))
    plain, both = load(tmp_path / "plain"), load(tmp_path / "both")
    assert both.stdout == plain.stdout != ""
    assert "nobody/demo comes with an adapter, which is not applied." in both.stderr


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_on_the_hub_given_as_a_model_is_refused_where_its_base_would_be_loaded(tmp_path, has_config):
    folder = write_adapter(tmp_path / "lora", base_model_name_or_path=str(MODEL))
    if has_config:
        shutil.copy(MODEL / "config.json", folder)
    in_the_cache(tmp_path / "hub", "nobody/demo", folder)
    done = load(tmp_path / "hub")
    assert done.stderr.splitlines()[-1] == (
        "rococap.errors.ModelError: nobody/demo is an adapter, not a model. Name the model that it was trained on: "
        f"--model {MODEL} --adapter nobody/demo"
    )
