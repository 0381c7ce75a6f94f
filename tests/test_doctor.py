"""What doctor finds, each damaged for real. A queue in order stands at the beginning of every test."""

import json
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import namedtuple
from contextlib import closing

import pytest
import torch
from huggingface_hub import constants
from postgres import of_encoding
from samples import fill, register, write_shard

from rococap import db, doctor, queue, tables
from rococap.data import Dataset
from rococap.doctor import FAIL, OK, SKIP, WARN
from rococap.engines import Completion, EngineInfo, Failure
from rococap.errors import DatasetError
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe
from rococap.worker import spool

INFO = EngineInfo("small", {"rococap": "0"}, "tests/small", "", "float32", "cpu", "digest")
COMMIT = "5d66908" + 33 * "0"
NAMES = [
    *("database", "file system", "disk", "schema", "integrity"),
    *("tallies", "leases", "captions", "device", "data set", "model", "spool"),
]
NEED_TABLES = {"tallies", "leases", "captions", "data set", "model"}
ON_EVERY_DATABASE = pytest.mark.every_database


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path):
    return tmp_path / "set"


@pytest.fixture
def path(tmp_path, url):
    return tmp_path / "queue.db"


@pytest.fixture
def engine(url):
    engine = db.connect(url, create=False, force=True)
    yield engine
    engine.dispose()


@pytest.fixture
def run(engine, root, model):
    """Twenty pictures: two done, one failed, one leased, the others pending."""
    run = fill(engine, root, 20, recipe=Recipe(model=str(model)))
    with db.transaction(engine, write=True) as conn:
        worker = queue.register_worker(conn, "one", "host", 1, INFO)
        lease = queue.claim(conn, worker, run.id, "train", 4, ttl_ms=600_000)
        queue.complete(conn, lease, [Completion(1, "One."), Completion(2, "Two.")])
        queue.fail(conn, lease, {3: Failure("unreadable", "no")})
    return run


def examined(engine):
    checks = list(doctor.examine(engine))
    assert all(check.found and "\n" not in check.found for check in checks)
    return checks


def found(engine, name):
    """(verdict, text) of the one check of that name."""
    [check] = [check for check in examined(engine) if check.name == name]
    return check.verdict, check.found


def verdicts(engine):
    return {check.name: check.verdict for check in examined(engine)}


def damage(engine, *statements):
    with db.transaction(engine, write=True) as conn:
        for sql in statements:
            assert db.execute(conn, sql).rowcount > 0


