import json
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

from rococap.recipe import Recipe

OTHER = {
    "model": "Qwen/Qwen2-VL-7B-Instruct",
    "revision": "895c3a4",
    "adapter": "adapters/rocov2",
    "prompt": "What does this picture show?",
    "max_new_tokens": 64,
    "min_pixels": 784,
    "max_pixels": 401_408,
    "dtype": "float32",
    "repetition_penalty": 1.05,
    "trust_remote_code": True,
    "load_in": "4bit",
    "adapter_base": "any",
    "frame": 2,
}


def refusal(**values):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what the tests compare
        Recipe(**values)
    return str(caught.value)


def test_the_default_recipe_is_the_one_that_existing_runs_were_made_with():
    """Another hash would orphan every run in every database: a new field needs a migration of stored recipes."""
    assert json.loads(Recipe().to_json()) == {
        "model": "Qwen/Qwen2-VL-2B-Instruct",
        "revision": "main",
        "adapter": None,
        "prompt": "Describe this medical image in detail.",
        "max_new_tokens": 256,
        "min_pixels": 3136,
        "max_pixels": 1003520,
        "dtype": "auto",
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    assert Recipe().hash == "99f6f5cc5643e35e56e1abf25e4dfd389575911816dfdd67e96432738ce57321"


def test_equal_recipes_have_equal_hashes():
    assert Recipe(**OTHER) == Recipe(**dict(reversed(OTHER.items())))
    assert Recipe(**OTHER).hash == Recipe(**dict(reversed(OTHER.items()))).hash


def test_each_field_changes_the_hash():
    assert list(OTHER) == [field.name for field in fields(Recipe) if field.init]
    hashes = {Recipe().hash} | {replace(Recipe(), **{name: value}).hash for name, value in OTHER.items()}
    assert len(hashes) == 1 + len(OTHER)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(**OTHER), Recipe(prompt='Größe in "mm"?\n↯ 图\0')])
def test_a_recipe_survives_json(recipe):
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.hash == recipe.hash


def test_json_is_sorted_and_readable():
    text = Recipe(**OTHER | {"prompt": "Größe?"}).to_json()
    assert list(json.loads(text)) == sorted(field.name for field in fields(Recipe))
    assert '"prompt": "Größe?"' in text


def test_json_is_checked_like_any_other_recipe():
    broken = json.dumps({**asdict(Recipe()), "max_new_tokens": 0})
    with pytest.raises(ValueError, match=r"^max_new_tokens must be at least 1, not 0$"):
        Recipe.from_json(broken)


@pytest.mark.parametrize(
    ("name", "value"), [("do_sample", True), ("num_beams", 4), ("temperature", 0.7), ("top_p", 0.9), ("top_k", 20)]
)
def test_the_constants_of_greedy_decoding_are_part_of_the_json_and_nothing_else_is_accepted(name, value):
    stored = json.loads(Recipe(**OTHER).to_json())
    assert stored[name] == asdict(Recipe())[name]
    with pytest.raises(ValueError, match=rf"^{name} must be .*, not {value}: captions are decoded greedily$"):
        Recipe.from_json(json.dumps(stored | {name: value}))
    with pytest.raises(TypeError):
        Recipe(**{name: value})


def test_equal_recipes_have_no_differences():
    assert Recipe(**OTHER).differences(Recipe(**OTHER)) == {}


def test_differences_name_each_field_with_both_values():
    assert Recipe().differences(Recipe(prompt="What?", repetition_penalty=1.1)) == {
        "prompt": ("Describe this medical image in detail.", "What?"),
        "repetition_penalty": (1.0, 1.1),
    }
    assert Recipe(**OTHER).differences(Recipe()) == {
        name: (value, getattr(Recipe(), name)) for name, value in OTHER.items()
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n\t"}, "prompt is empty"),
        ({"prompt": "What?\udcff"}, "prompt is not valid Unicode"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": -5}, "max_new_tokens must be at least 1, not -5"),
        ({"min_pixels": 0}, "min_pixels (0) must be positive and at most max_pixels (1003520)"),
        ({"min_pixels": 785, "max_pixels": 784}, "min_pixels (785) must be positive and at most max_pixels (784)"),
        ({"load_in": "2bit"}, "load_in must be one of 8bit, 4bit, not 2bit"),
        ({"adapter_base": "Qwen2"}, "adapter_base must be any, not Qwen2"),
        ({"frame": 0}, "frame must be at least 1, not 0"),
        ({"dtype": "int8"}, "dtype must be one of auto, bfloat16, float16, float32, not int8"),
    ],
)
def test_what_no_model_could_follow_is_refused(values, message):
    assert refusal(**values) == message


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 1}, {"min_pixels": 1, "max_pixels": 1}, {"min_pixels": 784, "max_pixels": 784}]
)
def test_the_least_that_makes_sense_is_taken(values):
    assert asdict(Recipe(**values)) == {**asdict(Recipe()), **values}


def test_a_recipe_cannot_be_changed():
    recipe = Recipe()
    with pytest.raises(FrozenInstanceError):
        recipe.prompt = "Another."
