"""Scores that others wrote stand beside ours, and whatever goes wrong in them is told and stops nothing."""

import json
import os
import re
import shlex
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import steps
from samples import caption, fill, texts
from sqlalchemy import Engine

from rococap.errors import RococapError
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.scores import evaluate, metrics, plugins
from rococap.scores.evaluate import NotComputed, Pair

N = 6
CAPTIONS = [f"Original caption {n}." for n in range(4)] + ["A scan.", ""]

JACCARD = '''
from pathlib import Path

def jaccard(captions, references):
    """Words in common by words in either text."""
    with Path("calls").open("a") as file:
        file.write(f"{len(captions)}\\n")
    pairs = [(set(one.split()), set(other.split())) for one, other in zip(captions, references, strict=True)]
    return [len(one & other) / len(one | other) for one, other in pairs]
'''


@pytest.fixture(autouse=True)
def no_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "open_wordnet", lambda: SimpleNamespace(synsets=lambda word: []))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which plug-ins are found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


NUMBERS = count()


@pytest.fixture
def module(here: Path):
    """Writes a module of another name at each call, since Python imports each name once."""

    def write(source: str) -> str:
        name = f"plugin_{next(NUMBERS)}"
        (here / f"{name}.py").write_text(source)
        return name

    return write


@pytest.fixture
def run(database: Engine, tmp_path: Path) -> Run:
    run = fill(database, tmp_path / "set", N)
    caption(database, run, texts(*CAPTIONS))
    return run


def pairs(n: int, text: str = "Axial CT.") -> list[Pair]:
    return [Pair(at, f"picture_{at}", "Axial MRI.", "", text, "") for at in range(n)]


def values(plugin: evaluate.Metric, some: list[Pair]) -> list[dict]:
    return list(plugin.score(some, range(len(some))))


def why_not(plugin: evaluate.Metric, n: int = 3) -> str:
    with pytest.raises(NotComputed) as raised:
        values(plugin, pairs(n))
    return str(raised.value)


def plugin_of(*also: str) -> evaluate.Metric:
    _, (plugin,) = plugins.requested(also)
    return plugin


def told(database: Engine, names: list[str], *also: str, commands: list[str] = []) -> dict:  # noqa: B006
    ours, theirs = plugins.requested(also, commands)
    return evaluate.to_json(evaluate.evaluate(database, names, ["train"], also=ours, plugins=theirs))


def plugins_of(reasons: dict[str, str]) -> dict[str, str]:
    """Without the facts, of which these captions have none."""
    return {name: why for name, why in reasons.items() if not name.startswith("fact_")}


def calls() -> list[str]:
    return Path("calls").read_text().split() if Path("calls").exists() else []


# --- Functions -------------------------------------------------------------------------------------------------


def test_a_score_of_ones_own_stands_beside_ours_with_intervals_tests_and_files(database, run, here, module):
    other = fill(database, here / "set", N, run="other", recipe=Recipe(model="tests/other"))
    caption(database, other, texts(*["Another text."] * N))
    spec = f"{module(JACCARD)}:jaccard"
    ours, theirs = plugins.requested([spec])
    evaluated = evaluate.evaluate(database, [run.name, "other"], ["train"], also=ours, plugins=theirs)
    found = evaluate.to_json(evaluated)
    expected = [1, 1, 1, 1, 0, 0]
    one = found["runs"][0]
    assert one["metrics"]["jaccard"] == pytest.approx(np.mean(expected))
    low, high = one["intervals"]["jaccard"]
    assert low < one["metrics"]["jaccard"] < high
    assert found["paired"][0]["differences"]["jaccard"] == pytest.approx(-np.mean(expected))
    assert 0 < found["paired"][0]["p"]["jaccard"] <= 1
    assert found["plugins"]["jaccard"].startswith(f"{spec} ")
    evaluate.write(evaluated, Path("scores.parquet"), found)
    assert pd.read_parquet("scores.parquet")["jaccard"].tolist()[:N] == expected