def raw(path, sql):
    """Without foreign keys, which only our own connections keep."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(sql).fetchall()


@pytest.fixture
def finished(engine, run):
    """The same, with nothing left to do."""
    with db.transaction(engine, write=True) as conn:
        queue.cancel(conn, run)
    return run


# --- The whole -------------------------------------------------------------------------------------------------


@ON_EVERY_DATABASE
def test_a_queue_in_order_passes_every_check(engine, run, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 3))
    checks = examined(engine)
    assert [check.name for check in checks] == NAMES
    wrong = {check.name: check.verdict for check in checks if check.verdict in (WARN, FAIL)}
    is_sqlite = engine.dialect.name == "sqlite"
    assert wrong == ({} if is_sqlite else {"database": WARN})  # the server of the tests runs without fsync
    skipped = {check.name for check in checks if check.verdict is SKIP}
    assert skipped == (set() if is_sqlite else {"file system", "disk", "integrity"})


@ON_EVERY_DATABASE
def test_an_empty_queue_has_no_run_to_look_at(engine):
    assert found(engine, "data set") == found(engine, "model")
    assert found(engine, "model") == (
        SKIP,
        "There is no run yet. Register pictures first: rococap enqueue --split train",
    )
    assert found(engine, "tallies") == (OK, "agree with 0 jobs")


@ON_EVERY_DATABASE
def test_a_worker_that_captions_makes_no_false_alarm(engine, root, model):
    run = fill(engine, root, 1_000, recipe=Recipe(model=str(model)))
    stop = threading.Event()

    def caption():
        with db.transaction(engine, write=True) as conn:
            worker = queue.register_worker(conn, "one", "host", 1, INFO)
        while not stop.is_set():
            with db.transaction(engine, write=True) as conn:
                lease = queue.claim(conn, worker, run.id, "train", 4, ttl_ms=600_000)
            first, *others = [job.id for job in lease.jobs]
            with db.transaction(engine, write=True) as conn:
                queue.complete(conn, lease, [Completion(first, "A caption.")])
            with db.transaction(engine, write=True) as conn:
                queue.release(conn, lease, others)

    thread = threading.Thread(target=caption)
    thread.start()
    try:
        for _ in range(10):
            assert FAIL not in verdicts(engine).values()
        assert thread.is_alive()
    finally:
        stop.set()
        thread.join()


def test_importing_it_imports_no_torch():
    code = "import sys, rococap.doctor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- The database and its place --------------------------------------------------------------------------------


def test_an_absent_file_stays_absent(tmp_path):
    path = tmp_path / "queue.db"
    engine = db.connect(f"sqlite:///{path}", create=False)
    assert found(engine, "database") == (
        FAIL,
        f"The file {path} does not exist yet (SQLite {sqlite3.sqlite_version}). "
        "Register pictures first: rococap enqueue --split train",
    )
    expected = {"database": FAIL, "file system": OK, "disk": OK, "device": OK, "spool": OK}
    assert verdicts(engine) == dict.fromkeys(NAMES, SKIP) | expected
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_goes_meanwhile_is_not_made_anew(engine, run, path):
    checks = doctor.examine(engine)
    assert next(checks).verdict is OK
    path.unlink()
    engine.dispose()
    assert {check.name: check.verdict for check in checks}["schema"] is FAIL
    assert not path.exists()


def test_a_file_that_is_no_database_fails(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("image_id,caption\n" * 1000)
    engine = db.connect(f"sqlite:///{path}", create=False)
    assert found(engine, "database") == (
        FAIL,
        f"sqlite:///{path} is not an SQLite database, or is damaged (file is not a database). Name another with --db.",
    )
    assert verdicts(engine)["integrity"] is SKIP


def test_a_server_that_is_away_fails():
    engine = db.connect("postgresql://me@127.0.0.1:1/queue", create=False)
    assert found(engine, "database")[0] is FAIL
    assert {name for name, verdict in verdicts(engine).items() if verdict is OK} == {"device", "spool"}


@pytest.mark.durable
def test_wal_on_a_build_with_the_bug_warns_with_the_command_that_leaves_it(engine, run, path, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 51, 2))
    raw(path, "PRAGMA journal_mode = WAL")
    verdict, told = found(engine, "database")
    assert verdict is WARN
    assert "use a Python with SQLite 3.51.3 (or 3.50.7, 3.44.6)" in told
    tool, file, sql = shlex.split(told.partition("turn WAL off: ")[2])
    engine.dispose()
    assert (tool, raw(file, sql)) == ("sqlite3", [("delete",)])
    assert found(engine, "database") == (
        OK,
        f"SQLite {sqlite3.sqlite_version} (with the WAL bug), journal delete, synchronous full",
    )


def test_an_sqlite_without_strict_tables_fails(engine, monkeypatch):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 0))
    verdict, told = found(engine, "database")
    assert (verdict, "use a Python whose SQLite is 3.37 or newer" in told) == (FAIL, True)


def test_a_server_without_fsync_warns_and_an_old_one_fails(postgres, monkeypatch):
    engine = db.connect(postgres.create(template="empty_queue"), create=False)
    verdict, told = found(engine, "database")
    assert (
        verdict,
        told.endswith("A power failure could damage the database: set fsync = on in postgresql.conf."),
    ) == (WARN, True)
    (ahead,) = re.findall(r"clock ([+-]\d+\.\d) s from", told)
    assert abs(float(ahead)) < 60, "which are seconds, though a busy machine may read the clocks one after the other"
    monkeypatch.setattr(doctor, "OLDEST_POSTGRESQL", 99)
    verdict, told = found(engine, "database")
    assert (verdict, told.endswith("This version is too old: use 99 or newer.")) == (FAIL, True)
    engine.dispose()


def test_a_server_whose_encoding_cannot_hold_captions_fails_once_with_the_command_that_makes_another(postgres):
    engine = db.connect(postgres.create(more=of_encoding("SQL_ASCII")), create=False)
    verdict, told = found(engine, "database")
    assert verdict is FAIL
    assert "has the encoding SQL_ASCII" in told
    assert "createdb --encoding=UTF8 --template=template0 NAME" in told
    assert {name for name, verdict in verdicts(engine).items() if verdict is FAIL} == {"database"}
    engine.dispose()


def test_a_network_file_system_fails(engine, run, monkeypatch):
    monkeypatch.setattr(db, "mounts", lambda: "server:/share / nfs4 rw 0 0\n")
    verdict, told = found(engine, "file system")
    assert (verdict, "is on a network file system (nfs4)" in told) == (FAIL, True)
    assert verdicts(engine)["tallies"] is OK


@pytest.mark.parametrize(
    ("free", "verdict"), [(99_999_999, FAIL), (100_000_000, WARN), (1_999_999_999, WARN), (2_000_000_000, OK)]
)
def test_a_disk_that_fills_up_warns_and_then_fails(engine, run, monkeypatch, free, verdict):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(free))
    assert found(engine, "disk")[0] is verdict


def test_a_disk_without_room_for_a_copy_warns(engine, run, path, monkeypatch):
    monkeypatch.setattr(doctor, "WARN_BELOW", 0)
    monkeypatch.setattr(doctor, "FAIL_BELOW", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(path.stat().st_size - 1))
    assert found(engine, "disk")[0] is WARN


# --- The schema ------------------------------------------------------------------------------------------------


@ON_EVERY_DATABASE
def test_a_newer_schema_fails_and_what_needs_the_tables_is_skipped(engine, run):
    damage(engine, "UPDATE alembic_version SET version_num = '0099'")
    verdict, told = found(engine, "schema")
    assert (verdict, "from a newer version of rococap than this one" in told) == (FAIL, True)
    assert {name for name, verdict in verdicts(engine).items() if verdict is SKIP} >= NEED_TABLES


@ON_EVERY_DATABASE
def test_an_older_schema_fails_with_the_command_that_upgrades_it(engine, run, monkeypatch):
    monkeypatch.setattr(tables, "SCHEMA", "9999")
    verdict, told = found(engine, "schema")
    assert (verdict, told.endswith(" migrate")) == (FAIL, True)
    assert verdicts(engine)["tallies"] is SKIP


def test_an_empty_file_fails_and_gets_no_tables(tmp_path):
    path = tmp_path / "queue.db"
    path.touch()
    engine = db.connect(f"sqlite:///{path}", create=False)
    assert found(engine, "schema") == (
        FAIL,
        "The database is empty. Register pictures first: rococap enqueue --split train",
    )
    engine.dispose()
    assert raw(path, "SELECT * FROM sqlite_master") == []


def test_somebody_elses_database_fails(tmp_path):
    path = tmp_path / "photos.db"
    raw(path, "CREATE TABLE albums (id INTEGER)")
    engine = db.connect(f"sqlite:///{path}", create=False)
    verdict, told = found(engine, "schema")
    assert (verdict, "contains other tables (albums) and is not a rococap database" in told) == (FAIL, True)
    engine.dispose()


# --- The tables ------------------------------------------------------------------------------------------------


def test_bytes_that_were_overwritten_fail_and_the_other_checks_go_on(engine, run, path):
    engine.dispose()
    [(page,)] = raw(path, "SELECT rootpage FROM sqlite_master WHERE name = 'captions'")
    [(size,)] = raw(path, "PRAGMA page_size")
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * 512)
    verdict, told = found(engine, "integrity")
    assert (verdict, told.startswith(f"{path} is damaged (")) == (FAIL, True)
    assert "rococap restore" in told
    assert [name for name, verdict in verdicts(engine).items() if verdict is FAIL] == [
        "integrity",
        "tallies",
        "captions",
    ]


def test_a_reference_to_nothing_fails(engine, run, path):
    raw(path, "DELETE FROM images WHERE id = 20")
    verdict, told = found(engine, "integrity")
    assert (verdict, told.startswith("1 foreign keys are broken, the first from jobs to images.")) == (FAIL, True)


@ON_EVERY_DATABASE
@pytest.mark.parametrize(
    ("sql", "drift"),
    [
        ("DELETE FROM tallies WHERE status = 'done'", "default train done: 0 tallied, 2 counted"),
        ("UPDATE tallies SET n = n + 1 WHERE status = 'failed'", "default train failed: 2 tallied, 1 counted"),
        ("UPDATE jobs SET split = 'test' WHERE id = 2", None),
    ],
)
def test_tallies_that_drifted_fail_and_are_named(engine, run, sql, drift):
    damage(engine, sql)
    verdict, told = found(engine, "tallies")
    drift = drift or "default test done: 0 tallied, 1 counted, default train done: 2 tallied, 1 counted"
    assert (verdict, told) == (
        FAIL,
        f"The counts of `rococap status` are wrong ({drift}). This is a bug in rococap: please report it.",
    )


@ON_EVERY_DATABASE
def test_a_picture_leased_under_no_open_lease_fails_with_what_frees_it(engine, run):
    damage(engine, "UPDATE leases SET state = 'closed', closed_at = 0 WHERE id = 1")
    verdict, told = found(engine, "leases")
    assert verdict is FAIL
    assert "without an open lease, which will never be freed: 1 (train_00003 of run default)" in told
    with db.transaction(engine, write=True) as conn:
        queue.cancel(conn, run, image_ids=["train_00003"])
        queue.retry(conn, run, image_ids=["train_00003"])
    assert found(engine, "leases") == (OK, "0 open")


@ON_EVERY_DATABASE
def test_an_open_lease_that_holds_nothing_fails(engine, run):
    damage(engine, "UPDATE jobs SET status = 'pending', lease_id = NULL WHERE id = 4")
    verdict, told = found(engine, "leases")
    assert (verdict, told.startswith("Open leases without pictures: 1.")) == (FAIL, True)


@ON_EVERY_DATABASE
def test_a_lease_past_its_time_warns_until_it_is_reaped(engine, run):
    damage(engine, "UPDATE leases SET expires_at = 0 WHERE id = 1")
    assert found(engine, "leases") == (
        WARN,
        "Expired leases whose pictures are not freed yet: 1. Free them: rococap reap",
    )
    with db.transaction(engine, write=True) as conn:
        queue.reap(conn)
    assert found(engine, "leases") == (OK, "0 open")


@ON_EVERY_DATABASE
def test_done_without_a_caption_fails(engine, run):
    damage(engine, "DELETE FROM captions WHERE job_id = 2")
    verdict, told = found(engine, "captions")
    assert verdict is FAIL
    assert "done but have no caption: 1 (train_00001 of run default)" in told


@ON_EVERY_DATABASE
def test_a_caption_of_a_picture_that_is_not_done_fails(engine, run):
    damage(
        engine,
        "INSERT INTO captions (job_id, text, generated_at) SELECT id, 'Early.', 0 FROM jobs WHERE id BETWEEN 10 AND 14",
    )
    verdict, told = found(engine, "captions")
    assert verdict is FAIL
    assert "5 (train_00009 of run default, train_00010 of run default, train_00011 of run default)" in told


def test_a_database_that_is_locked_meanwhile_fails_check_by_check(engine, run, path, monkeypatch):
    monkeypatch.setattr(db, "PATIENCE_SEC", 0.1)
    checks = doctor.examine(engine)
    assert next(checks).verdict is OK
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        locked = {check.name: check.verdict for check in checks}
    assert (locked["schema"], locked["integrity"], locked["device"]) == (FAIL, FAIL, OK)


# --- The device ------------------------------------------------------------------------------------------------

Properties = namedtuple("Properties", "name total_memory")


def test_a_machine_without_a_gpu_is_told_what_to_expect(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "NVIDIA", str(tmp_path / "none"))
    verdict, told = found(engine, "device")
    assert (verdict, told.startswith("CPU, dtype auto is float32. ")) == (OK, True)
    assert "minutes per picture" in told


def test_a_gpu_that_torch_cannot_use_warns(engine, monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "NVIDIA", str(tmp_path / "nvidia0"))
    assert found(engine, "device")[0] is WARN


def test_every_gpu_is_named_with_its_memory_and_dtype(engine, monkeypatch):
    properties = [Properties("H100", 79 << 30), Properties("T4", 15 << 30)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties[gpu.index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: [(9, 0), (7, 5)][gpu.index])
    assert [(check.verdict, check.found) for check in examined(engine) if check.name == "device"] == [
        (OK, "cuda:0: H100, 79 GiB, dtype auto is bfloat16"),
        (OK, "cuda:1: T4, 15 GiB, dtype auto is float16"),
    ]


def test_a_torch_that_cannot_be_imported_fails(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    verdict, told = found(engine, "device")
    assert (verdict, told.startswith("PyTorch cannot be used (")) == (FAIL, True)


# --- Data sets -------------------------------------------------------------------------------------------------

AGAIN = "Register it again: rococap enqueue with the same options"


def test_an_altered_shard_fails_until_it_is_registered_anew(engine, run, root, model):
    write_shard(root, "train", range(21))
    assert found(engine, "data set") == (
        FAIL,
        f"{root} differs from what was registered (altered: data/train-00000-of-00001.parquet). {AGAIN}",
    )
    register(engine, root, ["train"], recipe=Recipe(model=str(model)))
    assert found(engine, "data set") == (OK, f"{root}: as registered, 1 shard")


def test_a_data_set_at_another_path_on_this_machine_is_compared_with_what_was_registered(
    engine, run, root, tmp_path, monkeypatch
):
    root.rename(tmp_path / "mounted")
    monkeypatch.setenv("ROCOCAP_DATASET_ROOT", str(tmp_path / "mounted"))
    assert found(engine, "data set") == (OK, f"{root} in {tmp_path}/mounted: as registered, 1 shard")


def test_a_folder_that_is_no_copy_of_the_data_set_is_named_as_a_worker_names_it(
    engine, run, root, tmp_path, monkeypatch
):
    write_shard(tmp_path / "wrong", "train", range(21))
    monkeypatch.setenv("ROCOCAP_DATASET_ROOT", str(tmp_path / "wrong"))
    with pytest.raises(DatasetError) as raised:
        queue.dataset_of(engine, run, ["train"])
    verdict, told = found(engine, "data set")
    assert (verdict, told) == (FAIL, str(raised.value))
    assert told.startswith(f"{tmp_path}/wrong is no copy of the data set of run 'default', {root}: it has another ")
    assert told.endswith(
        f"Name the folder of a copy with --dataset-root or ROCOCAP_DATASET_ROOT, or neither to use {root} itself."
    )


def test_shards_under_other_names_fail(engine, run, root):
    shard = write_shard(root, "train", range(20), "00000-of-00002")
    write_shard(root, "train", range(20, 25), "00001-of-00002")
    shard.with_name("train-00000-of-00001.parquet").unlink()
    assert found(engine, "data set") == (
        FAIL,
        f"{root} differs from what was registered (missing: data/train-00000-of-00001.parquet). {AGAIN}",
    )


def test_a_shard_that_is_gone_fails_by_name(tmp_path, engine, root, model):
    gone = write_shard(root, "train", range(20), "00000-of-00002")
    write_shard(root, "train", range(20, 25), "00001-of-00002")
    register(engine, root, ["train"], recipe=Recipe(model=str(model)))
    gone.unlink()
    verdict, told = found(engine, "data set")
    assert (verdict, "train-00000-of-00002.parquet. Download them" in told) == (FAIL, True)


@pytest.mark.parametrize("first_lost", [1, 2])
def test_a_data_set_registered_in_part_warns(engine, root, path, model, first_lost):
    write_shard(root, "train", range(5), "00000-of-00002")
    write_shard(root, "train", range(5, 9), "00001-of-00002")
    register(engine, root, ["train"], recipe=Recipe(model=str(model)))
    raw(path, f"DELETE FROM shards WHERE id >= {first_lost}")  # as an enqueue leaves it that was killed
    verdict, told = found(engine, "data set")
    assert (verdict, told) == (
        WARN,
        f"{root} is only partly registered: an enqueue is running or was interrupted. {AGAIN}",
    )


def test_each_data_set_is_looked_at_by_itself(engine, run, tmp_path, root, model):
    fill(engine, tmp_path / "other", 3, run="other", recipe=Recipe(model=str(model)))
    shutil.rmtree(root)
    checks = [check for check in examined(engine) if check.name == "data set"]
    assert [(check.verdict, check.found) for check in checks] == [
        (FAIL, f"There is no folder {root}: check the path."),
        (OK, f"{tmp_path / 'other'}: as registered, 1 shard"),
    ]


def test_what_only_a_finished_run_needed_is_no_failure(engine, finished, root, model):
    shutil.rmtree(root)
    shutil.rmtree(model)
    assert found(engine, "data set") == (
        WARN,
        f"There is no folder {root}: check the path. (No unfinished run needs it.)",
    )
    assert found(engine, "model")[0] is WARN


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, and no network."""

    def refuse(*args):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub_run(engine, cache, model):
    """A run on a data set of the hub, whole in the cache."""
    snapshot = cache / "datasets--radiology--roco" / "snapshots" / COMMIT
    write_shard(snapshot, "train", range(5), "00000-of-00002")
    write_shard(snapshot, "train", range(5, 9), "00001-of-00002")
    located = Dataset("radiology/roco", snapshot, COMMIT)
    enqueue(engine, located, ["train"], run="default", recipe=Recipe(model=str(model)))
    return snapshot


