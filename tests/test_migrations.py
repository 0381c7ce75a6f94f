import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from alembic.script import ScriptDirectory
from places import ROOT
from steps import downgrade, refusal

from rococap import db, queue
from rococap.engines import Completion, EngineInfo
from rococap.tables import SCHEMA, metadata

NEXT = f"{int(SCHEMA) + 1:04}"
BACKUP = f"queue.db.before-{NEXT}-from-{SCHEMA}"

ROWS = """
INSERT INTO datasets VALUES (1, '/data/rocov2', '', '{"image": "IMG"}');
INSERT INTO shards VALUES (1, 1, 'data/train-00000-of-00001.parquet', 'train', 2, 1, 1000, 'aa');
INSERT INTO images VALUES (1, 1, 'train', 'train_1', 1, 0, 0, 'An X-ray.', 'C0040405');
INSERT INTO images VALUES (2, 1, 'train', 'train_2', 1, 0, 1, 'A CT.', '');
INSERT INTO image_hashes VALUES (1, 'dhash-16', 'ff00'), (2, 'dhash-16', '00ff');
INSERT INTO runs (id, name, dataset_id, recipe, recipe_hash, created_at) VALUES (1, 'default', 1, '{}', 'bb', 5);
INSERT INTO parts VALUES (1, 'train', 1, 2);
INSERT INTO workers (id, uuid, host, pid, device, engine, versions, started_at, seen_at)
    VALUES (1, 'cc', 'host', 1, 'cpu', 'hf', '{}', 5, 5);
INSERT INTO leases (id, worker_id, run_id, split, lane, state, n_jobs, claimed_at, beat_at, expires_at, closed_at)
    VALUES (1, 1, 1, 'train', 0, 'closed', 1, 5, 5, 9, 7), (2, 1, 1, 'train', 0, 'expired', 1, 5, 5, 9, 9),
           (3, 1, 1, 'train', 0, 'released', 1, 5, 5, 9, 9);
INSERT INTO jobs (id, run_id, image_id, split, status, finished_at) VALUES (1, 1, 1, 'train', 'done', 7);
INSERT INTO jobs (id, run_id, image_id, split, status) VALUES (2, 1, 2, 'train', 'pending');
INSERT INTO captions (job_id, lease_id, text, generated_at) VALUES (1, 1, 'A chest X-ray.', 7);
INSERT INTO scores VALUES (1, 'cider_d', 'dd', '{"cider_d": 1.5}');
INSERT INTO failures VALUES (1, 2, 2, 'crash', 'The worker died.', 9);
INSERT INTO tallies VALUES (1, 'train', 'done', 0, 1), (1, 'train', 'pending', 0, 1);
INSERT INTO reviews VALUES (1, 'e1', 1, 'ann', 'minor', 'side', 'It is the left lung.', 8);
INSERT INTO edits VALUES (1, 'f1', 1, 'ann', 'A CT.', 'A chest X-ray.', NULL, 'a1', 8),
                         (2, 'f2', 1, 'bob', 'A chest X-ray.', 'A CT.', 1, NULL, 9);
INSERT INTO studies VALUES (1, 'one', 'train', 1, 1, 0, '{}', 8);
INSERT INTO study_items VALUES (1, 1, 1, 1, 1, 1, 'CT', 1), (2, 1, 1, 1, 2, 1, 'CT', NULL);
INSERT INTO study_readers VALUES (1, 1, 'ann', 8);
INSERT INTO ratings VALUES (1, 1, 1, 1, '{"preference": 1}', 8, 9);
INSERT INTO unblindings VALUES (1, 'ann', 0, 9);
DELETE FROM leases WHERE id = 3;
"""
TABLES = sorted(metadata.tables)


def raw(path):
    return closing(sqlite3.connect(path, timeout=0, isolation_level=None))


def query(path, sql):
    with raw(path) as connection:
        return connection.execute(sql).fetchall()


def rows_of(path):
    return {table: query(path, f"SELECT * FROM {table} ORDER BY 1, 2, 3") for table in TABLES}


