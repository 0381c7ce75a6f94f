"""The state machine. Every test passes the time in; the database fixture recounts the tallies at the end of each."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from samples import fill
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import IntegrityError
from steps import TTL, claim, column, new_worker, reap, writing

from rococap import db, queue
from rococap.engines import Completion, EngineInfo, Failure
from rococap.errors import LeaseLost, RunError
from rococap.queue import NORMAL, SOLO, SUSPECTS, Claim, Lease, Run, Telemetry, Timing, leases
from rococap.recipe import Recipe

pytestmark = pytest.mark.every_database

INFO = EngineInfo("small", {"rococap": "0"}, "tests/small", "", "float32", "cpu", "digest")
TOLD = Telemetry(
    captioning_sec=90.0,
    pictures_per_sec=12.5,
    new_tokens_per_sec=640.0,
    fill=0.93,
    busy=0.98,
    waited_sec=1.5,
    batch_size=32,
    memory_mb=2_345.6,
    gpu_memory_mb=40_000.0,
    gpu_memory_total_mb=80_000.0,
)


@pytest.fixture
def run(database: Engine, tmp_path: Path) -> Run:
    return fill(database, tmp_path / "set", 20)


def claimed(database: Engine, worker: int, run: Run, most: int = 4, *, lane: int = NORMAL, now: int = 0) -> Claim:
    lease = claim(database, worker, run, most, lane=lane, now=now)
    assert lease is not None
    return lease


def caption(job_id: int, text: str = "A caption.") -> Completion:
    return Completion(job_id, text, prompt_tokens=10, new_tokens=3, processing_ms=12.5, latency_ms=50.0, batch_size=4)


def complete(
    database: Engine, lease: Lease, job_ids: Sequence[int] | None = None, *, now: int = 0, text: str = "A caption."
) -> None:
    ids = [job.id for job in lease.jobs] if job_ids is None else job_ids
    with writing(database) as conn:
        queue.complete(conn, lease, [caption(id, text) for id in ids], now=now)


def ids(lease: Lease) -> list[int]:
    return [job.id for job in lease.jobs]


# --- claim -----------------------------------------------------------------------------------------------------


def test_a_claim_takes_jobs_in_order_and_the_next_claim_others(database, run):
    worker = new_worker(database)
    first, second = claimed(database, worker, run), claimed(database, worker, run)
    assert ids(first) == [1, 2, 3, 4]
    assert ids(second) == [5, 6, 7, 8]
    assert second.id > first.id


def test_a_claim_takes_jobs_after_an_id_first_and_then_from_the_start(database, run):
    worker = new_worker(database)
    with db.transaction(database, write=True) as conn:
        claims = [queue.claim(conn, worker, run.id, "train", 10, ttl_ms=TTL, after=14) for _ in range(4)]
    assert [ids(claim) for claim in claims[:3]] == [[*range(15, 21)], [*range(1, 11)], [*range(11, 15)]]
    assert claims[3] is None


def test_a_claim_names_the_place_of_each_picture(database, run):
    lease = claimed(database, new_worker(database), run, 12)
    place = lease.jobs[11].place
    assert (place.shard, place.split) == ("data/train-00000-of-00001.parquet", "train")
    assert (place.row_group, place.row_in_group, place.image_id) == (1, 1, "train_00011")


def test_a_claim_of_nothing_is_none_and_leaves_no_lease(database, run):
    worker = new_worker(database)
    claimed(database, worker, run, 20)
    assert claim(database, worker, run) is None
    assert column(database, "SELECT count(*) FROM leases") == [1]


def test_a_claim_that_is_rolled_back_leaves_nothing(database, run):
    worker = new_worker(database)

    def claim_and_break() -> None:
        with writing(database) as conn:
            queue.claim(conn, worker, run.id, "train", 4, ttl_ms=TTL)
            raise RuntimeError("after the claim")

    with pytest.raises(RuntimeError, match="after the claim"):
        claim_and_break()
    assert column(database, "SELECT count(*) FROM jobs WHERE status = 'pending'") == [20]
    assert column(database, "SELECT count(*) FROM leases") == [0]


# --- complete --------------------------------------------------------------------------------------------------


def test_a_caption_and_its_jobs_done_are_stored_together(database, run):
    lease = claimed(database, new_worker(database), run)
    complete(database, lease, now=7_000)
    with db.transaction(database) as conn:
        row = db.execute(conn, "SELECT * FROM captions WHERE job_id = 1").mappings().one()
    assert dict(row) == {
        "job_id": 1,
        "lease_id": lease.id,
        "text": "A caption.",
        "flags": "",
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "new_tokens": 3,
        "processing_ms": 12.5,
        "latency_ms": 50.0,
        "batch_size": 4,
        "generated_at": 7_000,
    }
    assert column(database, "SELECT DISTINCT finished_at FROM jobs WHERE status = 'done'") == [7_000]
    assert column(database, "SELECT n_done FROM workers") == [4]


def test_a_lease_is_completed_in_parts_and_closes_with_its_last_job(database, run):
    lease = claimed(database, new_worker(database), run)
    complete(database, lease, [3, 1])
    assert column(database, "SELECT state FROM leases ORDER BY id") == ["open"]
    complete(database, lease, [2, 4], now=9)
    assert column(database, "SELECT state FROM leases ORDER BY id") == ["closed"]
    assert column(database, "SELECT closed_at FROM leases") == [9]
    assert column(database, "SELECT n_done FROM leases") == [4]


def test_completing_is_all_or_nothing(database, run):
    lease = claimed(database, new_worker(database), run)
    with writing(database) as conn:  # a caption that stands in the way of the last insert
        db.execute(conn, "INSERT INTO captions (job_id, text, generated_at) VALUES (4, 'in the way', 0)")
    with pytest.raises(IntegrityError):
        complete(database, lease)
    assert column(database, "SELECT status FROM jobs WHERE id <= 4 ORDER BY id") == ["leased"] * 4
    assert column(database, "SELECT job_id FROM captions") == [4]
    assert column(database, "SELECT n_done FROM leases") == [0]


def test_an_expired_lease_that_nobody_reaped_still_completes(database, run):
    lease = claimed(database, new_worker(database), run)
    complete(database, lease, now=TTL * 10)
    assert column(database, "SELECT count(*) FROM captions") == [4]


def test_a_job_cannot_be_completed_twice(database, run):
    lease = claimed(database, new_worker(database), run)
    complete(database, lease, [1])
    with pytest.raises(LeaseLost):
        complete(database, lease, [1, 2], text="Again.")
    assert column(database, "SELECT text FROM captions ORDER BY job_id") == ["A caption."]
    assert column(database, "SELECT status FROM jobs WHERE id = 2 ORDER BY id") == ["leased"]


def test_degenerate_captions_are_flagged_as_they_are_stored_and_counted(database, run):
    lease = claimed(database, new_worker(database), run, 5)
    said = ["", "!" * 64, "The heart. " + "No mass is seen. " * 9, "A CT.", "An X-ray.\0"]
    reasons = ["stop", "length", "length", "stop", "stop"]
    completions = [
        Completion(job.id, text, finish_reason=reason)
        for job, text, reason in zip(lease.jobs, said, reasons, strict=True)
    ]
    completions[3] = replace(completions[3], flags="fewer_pixels")
    with writing(database) as conn:
        queue.complete(conn, lease, completions)
    flags = ["empty", "one_token", "loop", "fewer_pixels", "replaced"]
    assert column(database, "SELECT flags FROM captions ORDER BY job_id") == flags
    assert column(database, "SELECT text FROM captions ORDER BY job_id")[:3] == said[:3], "text is never edited"
    with db.transaction(database) as conn:
        (counts,) = queue.counts(conn)
        assert counts.flags == dict.fromkeys(flags, 1)
        assert (counts.done, counts.total) == (5, len(column(database, "SELECT id FROM jobs")))


def test_a_caption_that_no_database_could_hold_is_mended_and_flagged(database, run):
    lease = claimed(database, new_worker(database), run, 2)
    with writing(database) as conn:
        queue.complete(conn, lease, [caption(1, "a\0b"), caption(2, "whole")], now=0)
    assert column(database, "SELECT text FROM captions ORDER BY job_id") == ["a\ufffdb", "whole"]
    assert column(database, "SELECT flags FROM captions ORDER BY job_id") == ["replaced", ""]


# --- a lost lease ----------------------------------------------------------------------------------------------


def lose(database: Engine, run: Run) -> tuple[Lease, Lease]:
    """A lease that expired, and the one under which another worker has the same jobs now."""
    lease = claimed(database, new_worker(database, "slow"), run)
    assert reap(database, TTL) == [lease.id]
    other = claimed(database, new_worker(database, "quick"), run, lane=SUSPECTS, now=TTL)
    assert ids(other) == ids(lease)
    return lease, other


def stale_writes(conn: Connection, lease: Lease):
    yield lambda: queue.complete(conn, lease, [caption(id, "Stale.") for id in ids(lease)])
    yield lambda: queue.fail(conn, lease, {ids(lease)[0]: Failure("stale", "stale")})
    yield lambda: queue.release(conn, lease, ids(lease))


def test_a_worker_that_lost_its_lease_changes_nothing(database, run):
    lease, other = lose(database, run)
    with writing(database) as conn:
        for write in stale_writes(conn, lease):
            with pytest.raises(LeaseLost):
                write()
        assert queue.heartbeat(conn, lease.worker_id, [lease.id], ttl_ms=TTL, now=TTL) == set()
    complete(database, other, text="The other's.")
    assert column(database, "SELECT DISTINCT text FROM captions") == ["The other's."]
    assert column(database, "SELECT count(*) FROM failures") == [0]


def test_a_worker_that_lost_its_lease_overwrites_nothing_that_is_done(database, run):
    lease, other = lose(database, run)
    complete(database, other, text="The other's.")
    with writing(database) as conn:
        for write in stale_writes(conn, lease):
            with pytest.raises(LeaseLost):
                write()
    assert column(database, "SELECT DISTINCT text FROM captions") == ["The other's."]
    assert column(database, "SELECT DISTINCT status FROM jobs WHERE id <= 4") == ["done"]


def test_a_lease_is_of_no_use_to_another_worker(database, run):
    lease = claimed(database, new_worker(database), run)
    thief = replace(lease, worker_id=new_worker(database, "thief"))
    with writing(database) as conn:
        for write in stale_writes(conn, thief):
            with pytest.raises(LeaseLost):
                write()
        assert queue.heartbeat(conn, thief.worker_id, [lease.id], ttl_ms=TTL, now=1) == set()


def test_a_released_job_is_not_completed_under_the_lease_it_left(database, run):
    lease = claimed(database, new_worker(database), run, 2)
    with writing(database) as conn:
        queue.release(conn, lease, [1])
    other = claimed(database, new_worker(database, "two"), run, 1)
    assert (ids(other), column(database, "SELECT state FROM leases ORDER BY id")) == ([1], ["open", "open"])
    with pytest.raises(LeaseLost):
        complete(database, lease)
    complete(database, other)


def test_a_retried_job_is_not_completed_under_its_old_lease(database, run):
    # attempts is no fence: retry sets it back to what the old lease saw
    lease = claimed(database, new_worker(database), run, 1)
    with writing(database) as conn:
        queue.fail(conn, lease, {1: Failure("unreadable", "no")})
        assert queue.retry(conn, run, image_ids=["train_00000"]) == 1
    again = claimed(database, new_worker(database, "two"), run, 1)
    with pytest.raises(LeaseLost):
        complete(database, lease)
    complete(database, again)


# --- time ------------------------------------------------------------------------------------------------------


def test_a_lease_is_reaped_when_its_time_has_run_out_and_not_before(database, run):
    lease = claimed(database, new_worker(database), run, now=1_000)
    assert reap(database, 1_000 + TTL - 1) == []
    assert reap(database, 1_000 + TTL) == [lease.id]
    assert reap(database, 1_000 + TTL) == []
    assert column(database, "SELECT state FROM leases ORDER BY id") == ["expired"]


HOUR = 3_600_000


@pytest.mark.parametrize("back", [1_000, 2 * HOUR, 365 * 24 * HOUR])
def test_a_dead_workers_lease_runs_out_one_lease_time_after_the_clock_was_set_back(database, run, back):
    before = 400 * 24 * HOUR
    lease = claimed(database, new_worker(database), run, now=before)
    now = before - back
    with db.transaction(database) as conn:
        assert queue.overdue(conn, now=now)
    assert reap(database, now) == []
    with db.transaction(database) as conn:
        assert not queue.overdue(conn, now=now)
    assert reap(database, now + TTL - 1) == []
    assert reap(database, now + TTL) == [lease.id]


def test_a_living_workers_lease_is_extended_by_its_heartbeats_after_the_clock_was_set_back(database, run):
    worker = new_worker(database)
    lease = claimed(database, worker, run, now=2 * HOUR)
    assert reap(database, HOUR) == []
    with writing(database) as conn:
        assert queue.heartbeat(conn, worker, [lease.id], ttl_ms=TTL, now=HOUR + TTL // 4) == {lease.id}
    assert reap(database, HOUR + TTL) == []
    complete(database, lease, now=HOUR + TTL)
    assert column(database, "SELECT crashes FROM jobs WHERE status = 'done'") == [0] * 4


def test_a_worker_never_reaps_itself(database, run):
    worker = new_worker(database)
    lease = claimed(database, worker, run)
    with writing(database) as conn:
        assert queue.reap(conn, exclude_worker=worker, now=TTL) == []
        assert queue.reap(conn, exclude_worker=worker + 1, now=TTL) == [lease.id]


def test_a_lease_that_lasts_longer_than_the_contact_is_not_judged(database, run):
    lease = claimed(database, new_worker(database), run)
    with writing(database) as conn:
        queue.complete(conn, lease, [caption(1)], now=TTL // 2)  # no heartbeat
        assert queue.reap(conn, contact_ms=TTL - 1, now=TTL) == []
        assert queue.reap(conn, contact_ms=TTL, now=TTL) == [lease.id]


def test_a_heartbeat_extends_a_lease(database, run):
    worker = new_worker(database)
    lease = claimed(database, worker, run)
    with writing(database) as conn:
        assert queue.heartbeat(conn, worker, [lease.id], ttl_ms=TTL, now=TTL - 1) == {lease.id}
    assert reap(database, TTL) == []
    assert reap(database, 2 * TTL - 1) == [lease.id]


# --- what workers measure --------------------------------------------------------------------------------------


def store_ms(database: Engine) -> dict[int, float]:
    with db.transaction(database) as conn:
        return {one.id: one.timing.store_ms for one in queue.list_leases(conn, closed=99)}


def told_by(database: Engine) -> dict[int, Telemetry | None]:
    with db.transaction(database) as conn:
        return {one.id: one.telemetry for one in queue.list_workers(conn, everyone=True, now=0)}


def test_a_heartbeat_and_a_goodbye_tell_what_a_worker_measured(database, run):
    worker, other = new_worker(database), new_worker(database, "other")
    assert told_by(database) == {worker: None, other: None}
    with writing(database) as conn:
        queue.heartbeat(conn, worker, [], ttl_ms=TTL, telemetry=TOLD, now=1)
    assert told_by(database) == {worker: TOLD, other: None}
    with writing(database) as conn:
        queue.heartbeat(conn, worker, [], ttl_ms=TTL, now=2)
        queue.stop_worker(conn, other, telemetry=replace(TOLD, fill=None), now=2)
    assert told_by(database) == {worker: TOLD, other: replace(TOLD, fill=None)}


def test_telemetry_of_a_later_version_is_read_as_far_as_it_is_known():
    later = TOLD.to_json().replace('"fill"', '"watts": 300, "fill"')
    assert Telemetry.from_json(later) == TOLD


def test_what_storing_took_is_added_to_leases_also_when_they_have_ended(database, run):
    worker = new_worker(database)
    ended, open_one = claimed(database, worker, run), claimed(database, worker, run)
    complete(database, ended)
    with writing(database) as conn:
        took = {open_one.id: 2.0, ended.id: 7.5}
        assert queue.heartbeat(conn, worker, [open_one.id], ttl_ms=TTL, store_ms=took, now=1) == {open_one.id}
        assert queue.heartbeat(conn, worker, [], ttl_ms=TTL, store_ms={open_one.id: 1.0}, now=1) == set()
        queue.stop_worker(conn, worker, store_ms={ended.id: 0.5}, now=2)
    assert store_ms(database) == {ended.id: 8.0, open_one.id: 3.0}
    assert reap(database, TTL) == [], "telling of a lease is holding it"
    assert reap(database, TTL + 1) == [open_one.id]


def test_what_storing_took_is_added_to_no_lease_of_another_worker(database, run):
    mine = claimed(database, new_worker(database), run)
    other = new_worker(database, "other")
    with writing(database) as conn:
        assert queue.heartbeat(conn, other, [], ttl_ms=TTL, store_ms={mine.id: 5.0}, now=1) == set()
        queue.stop_worker(conn, other, store_ms={mine.id: 5.0}, now=1)
    assert store_ms(database) == {mine.id: 0.0}


def test_a_lease_tells_the_time_of_each_stage(database, run):
    lease = claimed(database, new_worker(database), run)
    with writing(database) as conn:
        queue.complete(conn, lease, [caption(1)], timing=Timing(1.0, 2.0, 3.0, 4.0), now=1)
        queue.heartbeat(conn, lease.worker_id, [lease.id], ttl_ms=TTL, store_ms={lease.id: 5.0}, now=1)
        (seen,) = queue.list_leases(conn, now=1)
    assert seen.timing == Timing(1.0, 2.0, 3.0, 4.0, 5.0)


# --- crashes and time ------------------------------------------------------------------------------------------


def test_a_dead_workers_jobs_are_pending_with_the_attempt_refunded_and_the_crash_counted(database, run):
    claimed(database, new_worker(database), run)
    reap(database, TTL)
    with db.transaction(database) as conn:
        rows = db.execute(conn, "SELECT status, attempts, crashes, solo_crashes FROM jobs WHERE id <= 4").fetchall()
    assert [tuple(row) for row in rows] == [("pending", 0, 1, 0)] * 4


def test_what_a_lease_stored_before_its_worker_died_stays_done(database, run):
    lease = claimed(database, new_worker(database), run)
    complete(database, lease, [2])
    reap(database, TTL)
    assert column(database, "SELECT id FROM jobs WHERE status = 'done' ORDER BY id") == [2]
    assert column(database, "SELECT count(*) FROM jobs WHERE status = 'pending'") == [19]


def test_overdue_tells_whether_reap_or_wake_would_do_anything(database, run):
    lease = claimed(database, new_worker(database), run, 2)
    with writing(database) as conn:
        assert not queue.overdue(conn, now=TTL - 1)
        assert queue.overdue(conn, now=TTL)
        queue.fail(conn, lease, {1: Failure("network", "slow", transient=True)}, now=0)
        queue.complete(conn, lease, [caption(2)], now=0)
        assert not queue.overdue(conn, now=3_000)
        assert queue.overdue(conn, now=5_000)


# --- lanes -----------------------------------------------------------------------------------------------------


def test_suspects_are_not_in_the_normal_lane_and_are_claimed_by_fours(database, run):
    claimed(database, new_worker(database), run, 6)
    reap(database, TTL)
    worker = new_worker(database, "two")
    assert ids(claimed(database, worker, run, 16, now=TTL)) == list(range(7, 21))
    assert ids(claimed(database, worker, run, 16, lane=SUSPECTS, now=TTL)) == [1, 2, 3, 4]


def test_a_picture_that_crashed_two_workers_is_claimed_alone_and_fails_after_two_more(database, run):
    claimed(database, new_worker(database), run)
    reap(database, TTL)
    claimed(database, new_worker(database, "two"), run, lane=SUSPECTS, now=TTL)
    reap(database, 2 * TTL)
    for n, now in enumerate((2 * TTL, 3 * TTL)):
        assert ids(claimed(database, new_worker(database, f"solo {n}"), run, lane=SOLO, now=now)) == [1]
        reap(database, now + TTL)
        # the others have crashed less often, so the suspect of both rounds comes last
        with writing(database) as conn:
            db.execute(conn, "UPDATE jobs SET crashes = 9 WHERE id BETWEEN 2 AND 4")
    assert column(database, "SELECT status FROM jobs WHERE id <= 4 ORDER BY id") == [
        "failed",
        "pending",
        "pending",
        "pending",
    ]
    with db.transaction(database) as conn:
        (failed,) = queue.list_failures(conn)
    assert (failed.image_id, failed.code) == ("train_00000", "crashed")
    assert failed.message == "Two workers died while captioning this picture alone."


def test_a_worker_that_gives_up_marks_its_own_lease_as_crashed(database, run):
    lease = claimed(database, new_worker(database), run)
    with writing(database) as conn:
        assert queue.crash(conn, lease.id, now=1)
        assert not queue.crash(conn, lease.id, now=2)
    assert column(database, "SELECT crashes FROM jobs WHERE id <= 4 ORDER BY id") == [1, 1, 1, 1]


# --- failures --------------------------------------------------------------------------------------------------


def test_a_permanent_failure_fails_at_once_with_its_reason(database, run):
    lease = claimed(database, new_worker(database), run, 2)
    with writing(database) as conn:
        queue.fail(conn, lease, {1: Failure("truncated", "The file ends early.")}, now=5)
    complete(database, lease, [2])
    assert column(database, "SELECT status FROM jobs WHERE id <= 2 ORDER BY id") == ["failed", "done"]
    assert column(database, "SELECT state FROM leases ORDER BY id") == ["closed"]
    with db.transaction(database) as conn:
        assert queue.list_failures(conn) == [
            queue.Failed("default", "train", "train_00000", "truncated", "The file ends early.", 1)
        ]


def test_a_transient_failure_waits_and_is_claimable_when_its_time_has_come(database, run):
    lease = claimed(database, new_worker(database), run, 1)
    with writing(database) as conn:
        queue.fail(conn, lease, {1: Failure("network", "slow", transient=True)}, now=0)
    (not_before,) = column(database, "SELECT not_before FROM jobs WHERE status = 'waiting'")
    assert 3_750 <= not_before <= 5_000
    with writing(database) as conn:
        assert queue.wake(conn, now=not_before - 1) == 0
        assert queue.wake(conn, now=not_before) == 1
    assert ids(claimed(database, new_worker(database, "two"), run, 1)) == [1]


@pytest.mark.parametrize("back", [2 * HOUR, 365 * 24 * HOUR])
def test_a_job_waits_no_longer_than_the_longest_backoff_when_the_clock_is_set_back(database, run, back):
    before = 400 * 24 * HOUR
    lease = claimed(database, new_worker(database), run, 2, now=before)
    slow = Failure("network", "slow", transient=True)
    with writing(database) as conn:
        queue.fail(conn, lease, {1: slow, 2: slow}, now=before)
        assert queue.overdue(conn, now=before - back)
        assert queue.wake(conn, now=before - back) == 2
        assert not queue.overdue(conn, now=before - back)


def test_a_job_that_waits_its_longest_is_not_taken_for_one_of_another_clock(database, run):
    lease = claimed(database, new_worker(database), run, 1, now=0)
    with writing(database) as conn:
        queue.fail(conn, lease, {1: Failure("network", "slow", transient=True)}, now=0)
        db.execute(conn, "UPDATE jobs SET not_before = ? WHERE status = 'waiting'", (leases.MAX_BACKOFF_MS,))
        assert not queue.overdue(conn, now=0)
        assert queue.wake(conn, now=0) == 0


def test_a_transient_failure_is_final_after_max_attempts(database, run):
    worker = new_worker(database)
    for attempt in range(1, run.max_attempts + 1):
        lease = claimed(database, worker, run, 1)
        with writing(database) as conn:
            queue.fail(conn, lease, {1: Failure("network", f"attempt {attempt}", transient=True)}, now=0)
            queue.wake(conn, now=1 << 50)
    assert column(database, "SELECT status FROM jobs WHERE id = 1 ORDER BY id") == ["failed"]
    assert column(database, "SELECT message FROM failures ORDER BY id") == [f"attempt {n}" for n in range(1, 6)]


def test_pictures_and_codes_that_a_run_does_not_have_are_told_from_those_it_has(database, run, tmp_path):
    other = fill(database, tmp_path / "set", 3, run="other", recipe=Recipe(model="tests/other"))
    lease = claimed(database, new_worker(database), run, 1)
    with writing(database) as conn:
        queue.fail(conn, lease, {1: Failure("truncated", "It ends early.")}, now=0)
        queue.retry(conn, run)
        assert queue.unknown_images(conn, run, ["train_00000", "nope", "train_00019"]) == ["nope"]
        assert queue.unknown_images(conn, other, []) == []
        assert queue.unknown_codes(conn, run, ["truncated", "nope"]) == ["nope"]
        assert queue.unknown_codes(conn, other, ["truncated"]) == ["truncated"]


def test_backoff_grows_fourfold_to_a_quarter_of_an_hour():
    waits = [leases.backoff_ms(attempts, jitter=0) for attempts in (1, 2, 3, 4, 5, 50)]
    assert waits == [5_000, 20_000, 80_000, 320_000, 900_000, 900_000]
    assert leases.backoff_ms(1, jitter=1) == 3_750


def test_released_jobs_are_as_before_the_claim(database, run):
    lease = claimed(database, new_worker(database), run)
    with writing(database) as conn:
        assert queue.release(conn, lease, [1, 2]) == 2
    assert column(database, "SELECT attempts FROM jobs WHERE id <= 2 ORDER BY id") == [0, 0]
    complete(database, lease, [3, 4])
    assert ids(claimed(database, new_worker(database, "two"), run, 2)) == [1, 2]


def test_releasing_leaves_alone_what_was_completed_meanwhile(database, run):
    lease = claimed(database, new_worker(database), run)
    complete(database, lease, [1, 2])
    with writing(database) as conn:
        assert queue.release(conn, lease, ids(lease)) == 2
    assert column(database, "SELECT status FROM jobs WHERE id <= 4 ORDER BY id") == [
        "done",
        "done",
        "pending",
        "pending",
    ]
    assert column(database, "SELECT state FROM leases ORDER BY id") == ["released"]


# --- by hand ---------------------------------------------------------------------------------------------------


def failed_and_cancelled(database: Engine, run: Run) -> None:
    lease = claimed(database, new_worker(database), run, 3)
    with writing(database) as conn:
        queue.fail(conn, lease, {1: Failure("truncated", ""), 2: Failure("empty", ""), 3: Failure("empty", "")}, now=0)
        assert queue.cancel(conn, run, image_ids=["train_00003", "train_00004"], now=0) == 2


def test_retry_takes_what_failed_with_a_code(database, run):
    failed_and_cancelled(database, run)
    with writing(database) as conn:
        assert queue.retry(conn, run, codes=["empty"]) == 2
    assert column(database, "SELECT id FROM jobs WHERE status = 'failed' ORDER BY id") == [1]
    assert column(database, "SELECT attempts FROM jobs WHERE id = 2 ORDER BY id") == [0]


def test_retry_of_everything_leaves_what_was_cancelled(database, run):
    failed_and_cancelled(database, run)
    with writing(database) as conn:
        assert queue.retry(conn, run) == 3
        assert queue.retry(conn, run, cancelled=True) == 2
    assert column(database, "SELECT count(*) FROM jobs WHERE status = 'pending'") == [20]


def test_retry_of_a_done_picture_does_nothing(database, run):
    complete(database, claimed(database, new_worker(database), run, 1))
    with writing(database) as conn:
        assert queue.retry(conn, run, image_ids=["train_00000"]) == 0


def test_cancel_withdraws_all_that_is_not_finished_and_leaves_what_is(database, run):
    worker = new_worker(database)
    complete(database, claimed(database, worker, run, 2))
    lease = claimed(database, worker, run, 2)
    with writing(database) as conn:
        assert queue.cancel(conn, run, splits=["test"], now=0) == 0
        assert queue.cancel(conn, run, splits=["train"], now=9) == 18
    assert claim(database, worker, run) is None
    assert column(database, "SELECT count(*) FROM jobs WHERE status = 'done'") == [2]
    assert column(database, "SELECT state FROM leases ORDER BY id") == ["closed", "closed"]
    with pytest.raises(LeaseLost):
        complete(database, lease)


def test_cancel_of_one_leased_picture_leaves_its_neighbours_with_their_worker(database, run):
    lease = claimed(database, new_worker(database), run, 3)
    with writing(database) as conn:
        assert queue.cancel(conn, run, image_ids=["train_00001"], now=0) == 1
    complete(database, lease, [1, 3])
    assert column(database, "SELECT status FROM jobs WHERE id <= 3 ORDER BY id") == ["done", "cancelled", "done"]
    assert column(database, "SELECT state FROM leases ORDER BY id") == ["closed"]


def test_a_paused_run_is_not_claimed_from_and_what_is_leased_goes_on(database, run):
    worker = new_worker(database)
    lease = claimed(database, worker, run, 2)
    with writing(database) as conn:
        queue.pause(conn, run, True)
    assert claim(database, worker, run) is None
    complete(database, lease)
    with writing(database) as conn:
        queue.pause(conn, run, False)
    assert ids(claimed(database, worker, run, 2)) == [3, 4]


def test_pruning_keeps_the_latest_failure_of_each_job(database, run):
    worker = new_worker(database)
    for attempt in range(3):
        lease = claimed(database, worker, run, 1)
        with writing(database) as conn:
            queue.fail(conn, lease, {1: Failure("network", f"attempt {attempt}", transient=True)}, now=attempt)
            queue.wake(conn, now=1 << 50)
    with writing(database) as conn:
        assert queue.prune(conn, before=1) == 1
        assert queue.prune(conn, before=9, limit=1) == 1
        assert queue.prune(conn, before=9) == 0
    assert column(database, "SELECT message FROM failures ORDER BY id") == ["attempt 2"]


# --- recover ---------------------------------------------------------------------------------------------------


def recover(database: Engine, lease: Lease, completions: Sequence[Completion], *, by: int = 0) -> queue.Recovered:
    with writing(database) as conn:
        return queue.recover(conn, by or lease.worker_id, lease, completions, now=9)


def recovered(stored: Sequence[int] = (), dropped: Sequence[int] = (), kept: Sequence[int] = ()) -> queue.Recovered:
    return queue.Recovered(frozenset(stored), frozenset(dropped), frozenset(kept))


def test_a_completion_that_was_stored_without_the_answer_coming_back_is_recognised(database, run):
    lease = claimed(database, new_worker(database), run, 3)
    complete(database, lease, [1, 2])
    assert recover(database, lease, [caption(1, "Again."), caption(2), caption(3, "Third.")]) == recovered([1, 2, 3])
    assert recover(database, lease, [caption(3, "Again.")]) == recovered([3])
    assert column(database, "SELECT text FROM captions ORDER BY job_id") == ["A caption.", "A caption.", "Third."]
    assert column(database, "SELECT n_done FROM leases ORDER BY id") == [3]


def test_captions_of_a_reaped_lease_whose_jobs_are_free_are_stored_under_a_new_one(database, run):
    lease = claimed(database, new_worker(database), run, 2)
    reap(database, TTL)
    other = new_worker(database, "two")
    assert recover(database, lease, [caption(1), caption(2)], by=other) == recovered([1, 2])
    assert column(database, "SELECT status FROM jobs WHERE id <= 2 ORDER BY id") == ["done", "done"]
    assert column(database, "SELECT worker_id FROM leases ORDER BY id") == [lease.worker_id, other]
    assert column(database, "SELECT state FROM leases ORDER BY id") == ["expired", "closed"]
    assert column(database, "SELECT DISTINCT lease_id FROM captions") == [lease.id + 1]


def test_a_caption_of_a_job_that_waits_is_stored_all_the_same(database, run):
    lease = claimed(database, new_worker(database), run, 1)
    with writing(database) as conn:
        queue.fail(conn, lease, {1: Failure("network", "slow", transient=True)}, now=0)
    assert recover(database, lease, [caption(1)]) == recovered([1])
    assert column(database, "SELECT status FROM jobs WHERE id = 1") == ["done"]


def test_captions_of_a_lost_lease_are_kept_while_another_has_the_pictures_and_dropped_when_it_is_done(database, run):
    lease, other = lose(database, run)
    late = [caption(id, "Late.") for id in ids(lease)]
    assert recover(database, lease, late) == recovered(kept=ids(lease))
    complete(database, other, [1], text="The other's.")
    assert recover(database, lease, late) == recovered(dropped=[1], kept=[2, 3, 4])
    with writing(database) as conn:
        queue.release(conn, other, [2, 3])
        queue.cancel(conn, run, image_ids=["train_00002"], now=0)
    assert recover(database, lease, late) == recovered(stored=[2], dropped=[1, 3], kept=[4])
    assert column(database, "SELECT text FROM captions ORDER BY job_id") == ["The other's.", "Late."]


def test_a_late_failure_never_touches_what_another_has(database, run):
    lease, other = lose(database, run)
    late = [Completion(id, failure=Failure("stale", "stale")) for id in ids(lease)]
    assert recover(database, lease, late) == recovered(dropped=ids(lease))
    complete(database, other)
    assert column(database, "SELECT count(*) FROM failures") == [0]


def test_what_a_worker_leased_without_knowing_is_given_back(database, run):
    worker, other = new_worker(database), new_worker(database, "two")
    known, forgotten, _ = (claimed(database, who, run, 2) for who in (worker, worker, other))
    with writing(database) as conn:
        assert queue.release_forgotten(conn, worker, {known.id}) == 2
    assert column(database, "SELECT state FROM leases ORDER BY id") == ["open", "released", "open"]
    assert column(database, "SELECT attempts FROM jobs WHERE id <= 6 ORDER BY id") == [1, 1, 0, 0, 1, 1]
    assert ids(claimed(database, worker, run, 2)) == ids(forgotten)


def test_a_lease_is_known_only_to_the_database_that_gave_it(database, run):
    lease = claimed(database, new_worker(database, "one"), run)
    with writing(database) as conn:
        assert queue.belongs(conn, lease, "one")
        assert not queue.belongs(conn, lease, "another")


# --- runs ------------------------------------------------------------------------------------------------------


def test_a_run_with_another_recipe_is_refused_and_the_differences_named(database, run):
    with pytest.raises(RunError) as error, writing(database) as conn:
        queue.create_run(conn, "default", run.dataset_id, Recipe(model="tests/small", prompt="What?", max_new_tokens=9))
    assert str(error.value) == (
        "Run 'default' has another recipe (prompt: 'Describe this medical image in detail.', not 'What?'; "
        "max_new_tokens: 256, not 9). Give this one a name of its own: --run NAME"
    )


def test_the_first_worker_pins_what_the_recipe_came_to_and_another_is_refused(database, run):
    with writing(database) as conn:
        queue.pin(conn, run, INFO)
        queue.pin(conn, run, INFO)
    other = EngineInfo("small", {}, "tests/small", "", "bfloat16", "cuda:0", "other")
    with pytest.raises(RunError) as error, writing(database) as conn:
        queue.pin(conn, run, other)
    assert "dtype: float32, here bfloat16; digest: digest, here other" in str(error.value)


def test_an_unknown_run_is_named_with_those_that_exist(database, run):
    with pytest.raises(RunError, match=r"There is no run 'x'\. Runs: default\."), db.transaction(database) as conn:
        queue.get_run(conn, "x")


# --- looking ---------------------------------------------------------------------------------------------------


def test_counts_tell_every_state_and_the_rate_of_the_last_minutes(database, run):
    worker = new_worker(database)
    complete(database, claimed(database, worker, run, 4, now=0), now=30_000)
    claimed(database, worker, run, 6, now=30_000)
    with db.transaction(database) as conn:
        (counts,) = queue.counts(conn, now=60_000)
    assert (counts.pending, counts.leased, counts.done, counts.total) == (10, 6, 4, 20)
    assert counts.per_minute == 4.0
    assert counts.eta_sec == 240.0
    with db.transaction(database) as conn:
        (later,) = queue.counts(conn, now=3_600_000)
    assert (later.per_minute, later.eta_sec) == (0.0, None)


@pytest.mark.parametrize("back", [2 * HOUR, 365 * 24 * HOUR])
def test_the_rate_is_of_what_was_captioned_since_the_clock_was_set_back(database, run, back):
    worker, before = new_worker(database), 400 * 24 * HOUR
    complete(database, claimed(database, worker, run, 4, now=before), now=before + 30_000)
    claimed(database, worker, run, 2, now=before)
    now = before - back
    complete(database, claimed(database, worker, run, 3, now=now), now=now + 30_000)
    with db.transaction(database) as conn:
        (counts,) = queue.counts(conn, now=now + 60_000)
    assert counts.per_minute == 3.0


def test_unfinished_counts_the_splits_that_are_asked_for(database, run):
    claimed(database, new_worker(database), run, 5)
    with db.transaction(database) as conn:
        assert queue.unfinished(conn, run, ["train"]) == {"pending": 15, "leased": 5, "waiting": 0}
        assert queue.unfinished(conn, run, ["test"]) == {"pending": 0, "leased": 0, "waiting": 0}


def test_a_worker_is_running_then_lost_or_stopped(database, run):
    one, two = new_worker(database, "one"), new_worker(database, "two")
    with writing(database) as conn:
        queue.heartbeat(conn, two, [], ttl_ms=TTL, now=500_000)
        states = {w.id: w.state for w in queue.list_workers(conn, now=500_001)}
        assert states == {one: "lost", two: "running"}
        queue.stop_worker(conn, two, now=500_002)
        states = {w.id: w.state for w in queue.list_workers(conn, now=500_003)}
    assert states == {one: "lost", two: "stopped"}


@pytest.mark.parametrize("back", [2 * HOUR, 365 * 24 * HOUR])
def test_a_worker_that_was_not_seen_since_the_clock_was_set_back_is_lost(database, run, back):
    before = 400 * 24 * HOUR
    dead, alive = new_worker(database, "dead"), new_worker(database, "alive")
    with writing(database) as conn:
        queue.heartbeat(conn, dead, [], ttl_ms=TTL, now=before)
        queue.heartbeat(conn, alive, [], ttl_ms=TTL, now=before - back)
        seen = queue.list_workers(conn, now=before - back + 1_000)
    assert {one.id: one.state for one in seen} == {dead: "lost", alive: "running"}


def test_a_worker_is_lost_after_its_own_lease_time(database):
    with writing(database) as conn:
        quick = queue.register_worker(conn, "quick", "host", 1, INFO, lease_ttl_ms=5_000, now=0)
        slow = queue.register_worker(conn, "slow", "host", 1, INFO, lease_ttl_ms=3_600_000, now=0)
        seen = [{one.id: one.state for one in queue.list_workers(conn, now=at)} for at in (5_000, 5_001, 3_600_001)]
    assert [one[quick] for one in seen] == ["running", "lost", "lost"]
    assert [one[slow] for one in seen] == ["running", "running", "lost"]


def test_text_keeps_everything_but_nul_lone_surrogates_and_endless_length():
    assert queue.clean_text("a\0b →\r\n “x”") == "a\ufffdb →\r\n “x”"
    assert queue.clean_text("x\ud800y\U0001f9b4") == "x\ufffdy\U0001f9b4"
    assert queue.clean_text("abc", 2) == "ab"


def test_leases_tell_who_holds_what_and_for_how_long(database, run):
    worker = new_worker(database)
    complete(database, claimed(database, worker, run, 1, now=0), now=1_000)
    claimed(database, worker, run, 3, now=2_000)
    with db.transaction(database) as conn:
        (open_one,) = queue.list_leases(conn, now=5_000)
        ended, same = queue.list_leases(conn, closed=9, now=5_000)
    assert (same, ended.state, ended.expires_in_sec) == (open_one, "closed", None)
    assert (open_one.worker, open_one.host, open_one.run, open_one.split) == (worker, "host", "default", "train")
    assert (open_one.lane, open_one.state, open_one.jobs, open_one.done) == ("normal", "open", 3, 0)
    assert (open_one.age_sec, open_one.beat_sec_ago, open_one.expires_in_sec) == (3.0, 3.0, 57.0)


def test_suspects_are_seen_while_they_are_pending(database, run):
    with writing(database) as conn:
        assert not queue.has_suspects(conn, run, ["train"])
    claimed(database, new_worker(database), run, 2)
    reap(database, TTL)
    with writing(database) as conn:
        assert queue.has_suspects(conn, run, ["test", "train"])
