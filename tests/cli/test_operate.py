"""The commands that operate a queue, as a person types them."""

import json
import shlex
import sqlite3
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from samples import fill
from small_engine import INFO
from sqlalchemy import Engine
from steps import invoke, refused, said, statuses

from rococap import db, queue, urls
from rococap.engines import Completion, Failure
from rococap.queue import Claim, Run, Telemetry, Timing

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def database(here: Path) -> Engine:
    return db.connect("rococap.db")


@pytest.fixture
def run(database: Engine, here: Path) -> Run:
    return fill(database, here / "set", 8)


def claim(database: Engine, run: Run, most: int = 4, *, ttl_ms: int = 60_000, name: str = "one") -> Claim:
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, name, "host", 17, INFO)
        lease = queue.claim(conn, worker, run.id, "train", most, ttl_ms=ttl_ms)
    assert lease is not None
    return lease


def test_a_paused_run_says_so_until_it_is_resumed(database, run):
    assert said("pause") == "default: paused. To resume: rococap resume\n"
    assert "default is paused. To resume: rococap resume" in said("status")
    assert json.loads(said("status", "--json"))["runs"][0]["paused"] is True
    assert said("resume") == "default: resumed. Workers may claim its pictures again.\n"
    assert "paused" not in said("status")
    assert refused("pause", "--run", "x") == "There is no run 'x'. Runs: default."


def test_cancel_withdraws_also_what_is_held(database, run):
    claim(database, run)
    assert said("cancel", "--all") == "default: 8 cancelled. Undo: rococap retry --cancelled\n"
    assert said("leases") == "No lease is open.\n"


def test_reap_frees_leases_whose_time_has_run_out(database, run):
    claim(database, run, ttl_ms=60_000)
    assert said("reap") == "No lease has expired. Open leases: 1. To list them: rococap leases\n"
    claim(database, run, ttl_ms=0, name="two")
    assert said("reap") == "Leases released: 1. Their pictures are pending again.\n"
    assert statuses(database) == {"leased": 4, "pending": 4}


def test_reap_says_when_there_is_nothing_to_free(database, run):
    assert said("reap") == "No lease has expired.\n"


def test_reap_of_a_named_lease_does_not_wait_for_its_time(database, run):
    lease = claim(database, run)
    assert said("reap", "--lease", str(lease.id)) == "Leases released: 1. Their pictures are pending again.\n"
    assert refused("reap", "--lease", str(lease.id)) == (
        f"Not an open lease: {lease.id}. To list the open ones: rococap leases"
    )


def test_leases_tell_who_holds_what(database, run):
    lease = claim(database, run)
    with db.transaction(database, write=True) as conn:
        queue.complete(conn, lease, [Completion(lease.jobs[0].id, "A caption.")])
    header, row = (line.split() for line in said("leases").splitlines())
    assert header == ["lease", "worker", "process", "run", "split", "lane", "state", "done", "age", "beat", "left"]
    assert row[:8] == ["1", "1", "host:17", "default", "train", "normal", "open", "1/4"]
    (one,) = json.loads(said("leases", "--json"))
    assert (one["jobs"], one["done"], one["state"]) == (4, 1, "open")
    assert 0 < one["expires_in_sec"] <= 60
    said("reap", "--lease", "1")
    assert said("leases") == "No lease is open.\n"
    assert " expired " in said("leases", "--last", "5")


def test_workers_tell_who_runs_and_all_who_ever_did(database, run):
    lease = claim(database, run)
    assert said("workers").splitlines()[1].split()[:5] == ["1", "host:17", "cpu", "running", "0"]
    with db.transaction(database, write=True) as conn:
        queue.stop_worker(conn, lease.worker_id, now=0)
    assert said("workers") == "No worker is running. Start one: rococap worker\n"
    assert json.loads(said("workers", "--all", "--json"))[0]["state"] == "stopped"


# --- what workers measure --------------------------------------------------------------------------------------

GPU = Telemetry(
    captioning_sec=4_000.0,
    pictures_per_sec=123.456,
    new_tokens_per_sec=12_345.6,
    fill=1.0,
    busy=0.987,
    waited_sec=400.0,
    batch_size=128,
    memory_mb=5_000.0,
    gpu_memory_mb=71_234.5,
    gpu_memory_total_mb=85_029.0,
    gpu_utilisation=0.97,
)
CPU = replace(GPU, pictures_per_sec=0.02, gpu_memory_mb=None, gpu_memory_total_mb=None, gpu_utilisation=None)