def test_a_data_set_of_the_hub_is_looked_for_in_the_cache(engine, hub_run):
    assert found(engine, "data set") == (OK, f"radiology/roco at {COMMIT}: as registered, 2 shards")


def test_an_altered_shard_in_the_cache_fails(engine, hub_run):
    write_shard(hub_run, "train", range(6), "00000-of-00002")
    verdict, told = found(engine, "data set")
    assert (verdict, "(altered: data/train-00000-of-00002.parquet)" in told) == (FAIL, True)


@pytest.mark.parametrize("offline", [False, True])
def test_a_shard_that_is_not_in_the_cache_is_downloaded_unless_offline(engine, hub_run, monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    (hub_run / "data" / "train-00001-of-00002.parquet").unlink()
    verdict, told = found(engine, "data set")
    assert verdict is (FAIL if offline else WARN)
    assert "(it lacks data/train-00001-of-00002.parquet)" in told
    assert ("HF_HUB_OFFLINE is set" in told) is offline
    assert told.endswith(f"hf download --repo-type dataset --revision {COMMIT} radiology/roco") is not offline


# --- Models ----------------------------------------------------------------------------------------------------


def test_a_model_folder_that_is_gone_fails(engine, run, model):
    shutil.rmtree(model)
    verdict, told = found(engine, "model")
    assert (verdict, told.startswith(f"The model folder {model} does not exist.")) == (FAIL, True)


def test_what_is_found_is_one_line(engine, root, tmp_path):
    fill(engine, root, 3, recipe=Recipe(model=f"{tmp_path}/two\nlines"))
    assert f"The model folder {tmp_path}/two lines does not exist." in found(engine, "model")[1]


def test_a_model_folder_that_holds_no_model_fails(engine, run, model):
    (model / "config.json").unlink()
    assert found(engine, "model") == (
        FAIL,
        f"The folder {model} holds no model (it has no config.json). Restore it.",
    )


@pytest.fixture
def hub_model(engine, root, cache):
    """The folder in the cache of the model of a run: a branch, with its weights in two files."""
    fill(engine, root, 3, recipe=Recipe(model="vision/small"))
    repo = cache / "models--vision--small"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "1.safetensors").touch()
    (snapshot / "2.safetensors").touch()
    return snapshot


