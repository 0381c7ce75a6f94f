"""Several workers under one parent: real processes, with the small engine or none where the model is not the point."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from openai_server import ChatServer
from samples import fill
from small_crew import small_command
from sqlalchemy import Engine
from steps import captions, expected, invoke, members, running, select, small_crew, statuses, until, writing

import rococap
from rococap import queue
from rococap.cli.options import cli
from rococap.engines import Options
from rococap.worker import children, supervisor
from rococap.worker.settings import Settings
from rococap.worker.signals import STOP_SIGNALS
from rococap.worker.supervisor import Ended, WorkerChild


def done(database: Engine) -> int:
    return statuses(database).get("done", 0)


# --- which devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gpus", "devices"),
    [
        ("all", 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("all", 1, ["cuda:0"]),
        ("all", 0, ["cpu"]),
        ("0", 1, ["cuda:0"]),
        ("0,1", 4, ["cuda:0", "cuda:1"]),
        ("3,1", 4, ["cuda:3", "cuda:1"]),
        ("cpu:1", 0, ["cpu"]),
        ("cpu:3", 8, ["cpu", "cpu", "cpu"]),
    ],
)
def test_devices_are_all_gpus_or_some_or_so_many_times_the_cpu(text, gpus, devices):
    assert children.parse_devices(text, lambda: gpus) == devices


NO_DEVICES = "names no devices. Use all, the numbers of GPUs as in 0,1, or cpu:N."


@pytest.mark.parametrize(
    ("text", "gpus", "message"),
    [
        ("2", 2, "There is no GPU 2 on this machine. It has 0 to 1: name one of them, or all."),
        ("0,7", 1, "There is no GPU 7 on this machine. It has 0 to 0: name one of them, or all."),
        ("0", 0, "There is no GPU 0 on this machine. It has none: use cpu:N, or all."),
        ("1,1", 2, "GPU 1 is named more than once: each GPU gets one process."),
        ("01,1", 2, "GPU 1 is named more than once: each GPU gets one process."),
        ("cpu:0", 0, "cpu:0 is out of range: cpu:N starts N processes, from 1 to 256."),
        ("cpu:257", 0, "cpu:257 is out of range: cpu:N starts N processes, from 1 to 256."),
        *[(text, 2, f"{text!r} {NO_DEVICES}") for text in ("fast", "cpu", "cpu:", "cpu:two", "cpu:-1", "cpu:1.5")],
        *[(text, 2, f"{text!r} {NO_DEVICES}") for text in ("", ",", "0,", ",1", "0 1", "0;1", "-1", "cuda:0", "ALL")],
        *[(text, 2, f"{text!r} {NO_DEVICES}") for text in ("0,cpu", "all,0", "1.0", "٣", "0x1", "9" * 20)],
    ],
)
def test_what_names_no_devices_is_refused_with_what_would_be_right(text, gpus, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        children.parse_devices(text, lambda: gpus)


def test_gpus_are_counted_only_where_they_matter():
    assert children.parse_devices("cpu:2", lambda: pytest.fail("counted")) == ["cpu", "cpu"]


def test_a_crew_is_imported_without_torch():
    subprocess.run(
        [sys.executable, "-c", "import rococap.worker.supervisor, sys; assert 'torch' not in sys.modules"], check=True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "cpu:0"], "Invalid value for '--devices': cpu:0 is out of range: "),
        (["--devices", "99"], "Invalid value for '--devices': There is no GPU 99 on this machine. "),
        (["--devices", "cpu:2", "--device", "auto"], "--devices sets the device of every process: leave out --device."),
    ],
)
def test_bad_devices_are_usage_errors(options, message):
    result = invoke("worker", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


# --- what each process is given --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "n", "limits"),
    [(10, 3, [4, 3, 3]), (9, 3, [3, 3, 3]), (2, 3, [1, 1]), (1, 1, [1]), (None, 2, [None] * 2)],
)
def test_a_limit_is_shared_out_to_the_last_picture(limit, n, limits):
    shares = supervisor.share_out(Settings(limit=limit), ["cpu"] * n)
    assert [settings.limit for _, settings in shares] == limits


def test_processes_are_labelled_by_device():
    assert [label for label, _ in supervisor.share_out(Settings(), ["cuda:0", "cuda:3"])] == ["cuda:0", "cuda:3"]
    assert [label for label, _ in supervisor.share_out(Settings(), ["cpu", "cpu"])] == ["cpu 1", "cpu 2"]
    assert [label for label, _ in supervisor.share_out(Settings(), ["cpu"])] == ["cpu"]


EVERY_SETTING = Settings(
    "a",
    ("train", "test"),
    Options("openai", "http://host/v1", "vl", "cuda:1", 7, "static", "auto", False),
    9,
    True,
    False,
    33.5,
    4.0,
    50.0,
    True,
    "/mnt/roco",
)


def test_every_setting_comes_through_a_members_command_line():
    for one, default in ((EVERY_SETTING, Settings()), (EVERY_SETTING.options, Options())):
        assert all(getattr(one, name) != getattr(default, name) for name in type(one).__slots__)
    command = supervisor.worker_command()(EVERY_SETTING)
    context = cli.commands["worker"].make_context("worker", command[command.index("--member") :])
    assert Settings.from_json(context.params["member"]) == EVERY_SETTING


def test_the_password_is_in_the_environment_of_a_member_and_not_on_its_command_line():
    url = "postgresql+psycopg://me:secret@host/queue"
    assert supervisor.worker_environment(url, ["cuda:0"])["ROCOCAP_DB"] == url
    command = supervisor.worker_command(force=True, debug=True)(EVERY_SETTING)
    assert command[: command.index("--member")] == [*children.program(), "--force", "--debug", "worker"]
    assert "secret" not in " ".join(command)


SHADOWS = ["random.py", "queue.py", "json.py", "click/__init__.py", "rococap/__init__.py"]


def shadow(folder: Path, *names: str) -> None:
    """Files of a user's own that are named like modules, and tell if they are imported."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"raise SystemExit('imported {name} of the working folder')")