def test_it_is_computed_once_until_its_file_changes(database, run, module, here, monkeypatch):
    name = module(JACCARD)
    first = told(database, [], f"{name}:jaccard")["runs"]
    assert told(database, [], f"{name}:jaccard")["runs"] == first
    assert calls() == [str(N)]
    (here / f"{name}.py").write_text(JACCARD + "# changed\n")
    told(database, [], f"{name}:jaccard")
    assert calls() == [str(N), str(N)]


def test_its_version_says_whether_it_is_computed_again(database, run, module, here):
    name = module(f"{JACCARD}\njaccard.version = '1'\n")
    told(database, [], f"{name}:jaccard")
    (here / f"{name}.py").write_text("# only a comment is new\n")
    told(database, [], f"{name}:jaccard")
    assert calls() == [str(N)]
    sys.modules[name].jaccard.version = "2"
    told(database, [], f"{name}:jaccard")
    assert calls() == [str(N)] * 2


def test_a_dict_of_numbers_becomes_several_scores_and_none_is_undefined(database, run, module):
    name = module(
        "def score(captions, references):\n    return [{'a': 1, 'b': None if not c else 2} for c in captions]"
    )
    (one,) = told(database, [], f"radeval={name}:score")["runs"]
    assert (one["metrics"]["radeval.a"], one["metrics"]["radeval.b"]) == (1, 2)
    assert "radeval" not in one["not_computed"]


def test_a_package_brings_a_score_by_an_entry_point(database, run, module, here):
    name = module("def half(captions, references):\n    return [0.5 for _ in captions]\n")
    folder = here / "lab-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[rococap.scores]\nlab_score = {name}:half\n")
    sys.path.insert(0, str(here))
    (one,) = told(database, [], "lab_score")["runs"]
    assert one["metrics"]["lab_score"] == 0.5
    with pytest.raises(RococapError, match="name one of bertscore_f1, meteor_1_5, lab_score, or package"):
        plugins.requested(["lab"])


def test_it_is_given_texts_in_one_line_and_not_too_many_at_once(module, monkeypatch):
    monkeypatch.setattr(plugins, "BATCH", 2)
    name = module("def n(captions, references):\n    return [len(captions) for one in captions if one == 'a b']\n")
    assert values(plugin_of(f"{name}:n"), pairs(3, " a\u2028b\r")) == [{"n": 2}, {"n": 2}, {"n": 1}]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('no model\\nat all')", "It failed: ValueError: no model."),
        ("raise SystemExit(3)", "It failed: SystemExit: 3."),
        ("import no_such_package", "It failed: ModuleNotFoundError: No module named 'no_such_package'."),
        ("return [float('nan')] * 6", "It returned nan; None is for a caption without a score."),
        ("return [float('inf')] * 6", "It returned inf; None is for a caption without a score."),
        ("return [1.0]", "It returned 1 values for 6 captions."),
        ("return [1.0] * 7", "It returned 7 values for 6 captions."),
        ("return None", "It failed: TypeError: 'NoneType' object is not iterable."),
        ("return ['1'] * 6", "It returned '1', which is not a number."),
        ("return [True] * 6", "It returned True, which is not a number."),
        ("return [{'a': 'x'}] * 6", "It returned 'x', which is not a number."),
        ("return [{1: 1}] * 6", "It returned a dict whose keys are not letters, digits, - and _: {1: 1}."),
        ("return [{}] * 6", "It returned a dict whose keys are not letters, digits, - and _: {}."),
        ("return [1] * 5 + [{'a': 1}]", "It returned other names than bad for some captions."),
        ("return [{'a': 1}] * 5 + [{'b': 1}]", "It returned other names than bad.a for some captions."),
    ],
)
def test_one_that_fails_is_not_computed_and_the_others_are(database, run, module, body, reason):
    bad, good = module(f"def bad(captions, references):\n    {body}\n"), module(JACCARD)
    (one,) = told(database, [], f"{bad}:bad", f"{good}:jaccard")["runs"]
    assert plugins_of(one["not_computed"]) == {"bad": reason}
    assert not any(name.startswith("bad") for name in one["metrics"])
    assert one["metrics"]["jaccard"] == pytest.approx(4 / 6)
    assert one["metrics"]["bleu_1"] > 0