def beat(
    database: Engine, name: str, telemetry: Telemetry | None, *, host: str = "host", device: str = "cuda:0"
) -> int:
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, name, host, 31_415, replace(INFO, device=device))
        queue.heartbeat(conn, worker, [], ttl_ms=60_000, telemetry=telemetry)
    return worker


def test_status_tells_what_workers_measure_or_measured_last_and_the_rates_of_those_that_run_together(database, run):
    beat(database, "one", GPU)
    assert "together" not in said("status")
    beat(database, "two", CPU, device="cpu")
    beat(database, "new", None)
    stopped = beat(database, "gone", GPU)
    with db.transaction(database, write=True) as conn:
        queue.stop_worker(conn, stopped)
    lost = beat(database, "lost", GPU)
    with db.transaction(database, write=True) as conn:
        db.execute(conn, "UPDATE workers SET lease_ttl_ms = 1, seen_at = seen_at - 60000 WHERE id = ?", (lost,))
    _, table = said("status").split("\n\n")
    assert table == (
        "worker      device  state    done   pic/s  tok/s  fill %  wait %  mem GB\n"
        "host:31415  cuda:0  running     0  123.46  12346     100      10    71.2\n"
        "host:31415  cpu     running     0    0.02  12346     100      10     5.0\n"
        "host:31415  cuda:0  running     0       -      -       -       -       -\n"
        "host:31415  cuda:0  stopped     0  123.46  12346     100      10    71.2\n"
        "host:31415  cuda:0  lost        0       -      -       -       -       -\n"
        "2 workers together: 123.48 pictures/s\n"
    )


def test_versions_that_run_together_are_told_with_the_processes_of_the_rarer(database, run):
    def versions(version: str) -> dict[str, str]:
        return {"rococap": version, "torch": "2.9.0"}

    def register(pid: int, version: str) -> int:
        info = replace(INFO, versions=versions(version))
        with db.transaction(database, write=True) as conn:
            return queue.register_worker(conn, str(pid), "host", pid, info)

    for pid in (1, 2, 3):
        register(pid, "0.1.0")
    assert "Versions" not in said("status") + said("workers")
    newer = register(4, "0.2.0")
    told = (
        "Versions of rococap that run together: 0.1.0 (3 workers), 0.2.0 (host:4).\n"
        "To run one version, stop the workers of the others, upgrade them, and start them again.\n"
    )
    assert said("status").endswith(told)
    assert said("workers").endswith(told)
    seen = json.loads(said("status", "--json"))
    assert seen["versions"] == {"0.1.0": 3, "0.2.0": 1}
    assert seen["workers"][-1]["versions"] == json.loads(said("workers", "--json"))[-1]["versions"] == versions("0.2.0")
    for pid in range(5, 30):
        register(pid, "0.1.0")
    assert "together: 0.1.0 (28 workers), 0.2.0 (host:4)." in said("status")
    with db.transaction(database, write=True) as conn:
        queue.stop_worker(conn, newer)
    assert "Versions" not in said("status")


def test_status_tells_what_failed_waits_or_was_cancelled_only_if_something_did(database, run):
    assert "default train:" not in said("status")
    lease = claim(database, run, 3)
    failures = {1: Failure("empty", "No bytes."), 2: Failure("busy", "Later.", transient=True)}
    with db.transaction(database, write=True) as conn:
        queue.fail(conn, lease, failures)
        queue.cancel(conn, run, image_ids=["train_00007"])
    assert said("status").splitlines()[2] == ("default train: 1 failed, 1 waiting, 1 cancelled. Why: rococap failures")


def test_status_fits_80_columns(database, run):
    """With the counts of ROCOv2, a split of the longest name, a long host and a GPU that is full."""
    for name in ("one", "two"):
        beat(database, name, GPU, host="ip-172-31-45-123.eu-central-1.compute.internal")
    n = {"pending": 41_234, "leased": 256, "done": 18_000, "failed": 12, "waiting": 345, "cancelled": 5}
    with db.transaction(database, write=True) as conn:
        queue.tally(conn, run.id, "validation", 0, n)
        worker = db.execute(conn, "SELECT min(id) FROM workers").scalar_one()
        db.execute(conn, "UPDATE workers SET n_done = 59962")
        db.execute(
            conn,
            "INSERT INTO leases (worker_id, run_id, split, lane, state, n_jobs, n_done, claimed_at, beat_at, "
            "expires_at) VALUES (?, ?, 'validation', 0, 'open', 300, 300, ?, 0, 0)",
            (worker, run.id, db.now(conn) - 300_000),
        )
        queue.pause(conn, run, True)
    text = said("status")
    assert "11 h 37 min" in text
    assert "\nip-172-31…:31415  cuda:0  running  59962  123.46  12346 " in text
    assert "default validation: 12 failed, 345 waiting, 5 cancelled. Why: rococap failures" in text
    assert max(map(len, text.splitlines())) <= 80


