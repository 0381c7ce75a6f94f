"""Chat templates: where they may lie, what they may lose, and the token that they end an answer with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_steps import captions, error_of, loaded, mixed_pictures, texts
from families import FAMILIES, PLACEHOLDERS
from transformers import AutoProcessor, GenerationConfig

from rococap.demo import MODEL
from rococap.engines import Options
from rococap.engines.checkpoint import end_tokens
from rococap.engines.hf import TransformersEngine
from rococap.engines.template import turn_end
from rococap.errors import ModelError
from rococap.recipe import Recipe

GOOD = (MODEL / "chat_template.jinja").read_text()
TEXT_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'text' %}"
    "{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
ADDS_STRINGS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
)
PRINTS_PARTS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
PRINTS_JSON = PRINTS_PARTS.replace("m['content']", "m['content'] | tojson")
NO_PROMPT = "{% for m in messages %}<|vision_start|><|image_pad|><|vision_end|><|im_end|>{% endfor %}"
TWO_PICTURES = GOOD.replace("<|image_pad|>", "<|image_pad|><|vision_end|><|vision_start|><|image_pad|>")
ADVICE = "Copy the chat template of the model that it was trained from, or name another with --model."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.fixture(scope="module")
def as_it_is() -> list[str]:
    return texts(captions(loaded(MODEL), mixed_pictures()[:4]))


def amend(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def place(folder: Path, file: str, template: Any) -> None:
    """Puts the template into that file, and leaves it nowhere else."""
    (folder / "chat_template.jinja").unlink()
    amend(folder / file, chat_template=template)


NAMED = [{"name": "tool_use", "template": TEXT_ONLY}, {"name": "default", "template": GOOD}]
PLACES = {
    "chat_template.json": ("chat_template.json", GOOD),
    "processor_config.json": ("processor_config.json", GOOD),
    "a string of the tokenizer": ("tokenizer_config.json", GOOD),
    "a list with a default": ("tokenizer_config.json", NAMED),
    "a list of one": ("tokenizer_config.json", [{"name": "vision", "template": GOOD}]),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_template_is_found_wherever_it_lies(folder, as_it_is, where):
    place(folder, *PLACES[where])
    assert texts(captions(loaded(folder), mixed_pictures()[:4])) == as_it_is


def test_of_several_templates_without_a_default_the_error_names_them(folder):
    place(folder, "tokenizer_config.json", [{"name": name, "template": GOOD} for name in ("vision", "rag")])
    assert error_of(Recipe(model=str(folder))) == (
        f"{folder} has several chat templates, none of which is its default: rag, vision. Copy the one that takes "
        "pictures to chat_template.jinja beside its config.json."
    )


BAD = {
    "text only": (TEXT_ONLY, "leaves the picture out."),
    "adds strings": (
        ADDS_STRINGS,
        'cannot take a picture and a prompt: TypeError: can only concatenate str (not "list") to str.',
    ),
    "prints parts": (PRINTS_PARTS, "renders the picture as text."),
    "prints JSON": (PRINTS_JSON, "renders the picture as text."),
    "no prompt": (NO_PROMPT, "leaves the prompt out."),
    "broken": (
        "{{ messages[ }}",
        "cannot take a picture and a prompt: TemplateSyntaxError: unexpected '}', expected ']'.",
    ),
    "refuses": (
        "{{ raise_exception('Only text is supported!') }}",
        "cannot take a picture and a prompt: TemplateError: Only text is supported!.",
    ),
    "undefined": (
        "{{ messages[0]['images'][0] }}",
        "cannot take a picture and a prompt: UndefinedError: 'dict object' has no attribute 'images'.",
    ),
    "divides": (
        "{{ 1 // 0 }}",
        "cannot take a picture and a prompt: ZeroDivisionError: integer division or modulo by zero.",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_template_that_cannot_ask_about_a_picture_is_named_with_what_to_do(folder, what):
    template, fault = BAD[what]
    (folder / "chat_template.jinja").write_text(template)
    assert error_of(Recipe(model=str(folder))) == (
        f"The chat template of {folder} (chat_template.jinja) {fault} {ADVICE}"
    )


def test_a_template_may_trim_a_prompt_and_join_its_lines(folder):
    path = folder / "chat_template.jinja"
    path.write_text(GOOD.replace("{{ part['text'] }}", "{{ part['text'].split() | join(' ') }}"))
    assert "What is it? Where is it?" in loaded(folder, prompt=" What is it?\n\nWhere is it?\n").prompt


@pytest.mark.parametrize(
    ("file", "template", "called"),
    [
        ("chat_template.json", TEXT_ONLY, "(chat_template.json)"),
        ("processor_config.json", TEXT_ONLY, "(processor_config.json)"),
        ("tokenizer_config.json", TEXT_ONLY, "(tokenizer_config.json)"),
        ("tokenizer_config.json", [{"name": "chat", "template": TEXT_ONLY}], "(tokenizer_config.json), 'chat'"),
    ],
)
def test_the_error_says_which_of_the_templates_it_is(folder, file, template, called):
    place(folder, file, template)
    assert error_of(Recipe(model=str(folder))) == (
        f"The chat template of {folder} {called} leaves the picture out. {ADVICE}"
    )


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_of_two_templates_the_error_names_the_one_that_transformers_takes(folder, file):
    amend(folder / file, chat_template=TEXT_ONLY)
    assert f"The chat template of {folder} ({file}) leaves" in error_of(Recipe(model=str(folder)))


def test_a_template_with_places_for_two_pictures_is_refused_before_any_picture(folder):
    (folder / "chat_template.jinja").write_text(TWO_PICTURES)
    message = error_of(Recipe(model=str(folder)))
    assert message.startswith(
        f"The processor of {folder} rejects pictures with the prompt that its chat template makes: "
    )
    assert message.endswith(ADVICE)
    assert "\n" not in message


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_template_that_drops_the_picture_is_refused_for_every_family(family, tmp_path):
    folder = FAMILIES[family](tmp_path)
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("{%- if part['type'] == 'image' -%}", "{%- if false -%}"))
    assert "leaves the picture out." in error_of(Recipe(model=str(folder)))


@pytest.mark.parametrize(("family", "token"), [(family, one) for family in FAMILIES for one in PLACEHOLDERS[family]])
def test_a_prompt_that_holds_a_token_for_a_picture_is_refused(family, token, tmp_path):
    folder = FAMILIES[family](tmp_path)
    assert error_of(Recipe(model=str(folder), prompt=f"Describe {token} in detail.")) == (
        f"prompt contains {token}, which {folder} would take for one more picture. Leave it out: the chat "
        "template inserts the picture by itself."
    )


# --- ends ------------------------------------------------------------------------------------------------------


def processor_of(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)


def ends_of(folder: Path, **config: Any) -> set[str]:
    processor = processor_of(folder)
    ends = end_tokens(GenerationConfig(**config), processor, str(folder))
    return set(processor.tokenizer.convert_ids_to_tokens(ends))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_generation_stops_at_the_end_of_the_turn_whatever_config_and_tokenizer_call_the_end(family, tmp_path):
    folder = FAMILIES[family](tmp_path)
    end = processor_of(folder).tokenizer.eos_token
    assert end != "<|endoftext|>"
    amend(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert ends_of(folder, eos_token_id=560) == {"<|endoftext|>", end}


@pytest.mark.parametrize(
    ("config", "tokenizer", "ends"),
    [
        ({"eos_token_id": 560}, "<|im_end|>", {"<|endoftext|>", "<|im_end|>"}),
        ({"eos_token_id": [560, 562]}, "<|im_end|>", {"<|endoftext|>", "<|im_end|>"}),
        ({"eos_token_id": "<|endoftext|>"}, "<|im_end|>", {"<|endoftext|>", "<|im_end|>"}),
        ({}, "<|endoftext|>", {"<|endoftext|>", "<|im_end|>"}),
        ({}, None, {"<|im_end|>"}),
        ({"eos_token_id": 565}, "<|vision_end|>", {"<|vision_pad|>", "<|vision_end|>", "<|im_end|>"}),
    ],
)
def test_every_end_that_a_file_names_is_one(folder, config, tokenizer, ends):
    amend(folder / "tokenizer_config.json", eos_token=tokenizer)
    assert ends_of(folder, **config) == ends


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (GOOD, "<|im_end|>"),
        (GOOD.replace("<|im_end|>", "{{ eos_token }}"), "<|im_end|>"),
        (GOOD.replace("<|im_end|>", "\n\n<|endoftext|>"), "<|endoftext|>"),
        (GOOD.replace("<|im_end|>", "{% if not loop.last %}<|im_end|>{% endif %}"), "<|im_end|>"),
        (GOOD.replace("<|im_end|>", ""), "<|im_start|>"),  # of the next question
        (ADDS_STRINGS, None),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[0]['role'] }}<|im_end|>", None),
    ],
)
def test_the_end_of_a_turn_is_the_first_special_token_after_an_answer(folder, template, end):
    (folder / "chat_template.jinja").write_text(template)
    processor = processor_of(folder)
    wanted = None if end is None else processor.tokenizer.convert_tokens_to_ids(end)
    assert turn_end(processor, str(folder)) == wanted


def test_a_model_that_names_no_end_anywhere_is_refused(folder):
    amend(folder / "tokenizer_config.json", eos_token=None)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['role'] }}")
    with pytest.raises(ModelError) as caught:
        ends_of(folder)
    assert str(caught.value) == (
        f"{folder} names no token that ends a caption. Copy the eos_token_id from its base model."
    )


@pytest.mark.parametrize("decode", ["continuous", "static"])
def test_captions_end_where_they_did_when_the_generation_config_names_another_end(folder, as_it_is, decode):
    amend(folder / "generation_config.json", eos_token_id=560)
    recipe = Recipe(model=str(folder), dtype="float32", max_new_tokens=64)
    engine = TransformersEngine(recipe, Options(device="cpu", batch_size=4, decode=decode))
    engine.load()
    said = captions(engine, mixed_pictures()[:4])
    assert texts(said) == as_it_is
    assert {one.finish_reason for one in said} == {"stop"}