def normalised(sql):
    """SQL without what two writers of one table may do differently: whitespace, quotes, the constraints' order."""
    sql = re.sub(r"\s*([(),])\s*", r"\1", re.sub(r"\s+", " ", sql.replace('"', ""))).strip()
    body, bracket, end = sql.rpartition(")")
    start, *constraints = body.split(",CONSTRAINT ")
    return ",CONSTRAINT ".join([start, *sorted(constraints)]) + bracket + end


def schema_of(path):
    """(type, name) -> SQL of all tables and indexes but alembic's own; constraints' own indexes have no SQL."""
    rows = query(path, "SELECT type, name, sql FROM sqlite_master WHERE tbl_name != 'alembic_version'")
    return {(kind, name): sql and normalised(sql) for kind, name, sql in rows}


def columns(path, table):
    return [name for (name,) in query(path, f"SELECT name FROM pragma_table_info('{table}')")]


@pytest.fixture
def path(tmp_path, url):
    """A database of this schema with a row in every table; the last lease id was 3, and is gone."""
    path = tmp_path / "queue.db"
    with raw(path) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.executescript(ROWS)
    return path


@pytest.fixture
def engine(tmp_path):
    """An engine on a file that does not exist yet."""
    engine = db.connect(f"sqlite:///{tmp_path}/new.db", create=False)
    yield engine
    engine.dispose()


@pytest.fixture
def next_schema(tmp_path, monkeypatch):
    """Makes this rococap one of the next schema, by the body of its upgrade(); the folder's name is awkward."""

    def make(*upgrade):
        folder = tmp_path / "50% of the migrations"
        shutil.copytree(ROOT / "migrations", folder, ignore=shutil.ignore_patterns("__pycache__"))
        lines = ["import sqlalchemy as sa", "from alembic import op"]
        lines += [f"revision = '{NEXT}'", f"down_revision = '{SCHEMA}'"]
        lines += ["def upgrade():", *(f"    {line}" for line in upgrade), "def downgrade():", "    pass"]
        (folder / "versions" / f"{NEXT}_the_next.py").write_text("\n".join(lines))
        monkeypatch.setattr(db, "migrations_dir", lambda: folder)
        monkeypatch.setattr(db, "SCHEMA", NEXT)

    return make


# --- The migrations and the models -----------------------------------------------------------------------------


def test_the_migrations_have_one_head_and_it_is_what_the_code_needs():
    assert ScriptDirectory(str(db.migrations_dir())).get_heads() == [SCHEMA]


def test_the_migrations_of_a_checkout_are_beside_the_package():
    assert db.migrations_dir() == ROOT / "migrations"


def test_up_down_and_up_again_gives_the_same_schema(engine, tmp_path):
    path = tmp_path / "new.db"
    db.upgrade(engine)
    first = schema_of(path)
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
    assert sorted(name for kind, name in first if kind == "table") == sorted([*TABLES, "sqlite_sequence"])
    downgrade(engine, "base")
    assert set(schema_of(path)) <= {("table", "sqlite_sequence")}
    assert query(path, "SELECT version_num FROM alembic_version") == []
    db.upgrade(engine)
    assert schema_of(path) == first


def test_each_step_down_and_up_gives_the_same_schema(engine, tmp_path):
    path = tmp_path / "new.db"
    steps = [script.revision for script in ScriptDirectory(str(db.migrations_dir())).walk_revisions()][::-1]
    schemas = {}
    for revision in steps:
        db.upgrade(engine, revision)
        schemas[revision] = schema_of(path)
    for revision in steps[-2::-1]:
        downgrade(engine, revision)
        assert schema_of(path) == schemas[revision]
    downgrade(engine, "base")
    assert set(schema_of(path)) <= {("table", "sqlite_sequence")}


def test_a_database_at_base_is_empty_and_is_given_its_tables(engine, tmp_path):
    db.upgrade(engine)
    downgrade(engine, "base")
    db.connect(str(engine.url.database)).dispose()
    assert query(tmp_path / "new.db", "SELECT version_num FROM alembic_version") == [(SCHEMA,)]