@pytest.mark.parametrize("name", SHADOWS)
def test_a_process_that_is_started_imports_nothing_of_the_working_folder(tmp_path, monkeypatch, name):
    shadow(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    told = subprocess.run([*children.program(), "worker", "--help"], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("Usage: ")


def test_a_checkout_that_is_not_installed_is_found_in_the_working_folder(monkeypatch):
    monkeypatch.chdir(Path(rococap.__file__).parents[1])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = "import rococap; print(rococap.__file__)"
    found = subprocess.run([*children.program()[:-2], "-c", script], capture_output=True, text=True).stdout.strip()
    assert found == rococap.__file__


@pytest.mark.slow
def test_devices_work_beside_a_users_own_modules(database, url, tmp_path):
    fill(database, tmp_path / "set", 8)
    folder = tmp_path / "mine"
    folder.mkdir()
    shadow(folder, *SHADOWS)
    command = (sys.executable, "-P", "-m", "rococap", "worker", "--devices", "cpu:2", "--batch-size", "4")
    with (
        ChatServer() as server,
        running(*command, "--engine", "openai", "--base-url", server.url, cwd=folder, ROCOCAP_DB=url) as parent,
    ):
        _, err = parent.communicate(timeout=120)
    assert parent.returncode == 0, err
    assert done(database) == 8


def test_processes_on_the_cpu_share_its_cores(monkeypatch):
    monkeypatch.setattr(children, "_n_cores", lambda: 8)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    three, many = (children.environment(["cpu"] * n) for n in (3, 20))
    assert [three[name] for name in names] == ["2", "passive", "7"]
    assert many["OMP_NUM_THREADS"] == "1"
    told = []
    script = "import os, sys; print(os.environ['OMP_NUM_THREADS'], file=sys.stderr)"
    supervisor.supervise([child(script, told.append, around=three)])
    assert told == ["a  2"]


# --- supervising, with a trivial command -----------------------------------------------------------------------


def child(
    script: str, echo: children.Echo = lambda line: None, *, label: str = "a", limit: int | None = None, around=None
):
    """Runs a piece of Python; its limit is sys.argv[1]."""
    environment = os.environ if around is None else around
    return WorkerChild(
        label,
        Settings(limit=limit),
        lambda settings: [sys.executable, "-I", "-S", "-c", script, str(settings.limit)],
        environment,
        echo,
    )


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(children, "FIRST_PAUSE_SEC", 0.02)


def test_lines_of_a_child_are_told_with_its_device_and_what_it_did_is_added_up():
    told = []
    script = 'print(\'{"done": 2, "failed": 1, "seconds": 3}\'); print(\'stray\', flush=True)'
    ended = supervisor.supervise([child(script, told.append), child(script, told.append, label="b")])
    assert sorted(told) == ["a  stray", "b  stray"]
    outcome = ended.outcome
    assert (outcome.done, outcome.failed, outcome.seconds, outcome.drained) == (4, 2, 3.0, False)
    assert (ended.errors, ended.signals) == ((), ())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("death", ["os.kill(os.getpid(), 9)", "os._exit(70)", "sys.exit('an error')"])
def test_a_child_that_dies_is_started_again_with_what_is_left_of_its_limit(tmp_path, death):
    once = tmp_path / "once"
    script = (
        "import os, sys\n"
        f"if os.path.exists({str(once)!r}): print('{{\"done\": %s}}' % sys.argv[1], flush=True); sys.exit()\n"
        f"open({str(once)!r}, 'w'); print('{{\"done\": 3, \"failed\": 1}}', flush=True); {death}"
    )
    ended = supervisor.supervise([child(script, limit=10)])
    assert (ended.outcome.done, ended.outcome.failed, ended.errors) == (3 + 6, 1, ())


@pytest.mark.usefixtures("quick")
def test_a_child_that_dies_with_its_limit_reached_has_no_successor():
    ended = supervisor.supervise([child("print('{\"done\": 3}', flush=True); import os; os._exit(70)", limit=3)])
    assert (ended.outcome.done, ended.errors) == (3, ())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("code", [1, 2])
def test_a_device_that_fails_three_times_quickly_is_given_up_and_the_others_go_on(code):
    script = f"import sys; print('Error: no model', file=sys.stderr); sys.exit({code})"
    slow = "import time; time.sleep(0.5); print('{\"done\": 5}')"
    told = []
    ended = supervisor.supervise([child(script, told.append, label="cuda:1"), child(slow, label="cuda:0")])
    assert told == ["cuda:1  Error: no model"] * 3
    error = f"cuda:1 failed 3 times in a row and was given up: it ended with code {code} (no model)"
    assert (ended.errors, ended.outcome.done) == ((error,), 5)


@pytest.mark.usefixtures("quick")
def test_a_child_that_dies_by_a_signal_is_never_given_up_and_waits_longer_each_time(tmp_path):
    count = tmp_path / "count"
    script = (
        "import os, sys, time\n"
        f"with open({str(count)!r}, 'a') as file: file.write(f'{{time.time()}}\\n')\n"
        f"os.kill(os.getpid(), 9) if len(open({str(count)!r}).readlines()) < 6 else None"
    )
    assert supervisor.supervise([child(script)]).errors == ()
    starts = [float(line) for line in count.read_text().split()]
    assert len(starts) == 6
    assert starts[5] - starts[4] > 16 * 0.02


def signals_when_ready(*signums: int, told: list[str]) -> children.Echo:
    """Sends this process the first signal as soon as a child is ready, and the next once it was asked to stop."""
    left = list(signums)

    def echo(line: str) -> None:
        told.append(line)
        if left and "asked" in line:
            time.sleep(1.1)  # after the first was heard: sooner, it would be the same request
        if left and line.endswith(("ready", "asked")):
            signal.raise_signal(left.pop(0))

    return echo


def test_a_signal_is_passed_on_once_and_what_ends_by_it_is_no_error():
    before = signal.getsignal(signal.SIGINT)  # a shell's background job begins with it ignored
    told: list[str] = []
    script = (
        "import signal, sys, time\n"
        "def stop(*_): print('asked', file=sys.stderr, flush=True); time.sleep(1); sys.exit()\n"
        "signal.signal(15, stop); print('ready', file=sys.stderr, flush=True); time.sleep(60)"
    )
    ended = supervisor.supervise(
        [child(script, signals_when_ready(signal.SIGINT, told=told)), child("import time; time.sleep(60)", label="b")]
    )
    assert told == ["a  ready", "a  asked"]
    assert (ended.outcome.drained, ended.errors, ended.signals[0]) == (True, (), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_does_not_even_leave_at_the_second_signal_is_killed(monkeypatch):
    monkeypatch.setattr(children, "KILL_AFTER_SEC", 0.3)
    script = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: print('asked', file=sys.stderr, flush=True))\n"
        "print('ready', file=sys.stderr, flush=True); time.sleep(60)"
    )
    ended = supervisor.supervise([child(script, signals_when_ready(signal.SIGTERM, signal.SIGUSR1, told=[]))])
    assert ended.errors == ("a was asked to stop and was killed by SIGKILL (asked)",)
    assert ended.signals == (signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_child_that_a_signal_to_the_group_ends_while_it_starts_is_no_error(signum):
    told: list[str] = []
    script = (
        "import os, signal, sys, time\n"
        f"signal.signal({int(signal.SIGTERM)}, signal.SIG_IGN)\n"  # the group's own ends it, before the parent's
        f"signal.signal({int(signum)}, signal.SIG_DFL)\n"
        "print('ready', file=sys.stderr, flush=True); time.sleep(0.5)\n"
        f"os.kill(os.getpid(), {int(signum)})"
    )
    ended = supervisor.supervise([child(script, signals_when_ready(signum, told=told))])
    assert (ended.outcome.drained, ended.errors, ended.signals) == (True, (), (signum,))


def test_a_child_is_out_of_reach_of_the_terminals_ctrl_c():
    told: list[str] = []
    supervisor.supervise([child("import os, sys; print(os.getsid(0) == os.getpid(), file=sys.stderr)", told.append)])
    assert told == ["a  True"]


# --- workers with the small engine -----------------------------------------------------------------------------


def work_here(database: Engine, url: str, n: int, engine: dict | None = None, report=None, **settings) -> Ended:
    return supervisor.work(
        database,
        url,
        Settings.of(batch_size=4, lease_ttl=60, self_check=False, **settings),
        ["cpu"] * n,
        small_command(**engine or {}),
        **({"report": report} if report else {}),
    )


@pytest.mark.every_database
def test_two_processes_caption_every_picture_once_and_what_they_did_adds_up(database, url, tmp_path):
    run = fill(database, tmp_path / "set", 60)

    def pause(paused: bool) -> None:
        with writing(database) as conn:
            queue.pause(conn, run, paused)

    def begin_together() -> None:
        try:
            until(lambda: select(database, "SELECT count(*) FROM workers") == [(2,)], "both")
        finally:
            pause(False)

    pause(True)
    with ThreadPoolExecutor(1) as pool:
        both = pool.submit(begin_together)
        ended = work_here(database, url, 2, {"step_sec": 0.05})
        both.result()
    assert (ended.outcome.run, ended.outcome.done, ended.outcome.failed, ended.errors) == ("default", 60, 0, ())
    assert ended.outcome.seconds > 0
    assert captions(database) == expected(60)
    by_worker = select(database, "SELECT n_done FROM workers")
    assert len(by_worker) == 2
    assert sum(n for (n,) in by_worker) == 60


def test_a_crew_stops_after_so_many_pictures_in_all(database, url, tmp_path):
    fill(database, tmp_path / "set", 20)
    assert work_here(database, url, 3, limit=7).outcome.done == 7
    assert statuses(database) == {"done": 7, "pending": 13}


def test_a_crew_without_work_starts_nothing(database, url, tmp_path):
    fill(database, tmp_path / "set", 4)
    work_here(database, url, 1)
    ended = supervisor.work(database, url, Settings(), ["cpu"], lambda settings: pytest.fail("started for nothing"))
    assert ended == Ended(replace(ended.outcome, run="default", done=0, seconds=0.0), (), ())


def test_where_all_stand_is_reported_together(database, url, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "LOOK_EVERY_SEC", 0.1)
    fill(database, tmp_path / "set", 40)
    seen = []
    work_here(
        database,
        url,
        2,
        {"step_sec": 0.3},
        report=lambda outcome, left: seen.append((outcome.done, 40 - left)),
    )
    assert seen
    assert all(0 < told <= stored <= 40 for told, stored in seen)


def test_a_killed_process_is_started_again_and_everything_is_captioned(database, url, tmp_path):
    n = 48
    fill(database, tmp_path / "set", n)
    with small_crew(url, engine={"step_sec": 0.6}, batch_size=4, lease_ttl=2.0) as parent:
        until(lambda: len(select(database, "SELECT id FROM workers WHERE n_done > 0")) == 2, "captions of both")
        time.sleep(0.2)  # by now, what is stored was told, as a rule
        victim = members(parent)[0]
        victim.kill()
        out, err = parent.communicate(timeout=120)
    assert parent.returncode == 0, err
    assert captions(database) == expected(n)
    assert n - 4 <= json.loads(out)["outcome"]["done"] <= n
    assert "was killed by SIGKILL; restarting it in 1 s" in err
    assert len(select(database, "SELECT id FROM workers")) == 3


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_to_the_parent_drains_all(database, url, tmp_path, signum):
    fill(database, tmp_path / "set", 200)
    with small_crew(url, engine={"step_sec": 0.3}, n=3, batch_size=4) as parent:
        until(lambda: len(select(database, "SELECT id FROM workers WHERE n_done > 0")) == 3, "captions of all")
        parent.send_signal(signum)
        out, err = parent.communicate(timeout=60)
    assert parent.returncode == 0, err
    ended = json.loads(out)
    assert (ended["errors"], ended["outcome"]["drained"]) == ([], True)
    assert statuses(database) == {"done": ended["outcome"]["done"], "pending": 200 - ended["outcome"]["done"]}
    assert select(database, "SELECT DISTINCT attempts, crashes FROM jobs WHERE status = 'pending'") == [(0, 0)]
    assert select(database, "SELECT id FROM workers WHERE stopped_at IS NULL") == []


def test_a_second_request_makes_the_children_leave_at_once(database, url, tmp_path):
    fill(database, tmp_path / "set", 40)
    with small_crew(url, engine={"step_sec": 0.1, "steps": 10_000}, batch_size=4) as parent:
        until(lambda: statuses(database).get("leased", 0) == 16, "running batches and claims ahead")
        parent.send_signal(signal.SIGTERM)
        until(lambda: statuses(database).get("leased", 0) == 8, "claims ahead were given back: all have heard it")
        time.sleep(1.1)  # sooner, it would be the same request
        parent.send_signal(signal.SIGTERM)
        out, err = parent.communicate(timeout=60)
    assert json.loads(out)["signals"] == [signal.SIGTERM, signal.SIGTERM], err
    assert [error.split(" (")[0] for error in json.loads(out)["errors"]] == [
        f"cpu {n} was asked to stop and ended with code 143" for n in (1, 2)
    ]


def test_a_parent_killed_by_sigkill_leaves_no_child_alive_and_nothing_leased(database, url, tmp_path):
    fill(database, tmp_path / "set", 200)
    with small_crew(url, engine={"step_sec": 0.3}, batch_size=4) as parent:
        until(lambda: done(database) >= 8, "captions")
        orphans = members(parent)
        assert len(orphans) == 2
        parent.kill()
        _, alive = psutil.wait_procs(orphans, timeout=60)
    assert alive == []
    assert statuses(database).keys() == {"done", "pending"}


# --- workers by their command line ----------------------------------------------------------------------


def command_lines(processes: Sequence[psutil.Process]) -> list[list[str]]:
    return [process.cmdline() for process in processes]


@pytest.mark.slow
def test_the_command_captions_on_two_processes_and_stops_them_together(database, url, tmp_path):
    fill(database, tmp_path / "set", 24)
    mounted = str((tmp_path / "set").rename(tmp_path / "mounted"))
    options = ("--devices", "cpu:2", "--wait", "--batch-size", "4", "--lease-ttl", "2", "--engine", "openai")
    with (
        ChatServer() as server,
        running(
            *(sys.executable, "-m", "rococap", "worker", *options),
            *("--base-url", server.url, "--dataset-root", mounted),
            ROCOCAP_DB=url,
        ) as parent,
    ):
        beating = "SELECT count(*) FROM workers WHERE telemetry IS NOT NULL"
        until(lambda: done(database) == 24 and select(database, beating) == [(2,)], "captions, and both at work", 90)
        lines = command_lines(members(parent))
        parent.send_signal(signal.SIGTERM)
        out, err = parent.communicate(timeout=60)
    assert parent.returncode == 0, err
    assert out.startswith("default: 24 captioned in ")
    again = f"rococap worker --engine openai --base-url {server.url} --dataset-root {mounted}"
    assert out.splitlines()[-1] == f"Stopped on request; unfinished pictures were given back. To continue: {again}"
    assert len(out.splitlines()) == 2
    assert [Settings.from_json(line[-1]).wait for line in lines] == [True, True]
    assert not any(url in " ".join(line) for line in lines)
    told = [line for line in err.splitlines() if "captioning run default with" in line]
    assert sorted(line.split("  ")[0] for line in told) == ["cpu 1", "cpu 2"]
    assert select(database, "SELECT count(*), count(DISTINCT job_id) FROM captions") == [(24, 24)]
    assert select(database, "SELECT count(*) FROM workers") == [(2,)]


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_model_that_cannot_be_loaded_is_given_up_with_what_the_worker_said(database, url, tmp_path, monkeypatch):
    monkeypatch.setattr(children, "TRIES", 2)
    fill(database, tmp_path / "set", 4)
    with ChatServer() as server:
        server.listed = []
        options = ("--devices", "cpu:1", "--engine", "openai", "--base-url", server.url)
        result = invoke("--db", url, "worker", *options)
    assert (result.exit_code, result.stdout) == (1, "")
    error = f"Error: cpu failed 2 times in a row and was given up: it ended with code 1 ({server.url} serves no model"
    assert result.stderr.splitlines()[-1].startswith(error)
    assert statuses(database) == {"pending": 4}
