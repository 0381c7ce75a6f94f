"""The built wheel, installed alone, what each command imports, and what the documentation says of the commands."""

import importlib.util
import json
import os
import re
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing

import pytest
from places import ROOT
from samples import write_shard

from rococap import __version__, db, prompts
from rococap.cli.options import cli
from rococap.tables import SCHEMA

PACKAGE = ROOT / "rococap"
COMMANDS = sorted(cli.commands)


def run(*command, cwd, **environment):
    """Runs Python with these arguments, away from the checkout; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder, below):
    return {
        str(path.relative_to(below)) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }


# --- The wheel -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    [wheel] = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    run("-m", "pip", "install", *options, "--target", target, wheel, cwd=target)
    return target


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_migrations_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    migrations = {f"rococap/{name}" for name in files(ROOT / "migrations", ROOT)}
    assert held == files(PACKAGE, ROOT) | migrations
    assert {"rococap/migrations/env.py", "rococap/migrations/versions/0001_the_first_schema.py"} <= migrations


@pytest.mark.slow
def test_the_wheel_brings_the_demos_model(wheel):
    with zipfile.ZipFile(wheel) as archive:
        weights = archive.read("rococap/demo/model/model.safetensors")
    assert weights == (PACKAGE / "demo" / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_installed_package_brings_its_prompts(installed, tmp_path):
    listed = json.loads(run("-m", "rococap", "prompts", "--json", cwd=tmp_path, PYTHONPATH=str(installed)))
    assert [preset["name"] for preset in listed] == list(prompts.presets())


@pytest.mark.slow
def test_the_wheel_brings_its_licence_and_readme(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        [licence] = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        assert (ROOT / "README.md").read_text().strip() in archive.read(metadata).decode()


@pytest.mark.slow
def test_the_installed_package_is_the_one_that_is_tested(installed, tmp_path):
    places = "from rococap import db; print(db.__file__, db.migrations_dir())"
    assert run("-c", places, cwd=tmp_path, PYTHONPATH=str(installed)) == (
        f"{installed}/rococap/db.py {installed}/rococap/migrations\n"
    )


@pytest.mark.slow
def test_the_installed_package_creates_a_database(installed, tmp_path):
    def rococap(*command):
        return run("-m", "rococap", *command, cwd=tmp_path, PYTHONPATH=str(installed))

    assert rococap("--help").startswith("Usage: ")
    assert list(tmp_path.iterdir()) == []
    run("-c", "from rococap import db; db.connect(db.DEFAULT_URL)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert json.loads(rococap("status", "--json")) == {"runs": [], "workers": [], "versions": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["rococap.db"]
    with closing(sqlite3.connect(tmp_path / "rococap.db")) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(SCHEMA,)]
    assert rococap("migrate") == "The schema is up to date.\n"


@pytest.mark.slow
def test_the_installed_script_is_the_command(installed, tmp_path):
    script = str(installed / "bin" / "rococap")
    assert run(script, "--version", cwd=tmp_path, PYTHONPATH=str(installed)) == f"rococap, version {__version__}\n"


# --- Imports ---------------------------------------------------------------------------------------------------

IMPORTED = """
import json, sys
from rococap import __version__, prompts
from rococap.cli import cli

loaded = {}
for command in json.loads(sys.argv[1]):
    cli(command, prog_name="rococap", standalone_mode=False)
    loaded[" ".join(command)] = sorted(sys.modules)
