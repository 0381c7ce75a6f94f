"""The built wheel, installed alone, and what each command imports."""

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
    assert json.loads(rococap("status", "--json")) == {"runs": [], "workers": []}
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
    assert [" ".join(command) for command in lean if "pandas" in loaded[" ".join(command)]] == []


# --- The commands and the README -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name):
    text = cli.commands[name].help
    assert text
    assert text.split("\n")[0].endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name):
    assert re.search(rf"\brococap {name}\b", (ROOT / "README.md").read_text())


def test_the_readme_shows_no_command_that_does_not_exist():
    blocks = re.findall(r"^```.*?^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    shown = re.findall(r"^(?:\$ )?rococap(?: --db \S+)? ([a-z]\S*)", "\n".join(blocks), re.MULTILINE)
    assert sorted(set(shown) - set(COMMANDS)) == []