def test_status_as_json_has_the_telemetry_of_each_worker(database, run):
    beat(database, "one", GPU)
    beat(database, "new", None)
    measured, unmeasured = json.loads(said("status", "--json"))["workers"]
    assert measured["telemetry"] == asdict(GPU)
    assert unmeasured["telemetry"] is None


def test_workers_tell_all_that_was_measured_also_of_those_that_stopped(database, run):
    worker = beat(database, "one", None)
    with db.transaction(database, write=True) as conn:
        queue.stop_worker(conn, worker, telemetry=GPU)
    header, row = (line.split() for line in said("workers").splitlines())
    assert " ".join(header[5:]) == "seen pic/s tok/s fill % wait % mem GB busy % batch of GB gpu %"
    assert row[-9:] == ["123.46", "12346", "100", "10", "71.2", "99", "128", "85.0", "97"]


@pytest.fixture
def five_hundred(database: Engine, run: Run) -> None:
    """Eight workers on each of 62 hosts and four on a last one: a lost one, a stopped one, six slow ones and a CPU."""
    usual, slow = replace(GPU, pictures_per_sec=2.0), replace(GPU, pictures_per_sec=0.9)
    with db.transaction(database, write=True) as conn:
        for n in range(500):
            telemetry = CPU if n == 9 else slow if n in (400, 401, 402, 403, 408, 409) else usual
            info = replace(INFO, device="cpu" if n == 9 else f"cuda:{n % 8}")
            worker = queue.register_worker(conn, f"w{n}", f"node-{n // 8:02}.gpu.example.org", 1_000 + n, info)
            queue.heartbeat(conn, worker, [], ttl_ms=60_000, telemetry=telemetry)
        db.execute(conn, "UPDATE workers SET n_done = 100")
        db.execute(conn, "UPDATE workers SET seen_at = seen_at - 7230000 WHERE pid = 1480")
        db.execute(conn, "UPDATE workers SET stopped_at = seen_at WHERE pid = 1000")


HOSTS = """\
host                     running  lost  stopped  done  pic/s  slowest   pid
node-50.gpu.example.org        8     0        0   800  11.60     0.90  1400
node-51.gpu.example.org        8     0        0   800  13.80     0.90  1408
node-60.gpu.example.org        7     1        0   800  14.00     2.00  1481
node-00.gpu.example.org        7     0        1   800  14.00     2.00  1001
node-01.gpu.example.org        8     0        0   800  14.02     0.02  1009
"""
OUTLIERS = """\

outlier                   pid  device
node-60.gpu.example.org  1480  cuda:0  lost, seen 2 h 00 min ago
node-50.gpu.example.org  1400  cuda:0  0.90 pic/s, below half the median
node-50.gpu.example.org  1401  cuda:1  0.90 pic/s, below half the median
node-50.gpu.example.org  1402  cuda:2  0.90 pic/s, below half the median
node-50.gpu.example.org  1403  cuda:3  0.90 pic/s, below half the median
… and 2 more outliers
"""


@pytest.mark.usefixtures("five_hundred")
def test_status_shows_many_workers_by_host_and_names_those_that_are_lost_or_slow():
    text = said("status")
    _, hosts = text.split("\n\n", maxsplit=1)
    assert hosts.startswith(HOSTS)
    assert hosts.endswith(
        f"… and 53 more hosts. To list them: rococap workers\n498 workers together: 987.42 pictures/s\n{OUTLIERS}"
    )
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.usefixtures("five_hundred")
def test_workers_lists_each_host_of_many_and_each_worker_if_asked():
    lines = said("workers").splitlines()
    assert len({line.split()[0] for line in lines if line.startswith("node-")}) == 63
    assert lines[-1] == "To list each worker: rococap workers --all"
    assert len(said("workers", "--all").splitlines()) == 1 + 500
    assert len(json.loads(said("workers", "--json"))) == len(json.loads(said("status", "--json"))["workers"]) == 500


@pytest.mark.parametrize(("n", "listed"), [(20, 20), (21, 1)])
def test_workers_are_shown_by_host_only_if_there_are_more_than_20(database, n, listed):
    with db.transaction(database, write=True) as conn:
        for number in range(n):
            queue.register_worker(conn, str(number), "host", number, INFO)
    lines = said("workers").split("\n\n")[0].splitlines()
    assert len(lines) == 1 + listed


