"""`rococap launch slurm`: the script that it writes, and real workers in jobs of a real Slurm."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import slurm
from databases import new_queue, recount, tallies
from openai_server import ChatServer
from places import ROOT
from samples import fill
from sqlalchemy import Engine
from steps import column, refused, said, select

from rococap import db
from rococap.launch import slurm as launcher
from rococap.launch.slurm import Allocation, script, seconds
from rococap.recipe import Recipe

MODEL = str(ROOT / "rococap" / "demo" / "model")

needs_slurm = pytest.mark.skipif(not slurm.IS_AVAILABLE, reason="needs root and Slurm: apt-get install slurm-wlm munge")


# --- The script ------------------------------------------------------------------------------------------------


@pytest.fixture
def registered(here: Path) -> Path:
    """A folder with a queue of ten pictures in SQLite, where the default URL points."""
    database = db.connect("sqlite:///rococap.db")
    fill(database, here / "dataset", 10)
    database.dispose()
    return here


def dry_run(*options: str) -> list[str]:
    return said("launch", "slurm", "--dry-run", *options).splitlines()


def test_the_script_asks_for_what_was_given(registered):
    lines = dry_run("--gpus-per-node", "2", "--cpus-per-task", "8", "--time", "1-0", "--partition", "big gpus")
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert asked == {
        "--job-name=rococap",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=2",
        "--cpus-per-task=8",
        "--time=1-0",
        "--partition='big gpus'",
        "--output=rococap-%j.log",
    }
    [step] = [line for line in lines if line.startswith("srun ")]
    assert "--cpus-per-task=8 --output=rococap-%j-%t.log " in step
    assert step.endswith(" worker --devices 0,1 --run default &")


def test_the_script_passes_the_options_of_the_worker_on(registered):
    options = ["--split", "train", "--batch-size", "8", "--no-self-check", "--lease-ttl", "30", "--wait"]
    options += ["--dataset-root", "/mnt/roco"]
    [step] = [line for line in dry_run(*options, "--gpus-per-node", "0") if line.startswith("srun ")]
    given = step.partition("--devices cpu:1 --run default ")[2].removesuffix(" &").split()
    assert sorted(given) == sorted([*options[:6], "30.0", *options[7:]])


def test_workers_get_the_time_that_they_need_to_drain(registered):
    assert "#SBATCH --signal=B:USR1@360" in dry_run("--drain-timeout", "300")


def test_an_option_for_sbatch_follows_those_of_the_script_and_so_overrides_them(registered):
    lines = dry_run("--sbatch=--account=radiology", "--sbatch=--job-name=mine")
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options[-2:] == ["#SBATCH --account=radiology", "#SBATCH --job-name=mine"]


@pytest.mark.parametrize(
    "option",
    [
        *("--mem=64G", "--nodelist=n1", "--time-min=10", "-H", "-A radiology", "--gres=gpu:a100:1", "--no-kill"),
        *("--comment='two words'", "--exclude n2 --qos=long", "--output=mine.log", "--open-mode=truncate", "--nice"),
    ],
)
def test_options_of_sbatch_that_the_script_does_not_need_are_passed_on(registered, option):
    assert f"#SBATCH {option}" in dry_run(f"--sbatch={option}")


def test_the_script_does_not_hold_the_password_of_the_queue(registered):
    for where in ([], ["--db", "sqlite:///rococap.db"]):
        assert not [line for line in dry_run(*where) if "sqlite" in line or "--db" in line]


@pytest.mark.parametrize("run", ["default", 'it\'s "two" $words', "a\\b"])
@pytest.mark.parametrize("array", [None, 3])
def test_bash_accepts_the_script(run, array):
    text = script(Allocation(array=array, time="1:00:00"), run, ["--split", "train"])
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_options_of_several_lines_reach_the_worker_as_they_are(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nsleep 0.5\nprintf '%s\\0' \"$@\"\n")
    srun.chmod(0o755)
    run, folder = "two\nlines'", "/mnt\n#SBATCH --nodes=4\ntouch /tmp/x"
    text = script(Allocation(), run, ["--dataset-root", folder])
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ROCOCAP_DB": "queue.db"}
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\0")[-5:] == ["--run", run, "--dataset-root", folder, ""]


def test_a_script_that_is_submitted_without_a_queue_says_so(tmp_path):
    text = script(Allocation(), "default", [])
    done = subprocess.run(["bash"], input=text, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "ROCOCAP_DB: names no queue" in done.stderr


@pytest.mark.parametrize(
    ("text", "n"),
    [("7", 420), ("7:30", 450), ("1:00:00", 3600), ("2-0", 172_800), ("1-2:3", 93_780), ("1-1:1:1", 90_061)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(text, n):
    assert seconds(text) == n


# --- What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--nodes", "2"), ("--array", "2"), ("--nodes", "2", "--array", "3", "--dry-run")])
def test_sqlite_is_refused_on_several_machines_with_the_command_that_copies_it(registered, options):
    error = refused("launch", "slurm", *options)
    assert error.startswith("SQLite is for one machine, and the workers would run on ")
    assert error.endswith("rococap copy-db sqlite:///rococap.db postgresql+psycopg://USER@HOST/NAME")


def test_without_slurm_the_next_step_is_named(registered, monkeypatch):
    monkeypatch.setenv("PATH", str(registered))
    assert refused("launch", "slurm") == (
        "sbatch is not on PATH: run this on a login node of the cluster, or print the script with --dry-run."
    )
    assert dry_run()[0] == "#!/bin/bash"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--time=4", "4 is too short: workers are asked to stop 120 s before the time limit"),
        ("--time=soon", "'soon' is not a time limit"),
        ("--time=٣:00:00", "'٣:00:00' is not a time limit"),
        ("--partition=gpu\ntouch x\n#", "'gpu\\ntouch x\\n#' is not one line of plain text."),
        ("--partition=gpu\r", "'gpu\\r' is not one line of plain text."),
        ("--sbatch=account", "'account' is not an option of sbatch"),
        ("--sbatch=--account=me\ntouch x", "'--account=me\\ntouch x' is not an option of sbatch"),
        ("--sbatch=--comment='open", "is not an option of sbatch"),
        ("--base-url=http://localhost:1/v1", "--base-url is for the engine openai"),
    ],
)
def test_options_that_cannot_be_right_are_refused(registered, option, message):
    assert message in refused("launch", "slurm", option, code=2)


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        *((option, "use --nodes instead") for option in ("--nodes=4", "--nodes 4", "-N4", "-N 4", "-HN4")),
        *((option, "use --array instead") for option in ("--array=1-4", "--array 1-4", "--arr=1-4", "-a1-4", "-a 1-4")),
        *((option, "use --gpus-per-node instead") for option in ("--gpus-per-node=2", "--gpus=2", "-G 2")),
        *(
            (option, "use --nodes or --gpus-per-node instead")
            for option in ("--ntasks=4", "-n4", "--ntasks-per-node 2")
        ),
        *((option, "use --cpus-per-task instead") for option in ("--cpus-per-task=4", "-c4")),
        *((option, "use --time instead") for option in ("--time=1", "-t 1")),
        *((option, "use --partition instead") for option in ("--partition=gpu", "-pgpu")),
        ("--signal=TERM@60", "use --drain-timeout instead"),
        ("--no-requeue", "leave it out"),
        ("--account=radiology --nodes=4", "use --nodes instead"),
        ("-A 'two words' -N 4", "use --nodes instead"),
    ],
)
def test_what_the_script_sets_is_not_set_through_sbatch(registered, option, instead):
    """Else SQLite would not be refused on several machines, and jobs not drained and requeued at their time limit."""
    error = refused("launch", "slurm", "--dry-run", f"--sbatch={option}", code=2)
    assert error == f"Invalid value for '--sbatch': {option!r} sets what the script sets itself: {instead}."


def test_a_job_has_time_to_caption_before_it_is_asked_to_drain(registered):
    """Else it would return to the queue again and again without a caption."""
    error = refused("launch", "slurm", "--time=10", "--drain-timeout=600", code=2)
    assert "10 is too short: workers are asked to stop 660 s before the time limit" in error
    assert "Give them 14 minutes or more." in error
    assert "#SBATCH --time=14" in dry_run("--time=14", "--drain-timeout=600")


def test_a_controller_that_does_not_answer_is_told(registered, monkeypatch):
    sbatch = registered / "sbatch"
    sbatch.write_text("#!/bin/sh\nexec sleep 60\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{registered}:{os.environ['PATH']}")
    monkeypatch.setattr(launcher, "SUBMIT_TIMEOUT_SEC", 0.3)
    assert refused("launch", "slurm").endswith("whether Slurm's controller answers (scontrol ping), then try again.")


def test_nothing_is_submitted_where_there_is_nothing_to_do(registered):
    assert said("cancel", "--all")
    assert said("launch", "slurm") == "default: nothing left to do. See: rococap status\n"
    assert refused("launch", "slurm", "--run", "other").startswith("There is no run")


# --- A real Slurm ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Cluster]:
    with slurm.cluster(n_nodes=2) as running:
        yield running


class Job:
    """What a test does with a job, and what it finds in the queue at `url`."""

    def __init__(self, cluster: slurm.Cluster, url: str, folder: Path) -> None:
        self.cluster = cluster
        self.database: Engine = db.connect(url)
        self.folder = folder
        self.number = ""

    def fill(self, n: int, model: str = MODEL) -> None:
        fill(self.database, self.folder / "dataset", n, recipe=Recipe(model=model))

    def launch(self, *options: str) -> str:
        told = said("launch", "slurm", "--gpus-per-node", "0", "--no-self-check", "--batch-size", "4", *options)
        self.number = told.split()[2].rstrip(",")
        return told

    def state(self, number: str = "") -> str:
        return self.cluster.job(number or self.number)["JobState"]

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
        try:
            self.cluster.until(condition, what, seconds)
        except AssertionError as error:
            logs = "\n".join(path.read_text()[-3_000:] for path in sorted(self.folder.glob("*.log")))
            raise AssertionError(f"{error}\n{logs}") from error

    def n_done(self) -> int:
        return column(self.database, "SELECT count(*) FROM captions")[0]

    def check_drained(self, n: int) -> None:
        """So many workers stopped in good order, and hold nothing."""
        assert column(self.database, "SELECT stopped_at IS NOT NULL FROM workers") == [True] * n
        assert set(column(self.database, "SELECT state FROM leases")) <= {"closed", "released"}

    def freeze(self, worker: psutil.Process) -> None:
        """Suspends it between two transactions: for a minute, others would wait for what it has locked in one."""
        busy = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'"
        while True:
            worker.suspend()
            time.sleep(0.1)  # what the server is executing comes to its end
            if column(self.database, busy) == [1]:  # this one
                return
            worker.resume()
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """Those of this cluster that caption."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            is_ours = (process.info["environ"] or {}).get("SLURM_CONF") == self.cluster.environment["SLURM_CONF"]
            if is_ours and "--member" in (process.info["cmdline"] or []):
                found.append(process)
        return found

    def check(self, n: int) -> None:
        """Everything was captioned once, and the counts are right."""
        assert select(self.database, "SELECT status, count(*) FROM jobs GROUP BY status") == [("done", n)]
        assert self.n_done() == n
        with db.transaction(self.database) as conn:
            assert tallies(conn) == recount(conn)