def test_what_it_prints_does_not_stand_before_the_output(module, capsys):
    name = module(
        "print('imported')\ndef ones(captions, references):\n    print('scored')\n    return [1] * len(captions)\n"
    )
    assert values(plugin_of(f"{name}:ones"), pairs(2)) == [{"ones": 1}, {"ones": 1}]
    assert capsys.readouterr() == ("", "imported\nscored\n")


def test_one_that_returns_other_names_for_new_captions_is_not_computed(database, run, module):
    name = module(
        "def bad(captions, references):\n    return [{NAME: 1} for _ in captions]\nNAME = 'a'\nbad.version = 1\n"
    )
    told(database, [], f"{name}:bad")
    sys.modules[name].NAME = "b"
    with evaluate.transaction(database, write=True) as conn:
        evaluate.execute(conn, "DELETE FROM scores WHERE metric = 'bad' AND job_id > 3")
    (one,) = told(database, [], f"{name}:bad")["runs"]
    assert plugins_of(one["not_computed"]) == {"bad": "It returned other names than bad.a for some captions."}


def test_one_that_cannot_be_imported_is_not_computed(module):
    plugin = plugin_of(f"{module('import no_such_package')}:score")
    assert "cannot be imported (ModuleNotFoundError: No module named 'no_such_package')." in why_not(plugin)
    assert "(SyntaxError: " in why_not(plugin_of(f"{module('def')}:score"))


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("nothing", "There is no score 'nothing': name one of bertscore_f1, meteor_1_5, or package.module:function."),
        ("no_such.module:score", "There is no module 'no_such': install it, or go to the folder that holds it."),
        ("json.no_such:score", "There is no module 'json.no_such'"),
        ("json:no_such", "json has no 'no_such'"),
        ("json:", "'json:' does not name a function"),
        ("json:__doc__", "json:__doc__ is not a function"),
        ("a b=json:dumps", "'a b' cannot name a score"),
        ("bleu_4=json:dumps", "There is a score bleu_4 already: give another name"),
        ("flagged=json:dumps", "There is a score flagged already"),
        ("overlap=json:dumps", "There is a score overlap already"),
        ("modality=json:dumps", "There is a score modality already"),
        ("fact_side_invented=json:dumps", "There is a score fact_side_invented already"),
        ("imageclef_overall=json:dumps", "There is a score imageclef_overall already"),
        ("x=bertscore_f1", "bertscore_f1 is a score of rococap and keeps its name: --also bertscore_f1"),
        ("sys:intern", "sys:intern has no version: set its attribute `version`."),
    ],
)
def test_what_names_no_score_is_refused_at_once(also, message):
    with pytest.raises(RococapError) as raised:
        plugins.requested([also])
    assert message in str(raised.value)


def test_two_of_one_name_are_refused():
    with pytest.raises(RococapError, match="There is a score dumps already"):
        plugins.requested(["json:dumps", "dumps=json:loads"])


# --- Commands --------------------------------------------------------------------------------------------------

LENGTHS = """
import json, sys
for line in sys.stdin:
    pair = json.loads(line)
    print(json.dumps({"id": pair["id"], "score": len(pair["caption"]) / max(1, len(pair["reference"]))}))
"""
ALL_AT_ONCE = """
import json, sys
sys.stderr.write("loading the model\\n" * 100_000)
pairs = list(map(json.loads, sys.stdin))
for pair in reversed(pairs):
    print(json.dumps({"id": pair["id"], "score": {"ratio": 0.5, "none": None}, "more": pair["caption"]}))
"""
BEFORE = """
import json, sys
sys.stdout.write("\\n" * 1_000_000)
sys.stdout.flush()
for line in sys.stdin:
    print(json.dumps({"id": json.loads(line)["id"], "score": 1}), end="\\n" if line.endswith("\\n") else "")
"""