print(json.dumps(loaded))
"""
WEB = {"fastapi", "starlette", "uvicorn"}
MODEL = {"torch", "torchvision", "transformers", "accelerate", "safetensors", "datasets"}


def test_only_workers_import_a_model_library(tmp_path):
    """One process runs them all; the first that loads too much fails, and all after it."""
    write_shard(tmp_path, "train", range(3))
    db.connect(f"sqlite:///{tmp_path}/rococap.db").dispose()
    lean = [["--help"], *([name, "--help"] for name in COMMANDS), ["status"], ["runs"], ["prompts"]]
    with_data = [
        ["enqueue", "--split", "train", "--dataset", str(tmp_path)],
        ["status"],
        ["export", "--split", "train"],
        ["export", "--split", "train", "--format", "imageclef", "--allow-missing"],
    ]
    out = run("-c", IMPORTED, json.dumps(lean + with_data), cwd=tmp_path)
    loaded = {command: set(modules) for command, modules in json.loads(out.splitlines()[-1]).items()}
    assert (tmp_path / "results_medical" / "medical_captions_train.csv").exists()
    assert {command: modules & MODEL for command, modules in loaded.items()} == {key: set() for key in loaded}
    assert {command for command, modules in loaded.items() if modules & WEB} == set()
    assert [" ".join(command) for command in lean if "pandas" in loaded[" ".join(command)]] == []


# --- The commands and the documentation ------------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name):
    text = cli.commands[name].help
    assert text
    assert text.split("\n")[0].endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_guide(name):
    assert re.search(rf"^\| `rococap {name}\b", (ROOT / "docs" / "guide.md").read_text(), re.MULTILINE)


def params(command):
    """The parameters of a command, or of all commands of a group."""
    return [one for each in (command, *getattr(command, "commands", {}).values()) for one in each.params]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_documentation_shows_no_command_or_option_that_does_not_exist(page):
    blocks = re.findall(r"^```console.*?^```", page.read_text(), re.MULTILINE | re.DOTALL)
    shown = re.findall(r"(?:^|\$ |&& )rococap(?: --db \S+)? ([a-z]\S*)([^#&\n]*)", "\n".join(blocks), re.MULTILINE)
    known = {name: {option for one in params(command) for option in one.opts} for name, command in cli.commands.items()}
    assert [name for name, _ in shown if name not in known] == []
    assert [
        (name, option)
        for name, rest in shown
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest)
        if option not in known[name]
    ] == []


def test_the_reference_of_commands_is_up_to_date():
    """`make docs` writes it."""
    script = importlib.util.spec_from_file_location("docs_cli", ROOT / "docs" / "cli.py")
    module = importlib.util.module_from_spec(script)
    script.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text() == module.text()


def test_every_failure_code_is_explained():
    operations = (ROOT / "docs" / "operations.md").read_text()
    table = operations[operations.index("## Failure codes") :]
    web = PACKAGE / "web"
    codes = codes_in(path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(web))
    assert len(codes) > 15
    assert {code for code in codes if f"`{code}`" not in table} == set()
    serving = (ROOT / "docs" / "serving.md").read_text()
    of_requests = codes_in(web.rglob("*.py")) - codes
    assert len(of_requests) > 5
    assert {code for code in of_requests if f"`{code}`" not in serving} == set()


def codes_in(paths):
    source = "\n".join(path.read_text() for path in sorted(paths))
    return {*re.findall(r"(?:PictureError|Failure)\(\s*\"(\w+)\"", source), *re.findall(r"\bcode=\"(\w+)\"", source)}


def test_the_symptoms_quote_messages_that_exist():
    operations = (ROOT / "docs" / "operations.md").read_text()
    section = operations[operations.index("## When something is wrong") : operations.index("## Failure codes")]
    cells = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
    quoted = [text for cell in cells for text in re.findall(r"`([^`]* [^`]*)`", cell)]
    source = "\n".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))
    source = re.sub(r"\"\s*\n\s*f?\"", "", source)  # a message on several lines
    parts = [part.strip() for text in quoted for part in text.split("…") if part.strip()]
    assert len(parts) > 10
    assert [part for part in parts if part not in source] == []


def test_the_readme_is_short_and_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 200
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} - {"docs/mutants.md"}
    assert {page for page in pages if f"({page})" not in readme} == set()


def test_the_promises_are_the_same_thirteen_wherever_they_are_listed():
    readme, operations = (ROOT / "README.md").read_text(), (ROOT / "docs" / "operations.md").read_text()
    in_full = operations[operations.index("## The promises in full") :]
    tests = (ROOT / "tests" / "test_promises.py").read_text()
    numbers = [str(number) for number in range(1, 14)]
    assert re.findall(r"^(\d+)\. ", readme, re.MULTILINE) == numbers
    assert re.findall(r"^(\d+)\. ", in_full, re.MULTILINE) == numbers
    assert sorted({int(number) for number in re.findall(r"def test_promise_(\d+)_", tests)}) == list(range(1, 14))