def test_leases_as_json_have_the_time_of_each_stage(database, run):
    lease = claim(database, run)
    with db.transaction(database, write=True) as conn:
        queue.complete(conn, lease, [Completion(1, "A caption.")], timing=Timing(1.0, 2.0, 3.0, 4.0))
        queue.heartbeat(conn, lease.worker_id, [], ttl_ms=60_000, store_ms={lease.id: 5.0})
    (one,) = json.loads(said("leases", "--json"))
    assert one["timing"] == {"load_ms": 1.0, "prepare_ms": 2.0, "prefill_ms": 3.0, "decode_ms": 4.0, "store_ms": 5.0}


# --- keeping house ---------------------------------------------------------------------------------------------


def test_vacuum_deletes_history_that_is_old_and_replaced_and_never_a_caption(database, run):
    done = claim(database, run, 1)
    with db.transaction(database, write=True) as conn:
        queue.complete(conn, done, [Completion(1, "A caption.")])
    for name in "ab":
        with db.transaction(database, write=True) as conn:
            worker = queue.register_worker(conn, name, "host", 1, INFO)
            lease = queue.claim(conn, worker, run.id, "train", 1, ttl_ms=60_000)
            queue.fail(conn, lease, {2: Failure("network", name, transient=True)}, now=0)
            queue.wake(conn)
    assert said("vacuum") == "Old failures deleted: 1.\n"
    with db.transaction(database) as conn:
        assert db.execute(conn, "SELECT message FROM failures").scalars().all() == ["b"]
        assert db.execute(conn, "SELECT text FROM captions").scalars().all() == ["A caption."]
    claim(database, run, name="busy")
    assert "Workers hold leases, so the file was not shrunk." in said("vacuum")


def test_a_backup_is_the_database_as_it_is_while_a_worker_holds_leases(database, run, here):
    claim(database, run)
    assert said("backup", "copy.db") == "Copied to copy.db\n"
    copy = db.connect("copy.db")
    assert statuses(copy) == statuses(database) == {"leased": 4, "pending": 4}
    with closing(sqlite3.connect("copy.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not list(here.glob(".copy*"))
    assert refused("backup", "rococap.db") == "rococap.db is the database itself. Name another file."
    assert "The copy nowhere/copy.db cannot be written" in refused("backup", "nowhere/copy.db")


def test_a_backup_overwrites_nothing(database, run, here):
    said("backup", "copy.db")
    (here / "notes.txt").write_text("mine")
    (here / "link").symlink_to("nowhere")
    there = (here / "copy.db").read_bytes()
    claim(database, run)
    for name in ("copy.db", "notes.txt", "link"):
        assert refused("backup", name) == (
            f"{name} exists already and was left as it is. Name another file, or move it away."
        )
    assert [(here / "copy.db").read_bytes(), (here / "notes.txt").read_text()] == [there, "mine"]
    assert (here / "link").is_symlink()


def test_force_opens_a_file_on_a_network_file_system(database, here, monkeypatch):
    monkeypatch.setattr(db, "mounts", lambda: f"server:/home {here} nfs4 rw 0 0\n")
    assert "is on a network file system (nfs4)" in refused("status")
    assert said("--force", "status").startswith("Nothing is registered")


# --- printed commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first", [True, False])
def test_a_printed_command_names_the_queue_that_this_one_was_given(here, is_first):
    url = "sqlite:///my\\queue.db"
    claim(db.connect(url), fill(db.connect(url), here / "set", 8))

    def told(*args: str) -> str:
        given = ["--db", url, *args] if is_first else [*args, "--db", url]
        result = invoke(*given)
        return result.stdout + result.stderr

    assert "To resume: rococap --db 'sqlite:///my\\queue.db' resume\n" in told("pause")
    assert "default is paused. To resume: rococap --db 'sqlite:///my\\queue.db' resume\n" in told("status")
    assert told("runs", "--delete", "default", "--yes").endswith(
        " rococap --db 'sqlite:///my\\queue.db' cancel --run default --all\n"
    )
    command = told("pause").rpartition("To resume: ")[2]
    done = invoke(*shlex.split(command)[1:])
    assert (done.exit_code, done.stdout) == (0, "default: resumed. Workers may claim its pictures again.\n")


def test_a_printed_command_repeats_no_password_and_no_environment(database, run):
    assert "To resume: rococap resume\n" in said("pause")
    for url in ("postgresql+psycopg://me:secret@host/x", "postgresql://host/x?password=secret"):
        assert urls.holds_password(url)
    for url in ("postgresql+psycopg://me@host/x", "sqlite:///a:b.db", "/work/password=/x.db", "postgresql:///x"):
        assert not urls.holds_password(url)