def test_a_model_of_the_hub_is_looked_for_in_the_cache(engine, hub_model):
    assert found(engine, "model") == (OK, "vision/small at main, in the cache")
    for file in hub_model.glob("*.safetensors*"):
        file.unlink()
    (hub_model / "model.safetensors").touch()
    assert found(engine, "model") == (OK, "vision/small at main, in the cache")


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(
    ("gone", "missing"),
    [
        ("config.json", "config.json"),
        ("2.safetensors", "2.safetensors"),
        ("model.safetensors.index.json", "model.safetensors"),
    ],
)
def test_a_model_that_is_not_whole_in_the_cache_is_downloaded_unless_offline(
    engine, hub_model, monkeypatch, gone, missing, offline
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    (hub_model / gone).unlink()
    verdict, told = found(engine, "model")
    assert (verdict, f"(it lacks {missing})" in told) == (FAIL if offline else WARN, True)


def test_a_cached_file_that_is_no_json_fails(engine, hub_model):
    (hub_model / "model.safetensors.index.json").write_text("{")
    assert found(engine, "model")[0] is FAIL


# --- The spool -------------------------------------------------------------------------------------------------


def test_captions_that_wait_to_be_stored_are_counted(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("ROCOCAP_SPOOL", str(tmp_path / "spool"))
    assert found(engine, "spool") == (OK, f"nothing is waiting in {tmp_path / 'spool'}")
    kept = spool.Spool(tmp_path / "spool", "me")
    kept.add(queue.Lease(1, 1, 1, "train", 0), [Completion(1, "A caption."), Completion(2, "Another.")])
    kept.close()
    verdict, told = found(engine, "spool")
    assert verdict is WARN
    assert told.startswith(f"2 captions are waiting in {tmp_path / 'spool'}. The next worker")