def command(source: str, name: str = "command", limit: float = 60) -> evaluate.Metric:
    _, (plugin,) = plugins.requested([], [f"{name}={shlex.join([sys.executable, '-c', source])}"], limit)
    return plugin


def test_a_command_scores_in_an_environment_of_its_own_and_is_asked_once(database, run, here):
    (here / "score.py").write_text(f"open('calls', 'a').write('x ')\n{LENGTHS}")
    line = f"ratio={shlex.quote(sys.executable)} score.py"
    found = told(database, [], commands=[line])
    (one,) = found["runs"]
    originals = [len(f"Original caption {n}.") for n in range(N)]
    assert one["metrics"]["ratio"] == pytest.approx(
        np.mean([len(c) / n for c, n in zip(CAPTIONS, originals, strict=True)])
    )
    assert one["intervals"]["ratio"] is not None
    assert found["plugins"] == {"ratio": line.removeprefix("ratio=")}
    assert told(database, [], commands=[line]) == found
    assert calls() == ["x"]
    told(database, [], commands=[f"{line} --version 2"])
    assert calls() == ["x", "x"]


@pytest.mark.parametrize("source", [LENGTHS, ALL_AT_ONCE, BEFORE], ids=["line by line", "all at once", "before"])
def test_no_pipe_fills_up_whichever_way_a_command_reads_and_writes(source):
    long = pairs(1_000, "word " * 400)
    found = values(command(source), long)
    assert len(found) == 1_000
    assert found[0] in ({"command": 199.9}, {"command.ratio": 0.5, "command.none": None}, {"command": 1})


def test_a_command_is_started_for_each_batch(here, monkeypatch):
    monkeypatch.setattr(plugins, "BATCH", 2)
    assert len(values(command(f"open('calls', 'a').write('x ')\n{LENGTHS}"), pairs(3))) == 3
    assert calls() == ["x", "x"]