def test_the_migrations_make_what_the_models_say_word_for_word(engine, tmp_path):
    """Autogenerate is blind to CHECKs, partial indexes and STRICT; the text is not."""
    models = db.connect(f"sqlite:///{tmp_path}/models.db", create=False)
    with db.transaction(models, write=True) as conn:
        metadata.create_all(conn)
    models.dispose()
    db.upgrade(engine)
    migrated, modelled = schema_of(tmp_path / "new.db"), schema_of(tmp_path / "models.db")
    assert sorted(migrated) == sorted(modelled)
    for key, sql in modelled.items():
        assert migrated[key] == sql, key


def test_every_table_is_strict_and_only_lease_ids_are_never_used_again(path):
    sql = {name: text for (kind, name), text in schema_of(path).items() if kind == "table" and name in TABLES}
    assert len(sql) == 20
    assert {name: text.endswith(")STRICT") for name, text in sql.items()} == dict.fromkeys(sql, True)
    assert [name for name, text in sql.items() if "AUTOINCREMENT" in text] == ["leases"]
    assert "(id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT," in sql["leases"]


def test_every_check_is_in_the_database(path):
    checks = {}
    for (kind, _), text in schema_of(path).items():
        if kind == "table" and text:
            parts = re.split(r",?CONSTRAINT ", text)
            checks |= dict(part.split(" CHECK", 1) for part in parts if part.startswith("ck_"))
    assert {name: text.removesuffix(")STRICT") for name, text in checks.items()} == {
        name: normalised(text)
        for name, text in {
            "ck_leases_state": "(state IN ('open', 'closed', 'released', 'expired'))",
            "ck_leases_closed": "((state = 'open') = (closed_at IS NULL))",
            "ck_jobs_status": "(status IN ('pending', 'leased', 'waiting', 'done', 'failed', 'cancelled'))",
            "ck_jobs_lease": "((status = 'leased') = (lease_id IS NOT NULL))",
            "ck_jobs_not_before": "((status = 'waiting') = (not_before IS NOT NULL))",
            "ck_jobs_finished_at": "((status IN ('done', 'failed', 'cancelled')) = (finished_at IS NOT NULL))",
            "ck_jobs_checkpoint": "(checkpoint IS NULL OR status = 'done')",
            "ck_reviews_verdict": "(verdict IN ('correct', 'minor', 'major', 'unusable'))",
            "ck_ratings_shown_at": "(at >= shown_at)",
        }.items()
    }


def test_every_index_is_in_the_database_with_its_condition(path):
    indexes = {
        name: text.split(" ON ")[1] for (kind, name), text in schema_of(path).items() if kind == "index" and text
    }
    assert indexes == {
        "ix_edits_act": "edits(act)WHERE act IS NOT NULL",
        "ix_edits_job_id_at_uuid": "edits(job_id,at,uuid)",
        "ix_failures_job_id": "failures(job_id)",
        "ix_jobs_checkpoint": "jobs(run_id,split,checkpoint)WHERE checkpoint IS NOT NULL",
        "ix_jobs_due": "jobs(run_id,split,finished_at)WHERE status = 'done' AND checkpoint IS NULL",
        "ix_jobs_failed": "jobs(run_id,split)WHERE status = 'failed'",
        "ix_jobs_leased": "jobs(lease_id)WHERE lease_id IS NOT NULL",
        "ix_jobs_pending": "jobs(run_id,split,crashes,id)WHERE status = 'pending'",
        "ix_jobs_waiting": "jobs(not_before)WHERE status = 'waiting'",
        "ix_leases_closed_at": "leases(closed_at)",
        "ix_leases_expires_at": "leases(expires_at)WHERE state = 'open'",
        "ix_leases_origin": "leases(origin_uuid,origin_id)WHERE origin_id IS NOT NULL",
        "ix_ratings_study_id_reader_number_position": "ratings(study_id,reader_number,position)",
        "ix_reviews_job_id_at_uuid": "reviews(job_id,at,uuid)",
        "ix_study_items_job_id": "study_items(job_id)",
    }


def test_a_strict_table_refuses_text_for_a_number(path):
    with raw(path) as connection, pytest.raises(sqlite3.IntegrityError, match=r"cannot store TEXT value in INTEGER"):
        connection.execute("UPDATE jobs SET attempts = 'many'")