@pytest.fixture
def job(
    cluster: slurm.Cluster, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Job]:
    monkeypatch.chdir(tmp_path)
    with new_queue(request, "postgresql", tmp_path) as url:
        # Only now: what has the cluster's SLURM_CONF is killed with it, and PostgreSQL may have been started just then.
        for name, value in {**cluster.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("ROCOCAP_DB", url)
        job = Job(cluster, url, tmp_path)
        yield job
        cluster.run("scancel", "--full", "--signal=KILL", "--user=root")
        cluster.until(lambda: not cluster.run("squeue", "--noheader"), "no job left")
        job.database.dispose()


@needs_slurm
@pytest.mark.slow
def test_a_job_on_two_nodes_captions_everything_and_leaves_a_log_for_each_task(job, monkeypatch):
    job.fill(30, model="tests/small")  # a server's, so that no worker loads one
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")  # the options that are given come before the environment
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    given = ("--nodes", "2", "--partition", "main", "--sbatch=--export=ALL")
    with ChatServer() as server:
        told = job.launch(*given, "--engine", "openai", "--base-url", server.url)
        job.until(lambda: job.state() == "COMPLETED", "the job is over")
    assert told == (
        f"Submitted job {job.number}, for run default.\n"
        "Progress:  rococap status --watch\n"
        f"Job:       squeue --job {job.number}\n"
        f"Logs:      tail -F rococap-{job.number}[-_.]*log\n"
        f"Stop:      scancel {job.number}\n"
    )
    job.check(30)
    logs = {path.name: path.read_text() for path in job.folder.glob("*.log")}
    assert sorted(logs) == [f"rococap-{job.number}-0.log", f"rococap-{job.number}-1.log", f"rococap-{job.number}.log"]
    assert logs[f"rococap-{job.number}.log"] == ""


@needs_slurm
@pytest.mark.slow
def test_slurm_would_run_the_script(job):
    job.fill(1)
    text = said("launch", "slurm", "--dry-run", "--nodes", "2", "--gpus-per-node", "2", "--time", "10", "--array", "2")
    done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@needs_slurm
@pytest.mark.slow
def test_what_slurm_refuses_is_told_with_its_reason(job):
    job.fill(1)
    error = refused("launch", "slurm", "--partition", "nowhere")
    assert error.startswith("Slurm refused the job: invalid partition specified: nowhere; Batch job submission failed")
    assert error.endswith("See which partitions there are: sinfo")
    error = refused("launch", "slurm", "--gpus-per-node", "3")
    assert "Requested node configuration is not available" in error
    assert error.endswith("set --nodes and --gpus-per-node: sinfo -o '%P %D %G'")


@needs_slurm
@pytest.mark.torture
def test_a_job_of_an_array_that_is_cancelled_gives_its_pictures_back_and_the_others_finish(job):
    job.fill(1_000)
    job.launch("--array", "2")
    job.until(
        lambda: len(column(job.database, "SELECT DISTINCT worker_id FROM leases WHERE n_done > 0")) == 2, "both work"
    )
    job.cluster.run("scancel", f"{job.number}_1")
    job.until(lambda: job.state(f"{job.number}_1") == "CANCELLED", "one is cancelled")
    job.until(lambda: job.state(f"{job.number}_2") == "COMPLETED", "the other is done", 300)
    job.check(1_000)
    job.check_drained(2)


@pytest.fixture
def a_minute(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A time limit of a minute, shorter than a job may have otherwise, and the signal 40 s before its end."""
    monkeypatch.setattr(launcher, "WARNING_SEC", 40)
    monkeypatch.setattr(launcher, "SLACK_SEC", 15)
    monkeypatch.setattr(launcher, "MIN_WORK_SEC", 20)
    return "--time=1", "--drain-timeout=25"


@needs_slurm
@pytest.mark.torture
def test_a_job_at_its_time_limit_drains_returns_to_the_queue_and_continues(job, a_minute):
    job.fill(1_500)
    job.launch(*a_minute)
    job.until(lambda: job.cluster.job(job.number).get("Restarts") == "1", "the job is requeued", 180)
    n = job.n_done()
    assert 0 < n < 1_500
    job.check_drained(1)
    job.until(lambda: job.n_done() > n, "it continues")


@needs_slurm
@pytest.mark.torture
def test_a_job_at_its_time_limit_is_over_when_nothing_is_left(job, a_minute):
    job.fill(10)
    job.launch("--wait", *a_minute)
    job.until(lambda: job.state() == "COMPLETED", "the job is over", 180)
    assert job.cluster.job(job.number)["Restarts"] == "0"
    job.check(10)


@needs_slurm
@pytest.mark.torture
def test_a_node_that_fails_loses_nothing_although_its_worker_wakes_up_later(job):
    """Slurm cannot reach the old worker, and starts a new one elsewhere: each picture is still captioned once."""
    job.fill(600)
    job.launch("--lease-ttl", "4")
    job.until(lambda: job.n_done() > 0, "it works")
    [old] = job.workers()
    node = job.cluster.job(job.number)["NodeList"]
    job.freeze(old)
    job.cluster.kill_node(node)
    try:
        job.until(lambda: len(job.workers()) == 2, "another worker has started")
        assert job.cluster.job(job.number)["NodeList"] != node
        expired = "SELECT count(*) FROM leases WHERE state = 'expired'"
        job.until(lambda: column(job.database, expired)[0] > 0, "the lease of the old worker has expired")
        old.resume()
        job.until(lambda: job.state() == "COMPLETED", "all is captioned", 300)
        job.check(600)
        job.until(lambda: job.workers() == [], "the old worker has ended, too")
        job.check(600)
    finally:
        job.cluster.start_node(node)
        job.cluster.until(lambda: job.cluster.nodes()[node] in ("idle", "down"), "the node is back")