ANSWERS = """
import json, sys
ids = [json.loads(line)["id"] for line in sys.stdin]
def answer(id, score=1):
    print(json.dumps({"id": id, "score": score}))
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; print('one', file=sys.stderr); sys.exit('no\\nmodel')", "ended with exit code 1. It said: model"),
        (
            "import sys; print('loading ' * 9_000, file=sys.stderr); sys.exit('no model')",
            "exit code 1. It said: no model",
        ),
        ("import os; os.kill(os.getpid(), 11)", "Its command was killed by SIGSEGV."),
        (ANSWERS, "Its command answered for 0 of 3 captions."),
        (ANSWERS + "answer(ids[0]); print('tired', file=sys.stderr)", "answered for 1 of 3 captions. It said: tired"),
        (ANSWERS + "[answer(id) for id in ids + ids]", "Its command answered twice for picture_0."),
        (ANSWERS + "answer('x')", "Its command answered for 'x', which it was not asked for."),
        (ANSWERS + "answer([1])", "Its command answered for [1], which it was not asked for."),
        (ANSWERS + "[answer(id, float('nan')) for id in ids]", "It returned nan; None is for a caption without a"),
        (ANSWERS + "[answer(id, '1') for id in ids]", "It returned '1', which is not a number."),
        (ANSWERS + "[answer(id) for id in ids]; sys.exit(3)", "Its command ended with exit code 3."),
        ("print('Loading …')", """wrote a line that is not {"id": …, "score": …}: 'Loading …'."""),
        ("print('[1]')", "wrote a line that is not"),
        ('print(\'{"id": "picture_0"}\')', "wrote a line that is not"),
        ("print('[' * 100_000)", "wrote a line that is not"),
        ("while True: print('x' * 1_000_000, end='')", "Its command wrote a line of more than 1,000,000 bytes."),
    ],
)
def test_a_command_that_fails_is_not_computed(source, reason):
    assert reason in why_not(command(source))


@pytest.mark.parametrize(
    "source",
    [
        "import time; time.sleep(600)",
        "import os, time; os.close(1); os.close(2); time.sleep(600)",
        "import sys\nwhile True: print('busy', file=sys.stderr)",
        "import subprocess; subprocess.run(['sleep', '600'])",
    ],
)
def test_a_command_that_hangs_is_killed_with_its_children_at_the_limit(source):
    assert "Its command took more than 0.5 s for 3 captions." in why_not(command(source, limit=0.5))
    steps.until(lambda: those_here() == {os.getpid()}, "the command and its children have ended")


def those_here() -> set[int]:
    """The processes whose current folder is that of this test."""
    return {one.pid for one in psutil.process_iter(["cwd"]) if one.info["cwd"] == os.getcwd()}


def test_a_child_that_outlives_the_command_holds_nothing_up():
    source = ANSWERS + "[answer(id) for id in ids]\nimport subprocess; subprocess.Popen(['sleep', '60'])"
    assert values(command(source), pairs(3)) == [{"command": 1}] * 3


def test_a_command_that_cannot_be_started_is_not_computed(here):
    _, (plugin,) = plugins.requested([], ["x=./no-such-program --fast"])
    assert why_not(plugin) == "Its command cannot be started (No such file or directory: ./no-such-program)."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python score.py", "'python score.py' has no command: NAME=COMMAND."),
        ("x=", "'x=' has no command"),
        ("x='python", "cannot be read (No closing quotation): quote it as for a shell."),
        ("=python", "'' cannot name a score"),
        ("cider_d=python", "There is a score cider_d already"),
    ],
)
def test_a_command_without_a_name_or_that_cannot_be_read_is_refused(line, message):
    with pytest.raises(RococapError) as raised:
        plugins.requested([], [line])
    assert message in str(raised.value)


# --- The commands ----------------------------------------------------------------------------------------------


def test_evaluate_and_report_take_them(database, run, module, url):
    spec = f"{module(JACCARD)}:jaccard"
    dies = f"dies={shlex.quote(sys.executable)} -c 'exit(9)'"
    result = steps.invoke("--db", url, "evaluate", "--split", "train", "--also", spec, "--also-command", dies)
    assert result.exit_code == 0, result.output
    assert any(line.startswith("jaccard  ") for line in result.output.splitlines())
    assert "dies: not computed: Its command ended with exit code 9." in result.output
    told = json.loads(steps.invoke("--db", url, "evaluate", "--split", "train", "--also", spec, "--json").stdout)
    assert told["runs"][0]["metrics"]["jaccard"] == pytest.approx(4 / 6)
    assert steps.invoke("--db", url, "report", "--split", "train", "--also", spec).exit_code == 0
    page = Path("results_medical/report_train_default.html").read_text()
    assert re.search(r">\s*jaccard\s*<", page)
    assert f"jaccard ({spec} " in page
    assert calls() == [str(N)]


def test_a_score_that_does_not_exist_is_wrong_usage(database, run, url):
    result = steps.invoke("--db", url, "evaluate", "--split", "train", "--also", "bertscore")
    assert result.exit_code == 2
    assert "There is no score 'bertscore': name one of bertscore_f1, meteor_1_5" in result.stderr


def test_the_limit_of_the_help_is_that_of_the_code():
    assert f"default: {plugins.TIME_LIMIT_SEC:g}" in steps.invoke("evaluate", "--help").output
    assert f"{plugins.BATCH:,} captions" in " ".join(steps.invoke("evaluate", "--help").output.split())
