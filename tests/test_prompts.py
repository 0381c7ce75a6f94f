"""Prompts by name, from files, and those that no run may have."""

import json
import re
from pathlib import Path

import pytest
from samples import fill, register, write_shard
from steps import refused, said

from rococap import db, prompts, queue
from rococap.errors import RococapError, RunError
from rococap.recipe import DEFAULT_PROMPT, Recipe, refuse_placeholders

GUIDE = {
    "detailed": "Describe this medical image in detail.",
    "pathology": "What pathological findings are visible in this medical image?",
    "anatomy": "Identify all anatomical structures visible in this medical image.",
    "diagnosis": "What is the likely diagnosis based on this medical imaging study?",
    "structured": "List imaging modality, anatomical region, and key findings in this medical image.",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def enqueue(*more: str) -> tuple[str, ...]:
    return ("enqueue", "--split", "train", "--dataset", "set", *more)


def stored_prompt(run: str = "default") -> str:
    with db.transaction(db.connect("rococap.db")) as conn:
        return queue.get_run(conn, run).recipe.prompt


# --- the presets -----------------------------------------------------------------------------------------------


def test_the_presets_are_those_of_the_guide_a_caption_and_findings():
    known = prompts.presets()
    assert {name: known[name].prompt for name in GUIDE} == GUIDE
    assert known.keys() - GUIDE.keys() == {"caption", "findings"}
    assert known["detailed"].prompt == DEFAULT_PROMPT


def test_every_preset_says_what_it_is_for_in_a_line_and_makes_a_recipe():
    for name, preset in prompts.presets().items():
        assert preset.name == name
        assert re.fullmatch(r"[^\n]+\.", preset.about)
        assert preset.prompt == preset.prompt.strip()
        assert Recipe(prompt=preset.prompt).prompt == preset.prompt


def test_a_users_presets_are_added_and_replace_ours_of_the_same_name(here):
    path = here / "mine.toml"
    path.write_text('[detailed]\nprompt = "Mine."\n[size]\nabout = "Größe."\nprompt = "How {large}?"\n', "utf-8")
    mine = prompts.presets(path)
    assert (mine["detailed"].prompt, mine["detailed"].about) == ("Mine.", "")
    assert mine["size"] == prompts.Preset("size", "How {large}?", "Größe.")
    assert list(mine) == [*prompts.presets(), "size"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[size]\nprompt = How?",
            "is not TOML (Invalid value (at line 2, column 10)). "
            'Write each preset as [name], and below it: prompt = "…"',
        ),
        ('prompt = "How?"', ": 'prompt' is not a preset. Write it as [prompt], and below it: prompt = \"…\""),
        ('[size]\nabout = "x"', ": preset 'size' has no prompt. Write below it: prompt = \"…\""),
        (
            '[size]\nprompt = "x"\nmodel = "y"\ntext = 1',
            ": preset 'size' has unknown keys (model, text). Keep only prompt and about.",
        ),
        ("[size]\nprompt = 7", ": preset 'size': prompt is not text. Put it in quotes."),
        ('[size]\nprompt = "x"\nabout = ["y"]', ": preset 'size': about is not text. Put it in quotes."),
        ('[size]\nprompt = "x"\nabout = "y\\nz"', ": preset 'size': about spans several lines. Make it one line."),
        ('[size]\nprompt = " "', ": preset 'size': prompt is empty"),
        (
            '[size]\nprompt = "Better than {caption}?"',
            ": preset 'size': prompt contains {caption}, which would give the model the answer. Remove it.",
        ),
    ],
)
def test_a_file_that_holds_something_else_is_refused_with_what_to_write(here, text, message):
    (here / "mine.toml").write_text(text)
    told = refused("prompts", "--prompts", "mine.toml")
    assert told.removeprefix("mine.toml").lstrip() == message.lstrip()


def test_a_file_that_cannot_be_read_is_refused(here):
    assert refused("prompts", "--prompts", "no.toml") == (
        "no.toml cannot be read (No such file or directory). Name another file."
    )
    (here / "latin.toml").write_bytes('[x]\nprompt = "Größe?"'.encode("latin-1"))
    assert refused("prompts", "--prompts", "latin.toml") == (
        "latin.toml is not UTF-8 (invalid start byte at byte 16). Save it as UTF-8."
    )


def test_prompts_are_listed_within_80_columns_and_as_json(here, monkeypatch):
    told = said("prompts")
    assert told.startswith(
        "detailed: Everything that is visible; the default of a run.\n  Describe this medical image in detail.\n"
    )
    assert max(map(len, told.splitlines())) <= 80
    assert json.loads(said("prompts", "--json"))[0] == {
        "name": "detailed",
        "prompt": "Describe this medical image in detail.",
        "about": "Everything that is visible; the default of a run.",
    }
    (here / "mine.toml").write_text('[size]\nprompt = "How large?"\n')
    assert said("prompts", "--prompts", "mine.toml").endswith("size\n  How large?\n")
    monkeypatch.setenv("ROCOCAP_PROMPTS", "mine.toml")
    assert said("prompts").endswith("size\n  How large?\n")


# --- enqueue ---------------------------------------------------------------------------------------------------