# --- alembic's own command -------------------------------------------------------------------------------------


def alembic(url, *args):
    return subprocess.run(
        [sys.executable, "-m", "alembic", *args],
        cwd=ROOT,
        env={**os.environ, "ROCOCAP_DB": url},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("folder", ["plain", "100 % of it"])
def test_alembic_upgrades_the_database_that_the_environment_names(tmp_path, folder):
    path = tmp_path / folder / "queue.db"
    path.parent.mkdir()
    upgraded = alembic(f"sqlite:///{path}", "upgrade", "head")
    assert (upgraded.returncode, upgraded.stderr) == (0, "")
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
    assert query(path, "SELECT count(*) FROM jobs") == [(0,)]


def test_alembic_finds_no_difference_between_database_and_models(url):
    checked = alembic(url, "check")
    assert (checked.returncode, checked.stdout) == (0, "No new upgrade operations detected.\n")


# --- Upgrading -------------------------------------------------------------------------------------------------

ADD_COLUMNS = (
    "op.add_column('jobs', sa.Column('note', sa.Text()))",
    "op.add_column('leases', sa.Column('gpu_ms', sa.REAL(), server_default='0', nullable=False))",
)


def test_a_current_database_has_nothing_to_migrate(path, url, tmp_path):
    content = path.read_bytes()
    assert not db.migrate(url).upgraded
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["queue.db"]


def test_a_current_database_has_nothing_to_migrate_even_while_workers_run(path, url):
    with raw(path) as connection:
        connection.execute("UPDATE leases SET state = 'open', closed_at = NULL")
    assert not db.migrate(url).upgraded


def test_migrating_a_database_that_does_not_exist_creates_it(tmp_path):
    assert db.migrate(f"sqlite:///{tmp_path}/new.db") == db.Migrated(True)
    assert query(tmp_path / "new.db", "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
    assert [file.name for file in tmp_path.iterdir()] == ["new.db"]


def test_migrating_keeps_every_row_and_the_lease_sequence(path, url, next_schema):
    next_schema(*ADD_COLUMNS)
    before = rows_of(path)
    db.migrate(url)
    assert query(path, "SELECT version_num FROM alembic_version") == [(NEXT,)]
    after = rows_of(path)
    assert after.pop("jobs") == [(*row, None) for row in before.pop("jobs")]
    assert after.pop("leases") == [(*row, 0.0) for row in before.pop("leases")]
    assert after == before
    lease = (
        "INSERT INTO leases (worker_id, run_id, split, lane, state, n_jobs, claimed_at, beat_at, expires_at) "
        "VALUES (1, 1, 'train', 0, 'open', 1, 5, 5, 9) RETURNING id"
    )
    assert query(path, lease) == [(4,)]


def test_a_migrated_database_opens(url, path, next_schema):
    next_schema(*ADD_COLUMNS)
    db.migrate(url)
    db.connect(url).dispose()
    assert not db.migrate(url).upgraded


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_the_backup_is_the_database_as_it_was(path, url, tmp_path, next_schema, journal):
    with raw(path) as connection:
        assert connection.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
    next_schema(*ADD_COLUMNS)
    rows, schema = rows_of(path), schema_of(path)
    backup = db.migrate(url).backup
    assert backup == tmp_path / BACKUP
    assert (rows_of(backup), schema_of(backup)) == (rows, schema)
    assert query(backup, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
    assert query(backup, "PRAGMA integrity_check") == [("ok",)]
    assert "note" in columns(path, "jobs")
    assert not list(tmp_path.glob("*.part*"))


def test_a_backup_that_was_cut_off_is_made_anew(path, url, tmp_path, next_schema):
    next_schema(*ADD_COLUMNS)
    (tmp_path / f"{BACKUP}.part").write_bytes(b"")
    rows = rows_of(path)
    assert rows_of(db.migrate(url).backup) == rows


def test_a_backup_that_cannot_be_made_stops_the_upgrade_with_a_reason(path, url, tmp_path, next_schema):
    next_schema(*ADD_COLUMNS)
    (tmp_path / f".{BACKUP}.part").mkdir()
    message = refusal(db.migrate, url)
    assert message.startswith(f"The copy {tmp_path / BACKUP} cannot be written (")
    assert "nothing was changed. Check the folder's permissions and the disk" in message
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]


def test_migrating_is_refused_while_leases_are_open(path, url, tmp_path, next_schema):
    next_schema(*ADD_COLUMNS)
    in_a_minute = int(time.time() * 1000) + 60_000
    with raw(path) as connection:
        connection.execute("UPDATE leases SET state = 'open', closed_at = NULL, expires_at = ?", (in_a_minute,))
    content = path.read_bytes()
    assert refusal(db.migrate, url) == (
        "Open leases: 2. Stop the workers (or wait until their leases expire), then migrate."
    )
    assert path.read_bytes() == content
    assert not list(tmp_path.glob("*.before-*"))


def test_a_lease_that_expired_and_was_never_reaped_does_not_stop_a_migration(path, url, next_schema):
    """Its worker was killed; no worker of this version can start on the old schema to reap it."""
    next_schema(*ADD_COLUMNS)
    with raw(path) as connection:
        connection.execute("UPDATE leases SET state = 'open', closed_at = NULL WHERE id = 1")
    db.migrate(url)
    assert query(path, "SELECT version_num FROM alembic_version") == [(NEXT,)]
    assert query(path, "SELECT state FROM leases ORDER BY id") == [("open",), ("expired",)]


def test_a_newer_database_is_not_migrated(path, url, tmp_path):
    with raw(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0099'")
    assert refusal(db.migrate, url) == (
        f"{url} has schema 0099, from a newer version of rococap than this one ({SCHEMA}). "
        "Upgrade rococap, or name another database with --db."
    )
    assert not list(tmp_path.glob("*.before-*"))


def test_somebody_elses_database_is_not_migrated(tmp_path):
    path = tmp_path / "photos.db"
    query(path, "CREATE TABLE albums (id INTEGER)")
    assert refusal(db.migrate, f"sqlite:///{path}") == (
        f"{path} contains other tables (albums) and is not a rococap database. Name another with --db."
    )


def test_a_file_that_is_no_database_is_not_migrated(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("image_id,caption\n" * 1000)
    assert refusal(db.migrate, f"sqlite:///{path}") == (
        f"sqlite:///{path} is not an SQLite database, or is damaged (file is not a database). Name another with --db."
    )


def test_upgrading_waits_for_a_database_that_is_locked(path, url, next_schema):
    """Also on a connection that is new: its pragmas read the file."""
    next_schema(*ADD_COLUMNS)
    engine = db.connect(url, create=False)
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as outsider:
        outsider.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.3, outsider.execute, ["COMMIT"])
        timer.start()
        try:
            db.upgrade(engine)
        finally:
            timer.join()
    engine.dispose()
    assert query(path, "SELECT version_num FROM alembic_version") == [(NEXT,)]


# --- A migration that goes wrong -------------------------------------------------------------------------------


def unchanged_by(url, path, fail):
    before = (rows_of(path), schema_of(path))
    engine = db.connect(url, create=False)
    fail(engine)
    assert (rows_of(path), schema_of(path)) == before
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
    with engine.connect() as conn:
        assert conn.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
    with db.transaction(engine, write=True) as conn:
        db.execute(conn, "UPDATE runs SET paused = 1")
    engine.dispose()


def test_a_migration_that_breaks_a_foreign_key_is_rolled_back(path, url, next_schema):
    next_schema(*ADD_COLUMNS, "op.execute('DELETE FROM workers')")

    def fail(engine):
        assert refusal(db.upgrade, engine) == ("The migration would break foreign keys of leases: nothing was changed.")

    unchanged_by(url, path, fail)


def test_a_migration_that_raises_half_way_is_rolled_back(path, url, next_schema):
    next_schema(*ADD_COLUMNS, "raise RuntimeError('half-way')")

    def fail(engine):
        with pytest.raises(RuntimeError, match=r"^half-way$"):
            db.upgrade(engine)

    unchanged_by(url, path, fail)


def test_a_migration_that_fails_leaves_its_backup(path, url, tmp_path, next_schema):
    next_schema("raise RuntimeError('half-way')")
    rows = rows_of(path)
    with pytest.raises(RuntimeError, match=r"^half-way$"):
        db.migrate(url)
    assert rows_of(tmp_path / BACKUP) == rows


# --- Foreign keys ----------------------------------------------------------------------------------------------


def foreign_keys(engine):
    with engine.connect() as conn:
        return conn.exec_driver_sql("PRAGMA foreign_keys").scalar_one()


def test_foreign_keys_are_off_during_a_migration_and_on_again_after_it(url):
    engine = db.connect(url)
    with db.migration_connection(engine) as conn:
        assert conn.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 0
    assert foreign_keys(engine) == 1
    engine.dispose()


def test_a_table_that_a_migration_rebuilds_keeps_its_children(path, url, next_schema):
    next_schema(
        "with op.batch_alter_table('runs') as batch:",
        "    batch.alter_column('recipe_hash', new_column_name='digest', existing_type=sa.Text())",
    )
    before = rows_of(path)
    db.migrate(url)
    assert "digest" in columns(path, "runs")
    assert rows_of(path) == before
    with raw(path) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY constraint failed"):
            connection.execute("DELETE FROM runs")


# --- releases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", sorted(path.stem for path in (ROOT / "tests" / "schemas").glob("*.sql")))
def test_a_populated_database_of_each_release_is_upgraded_with_its_rows_and_goes_on(tmp_path, release):
    path = tmp_path / "queue.db"
    with raw(path) as connection:
        connection.executescript((ROOT / "tests" / "schemas" / f"{release}.sql").read_text())
        tables = {table: columns(path, table) for table in TABLES if columns(path, table)}
    before = {table: query(path, f"SELECT {', '.join(names)} FROM {table}") for table, names in tables.items()}
    assert all(before.values()), "every table of the release holds something"
    migrated = db.migrate(f"sqlite:///{path}")
    assert migrated.upgraded == (release != SCHEMA)
    assert query(path, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
    if migrated.backup:
        assert query(migrated.backup, "SELECT version_num FROM alembic_version") == [(release,)]
    after = {table: query(path, f"SELECT {', '.join(names)} FROM {table}") for table, names in tables.items()}
    assert after == before
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    assert query(path, "PRAGMA foreign_key_check") == []
    engine = db.connect(f"sqlite:///{path}")
    with db.transaction(engine, write=True) as conn:
        assert queue.reap(conn) == [4]
        worker = queue.register_worker(conn, "new", "host", 1, EngineInfo("small", {}, "m", "", "none", "cpu", ""))
        lease = queue.claim(conn, worker, 1, "train", 2, ttl_ms=60_000)
        assert lease.id == 5, "an id of a lease was used again"
        queue.complete(conn, lease, [Completion(job.id, "A caption.") for job in lease.jobs])
        assert [one.done for one in queue.counts(conn)] == [9, 0]
    engine.dispose()


FIRST = (ROOT / "tests" / "schemas" / "0001.sql").read_text()


def test_the_first_release_is_upgraded_by_the_command_and_its_workers_are_seen_without_measurements(tmp_path):
    path = tmp_path / "queue.db"
    with raw(path) as connection:
        connection.executescript(FIRST)
    url = f"sqlite:///{path}"
    command = [sys.executable, "-m", "rococap", "--db", url, "migrate"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"queue.db.before-{SCHEMA}-from-0001" in told
    engine = db.connect(url)
    with db.transaction(engine) as conn:
        assert [one.telemetry for one in queue.list_workers(conn, everyone=True)] == [None, None]
    engine.dispose()


def test_going_back_to_the_first_schema_and_on_again_keeps_every_row(tmp_path):
    path = tmp_path / "queue.db"
    with raw(path) as connection:
        connection.executescript(FIRST)
    schema = schema_of(path)
    engine = db.connect(f"sqlite:///{path}", create=False)
    db.upgrade(engine)
    rows = rows_of(path)
    downgrade(engine, "0001")
    assert schema_of(path) == schema
    db.upgrade(engine)
    assert rows_of(path) == rows
    engine.dispose()