def test_a_run_asks_by_a_presets_name(here, monkeypatch):
    write_shard(here / "set", "train", range(2))
    said(*enqueue())
    assert stored_prompt() == DEFAULT_PROMPT
    said(*enqueue("--run", "anatomy", "--preset", "anatomy"))
    assert stored_prompt("anatomy") == GUIDE["anatomy"]
    (here / "mine.toml").write_text('[size]\nprompt = "How large?"\n')
    said(*enqueue("--run", "size", "--preset", "size", "--prompts", "mine.toml"))
    assert stored_prompt("size") == "How large?"
    monkeypatch.setenv("ROCOCAP_PROMPTS", "mine.toml")
    said(*enqueue("--run", "again", "--preset", "size"))
    assert stored_prompt("again") == "How large?"


def test_an_unknown_preset_is_refused_with_those_that_exist(here):
    assert refused(*enqueue("--preset", "size")) == (
        "There is no preset 'size'. Presets: detailed, caption, findings, structured, pathology, anatomy, "
        "diagnosis. See: rococap prompts"
    )


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"How large?", "How large?"),
        (b"How large?\n", "How large?"),
        (b"How large?\r\n", "How large?"),
        (b" One.\r\nTwo: {x}\n\n", " One.\r\nTwo: {x}\n"),
        ("\ufeffGröße?\n".encode(), "Größe?"),
    ],
)
def test_a_files_prompt_is_its_text_without_the_newline_at_its_end(here, content, prompt):
    write_shard(here / "set", "train", range(2))
    (here / "prompt.txt").write_bytes(content)
    said(*enqueue("--prompt-file", "prompt.txt"))
    assert stored_prompt() == prompt


def test_a_file_without_a_prompt_is_refused(here):
    assert refused(*enqueue("--prompt-file", "no.txt")) == (
        "no.txt cannot be read (No such file or directory). Name another file."
    )
    assert refused(*enqueue("--prompt-file", ".")) == ". cannot be read (Is a directory). Name another file."
    (here / "empty.txt").write_text("\n \n")
    assert refused(*enqueue("--prompt-file", "empty.txt")) == "empty.txt contains no prompt: write one into it."
    (here / "binary.txt").write_bytes(b"\xff\xfe")
    assert refused(*enqueue("--prompt-file", "binary.txt")) == (
        "binary.txt is not UTF-8 (invalid start byte at byte 0). Save it as UTF-8."
    )


@pytest.mark.parametrize(
    "ways",
    [
        ("--prompt", "What?", "--preset", "anatomy"),
        ("--prompt", DEFAULT_PROMPT, "--prompt-file", "x"),
        ("--preset", "anatomy", "--prompt-file", "x"),
    ],
)
def test_only_one_way_says_the_prompt(ways):
    assert refused(*enqueue(*ways), code=2) == (
        "--prompt, --preset and --prompt-file exclude one another: give only one of them."
    )


def test_an_empty_prompt_is_a_usage_error_and_not_the_default():
    assert refused(*enqueue("--prompt", ""), code=2) == "prompt is empty"


# --- placeholders ----------------------------------------------------------------------------------------------

ANSWER = "prompt contains {%s}, which would give the model the answer. Remove it."
SAME = "prompt contains {%s}, but every picture gets the same prompt. Remove it, or write it without braces."


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Improve: {caption}", ANSWER % "caption"),
        ("Improve: { caption\t}", ANSWER % "caption"),
        ("Improve: {{original_caption}}", ANSWER % "original_caption"),
        ("{\noriginal_caption } of {split}", ANSWER % "original_caption"),
        ("Describe {image_id}.", SAME % "image_id"),
        ("Of { split }?", SAME % "split"),
        ("Concepts: {cui}", SAME % "cui"),
    ],
)
def test_a_prompt_that_asks_for_a_column_of_the_row_is_refused(prompt, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refuse_placeholders(prompt)
    assert refused(*enqueue("--prompt", prompt), code=2) == message


@pytest.mark.parametrize("prompt", ["{}", "{x}", 'Answer as {"finding": …}', "{captions}", "caption", "{ a caption }"])
def test_other_braces_are_text(prompt):
    refuse_placeholders(prompt)


@pytest.mark.every_database
def test_no_run_is_registered_with_such_a_prompt_by_whatever_way(database, tmp_path):
    write_shard(tmp_path / "set", "train", range(2))
    with pytest.raises(RunError) as error:
        register(database, tmp_path / "set", ["train"], run="x", recipe=Recipe(prompt="Improve: {caption}"))
    assert str(error.value) == f"Run 'x' cannot be created: {ANSWER % 'caption'}"
    with db.transaction(database) as conn:
        assert queue.list_runs(conn) == []


@pytest.mark.every_database
def test_a_run_of_an_older_database_that_has_such_a_prompt_goes_on(database, tmp_path):
    fill(database, tmp_path / "set", 2)
    old = Recipe(model="tests/small", prompt="Improve: {caption}")
    with db.transaction(database, write=True) as conn:
        db.execute(conn, "UPDATE runs SET recipe = ?, recipe_hash = ?", (old.to_json(), old.hash))
    with db.transaction(database) as conn:
        assert [run.recipe for run in queue.list_runs(conn)] == [old]
        assert [one.pending for one in queue.counts(conn)] == [2]
    assert register(database, tmp_path / "set", ["train"], recipe=old)[0].known == 2


def test_errors_are_of_the_kind_that_the_command_line_tells():
    with pytest.raises(RococapError):
        prompts.presets(Path("no.toml"))
