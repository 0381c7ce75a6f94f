"""Mutation testing: breaks rococap in one small way at a time and runs the tests: python tests/mutants.py [NAME...]

Works on a copy of the project, with a few quick tests per mutant. Prints the test that caught each mutant; exits with 1
if a mutant survived, or if the text that it replaces no longer occurs exactly once in the source.
"""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("rococap", "tests", "migrations", "pyproject.toml", "alembic.ini")
LIMIT_SEC = 240


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests of which at least one must fail with it.

    `edits` are (where, old, new): in the function, class or constant `where`, the text `old` is replaced by `new`.
    Methods are named with their class. Modules are not named, so that moving code breaks no mutant. `tests` are node
    ids relative to tests/.
    """

    name: str
    what: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def mutant(name: str, what: str, where: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, what, ((where, old, new),), tests)


SAME = "engines/test_continuous.py::test_every_mix_of_sizes_prompts_lengths_and_arrivals_says_the_same"
LEFT = "queue/test_state_machine.py::test_a_job_that_went_to_another_is_not_completed_under_a_lease_that_is_open_still"
BESIDE = "queue/test_state_machine.py::test_a_claim_beside_another_that_is_not_committed_takes_other_jobs"

MUTANTS = (
    # --- the fence ---
    mutant(
        "complete-without-lease",
        "complete takes any leased job, whoever has it",
        "complete",
        "\"UPDATE jobs SET status = 'done', lease_id = NULL, finished_at = ? \"\n"
        "        \"WHERE id = ? AND lease_id = ? AND status = 'leased'\",",
        "\"UPDATE jobs SET status = 'done', lease_id = NULL, finished_at = ? \"\n"
        "        \"WHERE id = ? AND ? > 0 AND status = 'leased'\",",
        LEFT,
    ),
    Mutant(
        "attempts-as-the-fence",
        "complete compares the attempts at the time of the claim instead of the lease",
        (
            (
                "Job",
                "    place: Place\n",
                "    place: Place\n    attempts: int = 1\n",
            ),
            ("_PENDING", "SELECT j.id, {PLACE} ", "SELECT j.id, j.attempts, {PLACE} "),
            (
                "claim",
                "Job(id, lease_id, place_of(place, columns)) for id, *place in rows)",
                "Job(id, lease_id, place_of(place, columns), seen + 1) for id, seen, *place in rows)",
            ),
            (
                "complete",
                'finished_at = ? "\n        "WHERE id = ? AND lease_id = ? AND status = \'leased\'",\n'
                "        [(at, c.job_id, lease.id) for c in done],",
                'finished_at = ? "\n        "WHERE id = ? AND attempts = ? AND status = \'leased\'",\n'
                "        [(at, c.job_id, {job.id: job.attempts for job in getattr(lease, 'jobs', ())}"
                ".get(c.job_id, 1)) for c in done],",
            ),
        ),
        (LEFT,),
    ),
    mutant(
        "fail-without-lease",
        "fail takes any leased job, whoever has it",
        "fail",
        "\"UPDATE jobs SET status = 'failed', lease_id = NULL, finished_at = ? \"\n"
        "        \"WHERE id = ? AND lease_id = ? AND status = 'leased'\",",
        "\"UPDATE jobs SET status = 'failed', lease_id = NULL, finished_at = ? \"\n"
        "        \"WHERE id = ? AND ? > 0 AND status = 'leased'\",",
        LEFT,
    ),
    mutant(
        "release-without-lease",
        "release takes any leased job, whoever has it",
        "release",
        'attempts = attempts - 1 "\n        "WHERE id = ? AND lease_id = ? AND status = \'leased\'"\n    )',
        'attempts = attempts - 1 "\n        "WHERE id = ? AND ? > 0 AND status = \'leased\'"\n    )',
        LEFT,
    ),
    mutant(
        "lease-of-any-state",
        "a closed or expired lease is accepted like an open one",
        "_hold",
        "\"WHERE id = ? AND worker_id = ? AND state = 'open'\",\n        (n_done,",
        '"WHERE id = ? AND worker_id = ?",\n        (n_done,',
        "queue/test_queue.py::test_a_worker_that_lost_its_lease_changes_nothing",
    ),
    mutant(
        "lease-of-any-worker",
        "any worker that knows a lease's id can use it",
        "_hold",
        "\"WHERE id = ? AND worker_id = ? AND state = 'open'\",\n        (n_done,",
        "\"WHERE id = ? AND ? > 0 AND state = 'open'\",\n        (n_done,",
        "queue/test_queue.py::test_a_lease_is_of_no_use_to_another_worker",
    ),
    mutant(
        "no-fence-at-all",
        "neither the lease nor the job is compared",
        "_hold",
        "    if held.rowcount != 1:\n        raise LeaseLost(",
        "    if held.rowcount > 1:\n        raise LeaseLost(",
        "queue/test_queue.py::test_a_worker_that_lost_its_lease_changes_nothing",
    ),
    mutant(
        "partly-lost-is-enough",
        "complete goes on with the jobs that are still in the lease",
        "_leave",
        "execute(conn, sql, rows).rowcount != len(rows):",
        "execute(conn, sql, rows).rowcount > len(rows):",
        "queue/test_queue.py::test_a_job_cannot_be_completed_twice",
        LEFT,
    ),
    mutant(
        "late-is-lost",
        "an expired lease cannot complete, although nobody reaped it",
        "complete",
        "    _hold(conn, lease, len(done), timing)\n",
        '    if execute(conn, "SELECT expires_at FROM leases WHERE id = ?", (lease.id,)).scalar_one() <= at:\n'
        '        raise LeaseLost("late")\n'
        "    _hold(conn, lease, len(done), timing)\n",
        "queue/test_queue.py::test_an_expired_lease_that_nobody_reaped_still_completes",
    ),
    # --- claim ---
    mutant(
        "claim-without-lock",
        "PostgreSQL: a claim does not lock what it reads",
        "SKIP_LOCKED",
        '"postgresql": " FOR UPDATE OF j SKIP LOCKED"',
        '"postgresql": ""',
        BESIDE + "[postgresql]",
    ),
    mutant(
        "claim-waits",
        "PostgreSQL: a claim waits for the transaction of another claim to end",
        "SKIP_LOCKED",
        " FOR UPDATE OF j SKIP LOCKED",
        " FOR UPDATE OF j",
        BESIDE + "[postgresql]",
    ),
    mutant(
        "deferred-begin",
        "SQLite: writers begin as readers",
        "_begin",
        '("BEGIN IMMEDIATE",) if write',
        '("BEGIN",) if write',
        BESIDE + "[delete]",
        BESIDE + "[wal]",
    ),
    mutant(
        "status-by-in",
        "the claim does not compare the status with a single literal",
        "_PENDING",
        "j.status = 'pending' AND (j.crashes, j.id)",
        "j.status IN ('pending', 'pending') AND (j.crashes, j.id)",
        "queue/test_plans.py::test_the_claim_reads_its_partial_index_in_order",
    ),
    mutant(
        "splits-by-in",
        "the claim does not compare the split with a single value",
        "_PENDING",
        "j.split = ? AND j.status = 'pending' AND (j.crashes, j.id)",
        "j.split IN (?, 'test') AND j.status = 'pending' AND (j.crashes, j.id)",
        "queue/test_plans.py::test_the_claim_reads_its_partial_index_in_order",
    ),
    mutant(
        "claim-out-of-order",
        "the claim takes the newest jobs first",
        "_PENDING",
        "ORDER BY j.crashes, j.id LIMIT ?",
        "ORDER BY j.crashes, j.id DESC LIMIT ?",
        "queue/test_queue.py::test_a_claim_takes_jobs_in_order_and_the_next_claim_others",
    ),
    mutant(
        "claim-though-paused",
        "a paused run is claimed from",
        "_PENDING",
        "r.paused = 0 AND ",
        "",
        "queue/test_queue.py::test_a_paused_run_is_not_claimed_from_and_what_is_leased_goes_on",
    ),
    mutant(
        "suspects-in-the-crowd",
        "the normal lane takes jobs that were part of a crash",
        "CRASHES",
        "NORMAL: (0, 0)",
        "NORMAL: (0, 1 << 30)",
        "queue/test_queue.py::test_suspects_are_not_in_the_normal_lane_and_are_claimed_by_fours",
    ),
    mutant(
        "suspects-unbounded",
        "a claim of suspects is as large as any other",
        "claim",
        "limit = min(max_jobs, lane) if lane else max_jobs",
        "limit = max_jobs",
        "queue/test_queue.py::test_suspects_are_not_in_the_normal_lane_and_are_claimed_by_fours",
    ),
    # --- complete, fail, release ---
    mutant(
        "two-transactions",
        "the status done is committed before the caption is written",
        "complete",
        '    execute(\n        conn,\n        "INSERT INTO captions (',
        '    execute(conn, "COMMIT")\n    execute(conn, "BEGIN")\n'
        '    execute(\n        conn,\n        "INSERT INTO captions (',
        "queue/test_queue.py::test_completing_is_all_or_nothing",
    ),
    mutant(
        "done-uncounted",
        "complete does not update the tallies",
        "complete",
        "{JobState.LEASED: -len(done), JobState.DONE: len(done)}",
        "{}",
        "queue/test_queue.py::test_a_caption_and_its_jobs_done_are_stored_together",
    ),
    mutant(
        "lease-stays-open",
        "a lease does not close with its last job",
        "complete",
        'close_if_empty(conn, lease.id, "closed", at)\n    execute(conn, "UPDATE workers',
        'execute(conn, "UPDATE workers',
        "queue/test_queue.py::test_a_lease_is_completed_in_parts_and_closes_with_its_last_job",
    ),
    mutant(
        "transient-for-ever",
        "a transient failure is never final",
        "fail",
        "failure.transient and attempts.get(id, limit) < limit",
        "failure.transient",
        "queue/test_queue.py::test_a_transient_failure_is_final_after_max_attempts",
    ),
    mutant(
        "no-backoff",
        "a transient failure is retried at once",
        "fail",
        "[(at + backoff_ms(attempts[id]), id, lease.id)",
        "[(at, id, lease.id)",
        "queue/test_queue.py::test_a_transient_failure_waits_and_is_claimable_when_its_time_has_come",
    ),
    mutant(
        "release-costs-an-attempt",
        "the attempt is not refunded on release",
        "release",
        'lease_id = NULL, attempts = attempts - 1 "\n        "WHERE id = ? AND lease_id = ?',
        'lease_id = NULL "\n        "WHERE id = ? AND lease_id = ?',
        "queue/test_queue.py::test_released_jobs_are_as_before_the_claim",
    ),
    # --- heartbeats and crashes ---
    mutant(
        "beat-of-any-worker",
        "a heartbeat extends another worker's lease",
        "_extend",
        "expires_at = ? WHERE id = ? AND worker_id = ? AND state = 'open'",
        "expires_at = ? WHERE id = ? AND ? > 0 AND state = 'open'",
        "queue/test_queue.py::test_a_lease_is_of_no_use_to_another_worker",
    ),
    mutant(
        "beat-of-any-state",
        "a heartbeat extends a lease that has ended",
        "_extend",
        "expires_at = ? WHERE id = ? AND worker_id = ? AND state = 'open'",
        "expires_at = ? WHERE id = ? AND worker_id = ?",
        "queue/test_queue.py::test_a_worker_that_lost_its_lease_changes_nothing",
    ),
    mutant(
        "beat-without-progress",
        "a worker sends heartbeats although its engine hangs",
        "_leave_if_stalled",
        "if holdings.stalled_sec() > timeout:",
        "if False:",
        "test_promises.py::test_promise_07_a_hung_worker_stops_beating_loses_its_leases_and_exits_hard[delete]",
    ),
    mutant(
        "reap-without-state",
        "reap also reads leases that have ended",
        "_EXPIRED",
        "SELECT id FROM leases WHERE state = 'open' AND expires_at <= ? AND worker_id <> ? AND",
        "SELECT id FROM leases WHERE expires_at <= ? AND worker_id <> ? AND",
        "queue/test_plans.py::test_each_hot_statement_uses_its_index",
    ),
    mutant(
        "crash-without-state",
        "a lease that has ended is ended again",
        "crash",
        "WHERE id = ? AND state = 'open' AND expires_at <= ? \"",
        'WHERE id = ? AND expires_at <= ? "',
        "queue/test_queue.py::test_a_worker_that_gives_up_marks_its_own_lease_as_crashed",
    ),
    mutant(
        "crash-though-extended",
        "a lease that was extended after reap read it is ended anyway",
        "crash",
        "AND state = 'open' AND expires_at <= ? \"",
        "AND state = 'open' AND ? > 0 \"",
        "queue/test_state_machine.py::test_a_lease_that_was_extended_since_somebody_looked_is_not_ended",
    ),
    mutant(
        "reap-oneself",
        "a worker reaps its own leases",
        "_EXPIRED",
        "AND worker_id <> ? AND expires_at",
        "AND ? >= 0 AND expires_at",
        "queue/test_queue.py::test_a_worker_never_reaps_itself",
    ),
    mutant(
        "crash-costs-an-attempt",
        "the attempt is not refunded after a crash",
        "crash",
        "lease_id = NULL, attempts = attempts - 1, crashes = crashes + 1",
        "lease_id = NULL, crashes = crashes + 1",
        "queue/test_queue.py::test_a_dead_workers_jobs_are_pending_with_the_attempt_refunded_and_the_crash_counted",
    ),
    mutant(
        "killer-never-fails",
        "a picture may kill any number of workers",
        "crash",
        "if solo and solo_crashes >= 1]",
        "if solo and solo_crashes >= 99]",
        "queue/test_queue.py::test_a_picture_that_crashed_two_workers_is_claimed_alone_and_fails_after_two_more",
    ),
    mutant(
        "neighbours-of-a-killer-fail",
        "two crashes in company fail a picture",
        "crash",
        "solo = int(lane == SOLO)",
        "solo = int(lane > 0)",
        "queue/test_queue.py::test_a_picture_that_crashed_two_workers_is_claimed_alone_and_fails_after_two_more",
    ),
    mutant(
        "wake-early",
        "a waiting job is pending at once",
        "_WAKE",
        "WHERE j.status = 'waiting' AND (j.not_before <= ? OR",
        "WHERE j.status = 'waiting' AND (? > 0 OR",
        "queue/test_queue.py::test_a_transient_failure_waits_and_is_claimable_when_its_time_has_come",
    ),
    # --- when the reply is lost ---
    mutant(
        "recover-knows-not-its-own",
        "a caption that was stored although the reply was lost is taken for another worker's",
        "recover",
        "status == JobState.DONE and caption_lease_id == lease.id",
        "status == JobState.DONE and caption_lease_id == 0",
        "queue/test_queue.py::test_a_completion_that_was_stored_without_the_answer_coming_back_is_recognised",
    ),
    mutant(
        "recover-takes-anothers",
        "a late caption takes a job that another worker holds",
        "recover",
        "completion.failure is None and status in (JobState.PENDING, JobState.WAITING)",
        "completion.failure is None and status in (JobState.PENDING, JobState.WAITING, JobState.LEASED)",
        "queue/test_queue.py::test_captions_of_a_lost_lease_are_kept_while_another_has_the_pictures_and_dropped_when_it_is_done",
    ),
    mutant(
        "recover-drops-what-another-has",
        "a late caption is dropped although the other worker may die",
        "recover",
        "            kept.add(job_id)",
        "            continue",
        "queue/test_queue.py::test_captions_of_a_lost_lease_are_kept_while_another_has_the_pictures_and_dropped_when_it_is_done",
    ),
    mutant(
        "recover-drops-what-is-free",
        "the captions of a reaped lease are dropped and made again",
        "recover",
        "            free.append(completion)",
        "            continue",
        "queue/test_queue.py::test_captions_of_a_reaped_lease_whose_jobs_are_free_are_stored_under_a_new_one",
    ),
    mutant(
        "recover-takes-another-runs",
        "a caption of a deleted run is stored in another run that reuses its ids",
        "_jobs_and_captions",
        "FROM jobs j WHERE id = ? AND run_id = ?",
        "FROM jobs j WHERE id = ? AND ? > 0",
        "queue/test_delete_run.py::test_a_late_completion_of_a_deleted_run_is_dropped_although_another_run_has_its_ids",
    ),
    mutant(
        "deletes-what-is-held",
        "a run is deleted although workers hold some of its pictures",
        "delete_run",
        "    if n := execute(conn, is_open, (run.id,)).scalar_one():",
        "    if n := 0:",
        "queue/test_delete_run.py::test_a_run_whose_pictures_are_held_stays_and_the_command_that_withdraws_them_is_named",
    ),
    mutant(
        "deleted-runs-keep-leases",
        "the lease of a claim that was under way when its run was deleted stays open",
        "clear_deleted",
        "        execute(conn, ending, (db.now(conn),))\n",
        "",
        "queue/test_delete_run.py::test_the_lease_of_a_claim_that_was_under_way_when_its_run_was_deleted_ends[delete]",
    ),
    mutant(
        "deleted-runs-are-counted",
        "a run that is being deleted is still shown",
        "counts",
        "WHERE r.deleted_at IS NULL GROUP BY r.id, r.name, r.paused",
        "GROUP BY r.id, r.name, r.paused",
        "queue/test_delete_run.py::test_a_deletion_that_was_killed_half_way_is_not_seen_and_vacuum_finishes_it",
    ),
    mutant(
        "enqueues-into-deleted-runs",
        "an enqueue that is under way goes on when its run is deleted",
        "_writing_to",
        "        runs.refuse_deleted(conn, run)\n",
        "",
        "queue/test_delete_run.py::test_an_enqueue_under_way_ends_when_its_run_is_deleted[delete]",
    ),
    mutant(
        "one-lease-time-for-all",
        "a worker is lost after another lease time than its own",
        "list_workers",
        "abs(at - seen_at) > lease_ttl_ms",
        "abs(at - seen_at) > 120_000",
        "queue/test_queue.py::test_a_worker_is_lost_after_its_own_lease_time[delete]",
    ),
    mutant(
        "late-telemetry",
        "a worker reports nothing in its first seconds",
        "FIRST_BEAT_SEC",
        "2.0",
        "60.0",
        "worker/test_worker.py::test_what_a_worker_measures_is_told_within_its_first_seconds_whatever_its_lease_time",
    ),
    mutant(
        "silent-self-check",
        "a worker looks lost during a long self-check",
        "_kept_alive",
        "    thread.start()\n    try:",
        "    try:",
        "worker/test_selfcheck.py::test_a_worker_whose_self_check_takes_longer_than_its_lease_time_is_not_lost",
    ),
    mutant(
        "files-without-bound",
        "as many requests are in flight as were asked for, whatever may be open",
        "_fitting",
        "    return n\n",
        "    return n_requests\n",
        "test_open_files.py::test_a_worker_that_may_open_64_files_keeps_fewer_requests_in_flight",
    ),
    mutant(
        "other-queue-when-pasted",
        "a printed command does not repeat the --db that was given",
        "for_this_queue",
        "if target is None or not target.is_option or",
        "if True or",
        "cli/test_operate.py::test_a_printed_command_names_the_queue_that_this_one_was_given[True]",
    ),
    mutant(
        "late-failure-counts",
        "a late failure fails a job that is free again",
        "recover",
        "elif completion.failure is None and status in (JobState.PENDING, JobState.WAITING):",
        "elif status in (JobState.PENDING, JobState.WAITING):",
        "queue/test_state_machine.py::test_a_late_failure_of_a_job_that_is_free_again_is_dropped",
    ),
    mutant(
        "forgets-what-it-holds",
        "a worker gives back leases that it still uses",
        "release_forgotten",
        "        if lease_id not in held:",
        "        if lease_id:",
        "queue/test_queue.py::test_what_a_worker_leased_without_knowing_is_given_back",
    ),
    mutant(
        "forgets-what-others-hold",
        "a worker gives back the leases of other workers",
        "release_forgotten",
        "WHERE state = 'open' AND worker_id = ? ORDER BY id\"",
        "WHERE state = 'open' AND ? > 0 ORDER BY id\"",
        "queue/test_queue.py::test_what_a_worker_leased_without_knowing_is_given_back",
    ),
    mutant(
        "any-database-will-do",
        "the captions of a spool go into a database that never issued their lease",
        "belongs",
        "WHERE l.id = ? AND w.uuid = ? ",
        "WHERE l.id = ? AND ? <> '' ",
        "queue/test_queue.py::test_a_lease_is_known_only_to_the_database_that_gave_it",
    ),
    mutant(
        "registered-once-only",
        "a worker that was not told of its registration cannot repeat it",
        "register_worker",
        '"ON CONFLICT (uuid) DO UPDATE SET seen_at = excluded.seen_at RETURNING id"',
        '"RETURNING id"',
        "worker/test_worker.py::test_a_worker_that_was_not_told_of_its_registration_is_registered_once[delete]",
    ),
    mutant(
        "waits-for-ever",
        "PostgreSQL: a worker waits for ever for a server that is silent",
        "ExpectingConnection._answered",
        "elif time.monotonic() - heard > self.silence_sec:",
        "elif False:",
        "test_network.py::test_a_connection_that_falls_silent_without_ending_is_given_up_by_both_ends",
    ),
    mutant(
        "freezes-for-ever",
        "PostgreSQL: only the idling of a worker's transaction is limited",
        "_limits",
        'limits["transaction_timeout"] = patience + SILENCE_SEC',
        "pass",
        "worker/test_torture.py::test_a_worker_frozen_inside_a_transaction_holds_up_no_other",
    ),
    # --- by hand ---
    mutant(
        "cancel-leaves-the-lease-open",
        "a lease whose last job is cancelled stays open",
        "cancel",
        '    for row in leases:\n        close_if_empty(conn, row[0], "closed", at)\n',
        "",
        "queue/test_queue.py::test_cancel_withdraws_all_that_is_not_finished_and_leaves_what_is",
    ),
    mutant(
        "cancel-spares-what-runs",
        "pictures that a worker holds are not cancelled",
        "cancel",
        "    if held:\n",
        "    held = []\n    if held:\n",
        "queue/test_queue.py::test_cancel_withdraws_all_that_is_not_finished_and_leaves_what_is",
    ),
    mutant(
        "retry-of-what-is-done",
        "a picture named to retry is captioned again although it is done",
        "retry",
        "statuses = \"'failed', 'cancelled'\" if image_ids",
        "statuses = \"'failed', 'cancelled', 'done'\" if image_ids",
        "queue/test_queue.py::test_retry_of_a_done_picture_does_nothing",
    ),
    mutant(
        "retry-keeps-the-record",
        "retry does not reset attempts and crashes",
        "retry",
        "SET status = 'pending', attempts = 0, crashes = 0, solo_crashes = 0, finished_at = NULL",
        "SET status = 'pending', finished_at = NULL",
        "queue/test_queue.py::test_retry_takes_what_failed_with_a_code",
    ),
    # --- the worker ---
    mutant(
        "suspects-in-company",
        "suspects are claimed while other pictures are held",
        "Fetcher._next_claim",
        "                if not self._holdings.wait_until_empty():\n                    return None\n",
        "",
        "queue/test_state_machine.py::test_suspects_are_claimed_when_nothing_else_is_held_and_nothing_is_claimed_beside_them[delete]",
    ),
    mutant(
        "claims-beside-suspects",
        "a worker that holds suspects claims ahead",
        "Holdings.wait_until_taken",
        "not self._state.ready and all(h.lease.lane == NORMAL for h in leases.values())",
        "not self._state.ready",
        "queue/test_state_machine.py::test_suspects_are_claimed_when_nothing_else_is_held_and_nothing_is_claimed_beside_them[delete]",
    ),
    mutant(
        "suspects-last",
        "suspects get no turn while other pictures are pending",
        "Fetcher._is_suspects_turn",
        "if (self._n_claims + 1) % SUSPECTS_EVERY:",
        "if True:",
        "test_promises.py::test_promise_08_suspects_have_their_turn_every_eighth_claim_though_others_are_pending[delete]",
    ),
    mutant(
        "judges-at-once",
        "a worker reaps other workers right after an outage",
        "Contact.unbroken_sec",
        "return at - self._since if is_unbroken else 0.0",
        "return 1e9",
        "queue/test_state_machine.py::test_others_are_judged_only_after_a_lease_time_of_unbroken_contact[delete]",
    ),
    mutant(
        "a-break-is-no-break",
        "a long gap counts as unbroken contact",
        "Contact.made",
        "        if at - self._last > self._ttl_sec / 2 or self._was_set(database_ms, at):\n",
        "        if self._was_set(database_ms, at):\n",
        "worker/test_fetcher.py::test_a_process_that_was_frozen_or_a_machine_that_slept_judges_nobody",
    ),
    mutant(
        "no-self-fencing",
        "a worker starts pictures whose lease has expired by its own clock",
        "Holdings._is_live",
        " and clock.now() < held.expires_at",
        "",
        "queue/test_state_machine.py::test_nothing_is_started_whose_lease_has_run_out_by_the_workers_own_clock[delete]",
    ),
    mutant(
        "lost-is-gone",
        "captions whose lease was lost are dropped instead of recovered",
        "Store._store_lease",
        "self._put_off(lease, left)\n",
        "self._holdings.settle(lease, [one.job_id for one in completions])\n",
        "worker/test_worker.py::test_a_caption_whose_lease_was_lost_while_nobody_took_its_picture_is_stored_all_the_same",
    ),
    mutant(
        "dead-claim-ahead",
        "a prefetched claim that was lost blocks the next one",
        "Holdings._remove",
        "        state.ready = deque(picture for picture in state.ready if picture.job_id not in job_ids)\n",
        "",
        "worker/test_fetcher.py::test_a_claim_ahead_that_is_lost_makes_room_for_the_next",
    ),
    mutant(
        "hung-is-forgotten",
        "a hung engine is not noticed once its pictures are lost",
        "Holdings.stalled_sec",
        "is_busy = self._has_rows and not self._is_waiting",
        "is_busy = self._state.running and not self._is_waiting",
        "worker/test_fetcher.py::test_an_engine_that_waits_for_pictures_does_not_stall_and_one_that_has_some_does",
    ),
    mutant(
        "longer-leases-are-judged",
        "a lease that lasts longer than the unbroken contact is reaped",
        "_EXPIRED",
        "AND expires_at - beat_at <= ? ",
        "AND ? >= 0 ",
        "queue/test_queue.py::test_a_lease_that_lasts_longer_than_the_contact_is_not_judged",
    ),
    mutant(
        "any-file-will-do",
        "a worker continues in a database that replaced its own",
        "_work",
        '    db.stay(context.database, "SELECT 1 FROM workers WHERE id = ? AND uuid = ?", '
        "(context.worker_id, context.uuid))\n",
        "",
        "worker/test_worker.py::test_a_worker_stores_nothing_in_a_database_that_took_the_place_of_its_own",
    ),
    mutant(
        "store-breaks-in-silence",
        "an error that ends the store does not end the worker",
        "_caption",
        "    store.raise_error()\n",
        "",
        "worker/test_worker.py::test_an_error_that_ends_the_store_ends_the_worker_and_what_was_captioned_is_kept",
    ),
    mutant(
        "stop-charges",
        "pictures that a stopping worker cannot give back are charged with a crash",
        "Store.release",
        "self._put_off(lease, released=job_ids)",
        "pass",
        "worker/test_worker.py::test_a_worker_that_is_stopped_while_the_database_is_locked_leaves_soon_and_charges_nobody",
    ),
    mutant(
        "worker-before-leases",
        "a heartbeat locks the worker row first, and deadlocks with complete on PostgreSQL",
        "heartbeat",
        "    held, spent = sorted(lease_ids), store_ms or {}\n",
        "    mark_seen(conn, worker_id, at, None)\n    held, spent = sorted(lease_ids), store_ms or {}\n",
        "test_postgresql.py::test_a_heartbeat_and_a_complete_of_one_worker_do_not_wait_for_each_other",
    ),
    mutant(
        "goodbye-out-of-order",
        "a goodbye locks the leases that have ended after the open ones",
        "lock_leases",
        "    if ids:\n",
        "    if False:\n",
        "test_postgresql.py::test_a_goodbye_locks_leases_in_order_also_those_that_have_ended",
    ),
    mutant(
        "books-on-anyones-lease",
        "storing time is added to another worker's lease",
        "add_store_ms",
        'AND worker_id = ?"',
        'AND ? > 0"',
        "queue/test_queue.py::test_what_storing_took_is_added_to_no_lease_of_another_worker",
    ),
    mutant(
        "books-on-open-leases-only",
        "the time of storing the last part of a lease is lost",
        "add_store_ms",
        'AND worker_id = ?"',
        "AND worker_id = ? AND state = 'open'\"",
        "queue/test_queue.py::test_what_storing_took_is_added_to_leases_also_when_they_have_ended",
    ),
    mutant(
        "a-silent-beat-forgets",
        "a heartbeat without telemetry deletes that of the last one",
        "mark_seen",
        "telemetry = COALESCE(?, telemetry)",
        "telemetry = ?",
        "queue/test_queue.py::test_a_heartbeat_and_a_goodbye_tell_what_a_worker_measured",
    ),
    mutant(
        "booked-twice",
        "the storing time of a heartbeat is reported again by the next one",
        "_beat_once",
        "    meter.mark_recorded(store_ms)\n",
        "",
        "worker/test_worker.py::test_the_wait_for_the_lock_is_time_of_storing_and_is_booked_once",
    ),
    # --- the spool ---
    mutant(
        "another-version-is-torn",
        "lines written by another version are deleted with the file",
        "abandoned",
        "yield entries, partial(_keep, path) if is_read else lambda kept: None",
        "yield entries, partial(_keep, path)",
        "worker/test_spool.py::test_a_line_of_another_version_is_left_to_that",
    ),
    mutant(
        "spool-unlocked",
        "a live worker's spool may be taken for a dead worker's",
        "_create",
        "        fcntl.flock(file, fcntl.LOCK_EX)\n",
        "",
        "queue/test_state_machine.py::test_a_living_workers_spool_is_left_alone_and_a_dead_ones_is_whole",
    ),
    mutant(
        "spool-taken-unasked",
        "a spool is taken over without acquiring its lock",
        "_locked",
        "            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            pass\n",
        "queue/test_state_machine.py::test_a_living_workers_spool_is_left_alone_and_a_dead_ones_is_whole",
    ),
    mutant(
        "spool-not-synced",
        "captions in the spool are lost in a power failure",
        "_append",
        "        os.fsync(file.fileno())\n    except OSError:",
        "        pass\n    except OSError:",
        "queue/test_state_machine.py::test_what_the_spool_keeps_is_on_the_disk_when_it_is_kept",
    ),
    # --- rules ---
    mutant(
        "rules-never-compared",
        "a run that began under older rules continues under new ones without consent",
        "check_rules",
        "if rules < mine and not accept_new_rules",
        "if rules < 0 and not accept_new_rules",
        "test_promises.py::test_promise_12_rules_that_were_accepted_are_the_only_way_a_run_mixes",
    ),
    mutant(
        "rules-3-for-nobody",
        "runs of quantised weights pin the rules of the others",
        "Recipe.rules",
        "return RULES if self.load_in is None else QUANTISED_RULES",
        "return RULES",
        "queue/test_rules.py::test_a_quantised_run_begun_under_rules_2_mixes_only_if_that_is_asked_for",
    ),
    mutant(
        "rules-3-for-everybody",
        "runs without quantised weights are refused for rules that do not concern them",
        "Recipe.rules",
        "return RULES if self.load_in is None else QUANTISED_RULES",
        "return QUANTISED_RULES",
        "queue/test_rules.py::test_a_run_begun_under_rules_2_goes_on_without_a_word",
    ),
    mutant(
        "rules-accepted-untold",
        "new rules that were accepted are not recorded",
        "pin",
        "if n := _n_captioned(conn, run):",
        "if n := 0:",
        "test_promises.py::test_promise_12_rules_that_were_accepted_are_the_only_way_a_run_mixes",
    ),
    mutant(
        "same-recipe-is-the-same",
        "pictures of a run under older rules cannot be captioned again with the same recipe",
        "enqueue_from",
        "if recipe == old.recipe and runs.rules_of",
        "if recipe == old.recipe or runs.rules_of",
        "queue/test_rules.py::test_pictures_of_a_run_under_older_rules_are_captioned_anew_by_the_same_recipe",
    ),
    mutant(
        "older-files-restored",
        "captions made under older rules are restored beside newer ones",
        "_check_manifest",
        "or not _are_its_rules(pinned, resolved)",
        "or False",
        "queue/test_rules.py::test_captions_under_older_rules_are_not_restored_beside_newer_ones",
    ),
    mutant(
        "rules-as-at-the-start",
        "a worker goes on with a run that has newer rules by now",
        "Fetcher._unfinished",
        "            queue.check_rules(conn, self._context.run)\n",
        "",
        "queue/test_rules.py::test_a_worker_ends_once_its_run_goes_on_under_newer_rules[delete]",
    ),
    mutant(
        "schema-as-at-the-start",
        "a worker goes on in a database that was migrated",
        "Fetcher._unfinished",
        "            db.refuse_other_schema(conn)\n",
        "",
        "queue/test_rules.py::test_a_worker_ends_once_the_database_has_a_newer_schema[delete]",
    ),
    # --- pictures ---
    mutant(
        "padding-decides",
        "padding and labels determine the window",
        "_without",
        "return rest[distances >= nearest - spread] if is_far and is_picture else values",
        "return values",
        "data/test_window.py::test_padding_outside_the_field_of_view_does_not_decide_the_window",
    ),
    mutant(
        "drawings-lose-levels",
        "a level of a drawing is taken for padding",
        "_without",
        "return rest[distances >= nearest - spread] if is_far and is_picture else values",
        "return rest[distances >= nearest - spread] if is_far else values",
        "data/test_window.py::test_all_levels_of_a_drawing_count",
    ),
    mutant(
        "full-range-windowed",
        "16-bit colours that use the full range are windowed too",
        "colours",
        'elif values.dtype.kind == "u" and',
        'elif values.dtype.kind == "x" and',
        "data/test_images.py::test_16_bit_colours_of_full_range_stay_as_they_are",
    ),
    mutant(
        "min-is-black",
        "MinIsWhite of a deep TIFF is ignored",
        "_of_tiff",
        'min_is_white=_tag(page, "PhotometricInterpretation") == _MIN_IS_WHITE',
        "min_is_white=False",
        "data/test_images.py::test_where_the_file_says_that_the_lowest_value_is_white_it_is",
    ),
    mutant(
        "alpha-hides",
        "an alpha that is 0 everywhere hides the picture",
        "_flatten",
        "    if _constant(alpha):\n",
        "    if False:\n",
        "data/test_images.py::test_an_alpha_that_is_the_same_everywhere_hides_no_picture",
    ),
    mutant(
        "always-on-black",
        "black strokes on a transparent page are put on a black background",
        "_flatten",
        "(255,) * 4 if _needs_white(picture)",
        "(255,) * 4 if False",
        "data/test_images.py::test_black_strokes_on_transparent_white_are_seen_on_white",
    ),
    mutant(
        "cut-is-whole",
        "a JPEG without some of its pixels passes for one without its end marker",
        "_if_all_equal",
        "all(picture is not None and picture == first for picture in pictures)",
        "all(picture is not None for picture in pictures)",
        "data/test_images.py::test_a_jpeg_that_lacks_one_byte_of_its_pixels_or_more_is_truncated",
    ),
    mutant(
        "monochrome1-as-it-is",
        "DICOM's MONOCHROME1 is not inverted",
        "_shades",
        'if kind == "MONOCHROME1":',
        'if kind == "MONOCHROME0":',
        "data/test_dicom.py::test_monochrome1_is_inverted",
    ),
    mutant(
        "hashed-again",
        "pictures that have a hash are hashed again",
        "_condition",
        "AND NOT EXISTS (SELECT 1 FROM image_hashes h WHERE h.image_id = i.id AND h.algorithm = ?)",
        "AND ? <> ''",
        "scores/test_leaks.py::test_a_killed_search_goes_on_where_it_was",
    ),
    mutant(
        "less-than-near",
        "hashes that differ in just the distance of near-duplicates are not near",
        "_close_in_block",
        "near = (distances <= DISTANCE)",
        "near = (distances < DISTANCE)",
        "scores/test_leaks.py::test_hashes_are_compared_in_blocks_as_one_by_one",
    ),
    mutant(
        "all-black-alike",
        "pictures that are nearly black are all near-duplicates",
        "_close_in_block",
        "SHARE * distances",
        "0 * distances",
        "scores/test_leaks.py::test_pictures_that_are_nearly_black_are_not_all_alike",
    ),
    mutant(
        "near-duplicates-scored",
        "scores without near-duplicates contain them",
        "without_near_duplicates",
        "pair.image_id not in known.near for",
        "pair.image_id != '' for",
        "scores/test_leaks.py::test_scores_without_near_duplicates_are_those_of_the_other_pictures_alone",
    ),
    mutant(
        "negations-of-anything",
        "a probe flips negations of what is no finding",
        "negation_flip",
        "if _FINDING.search(_stated(text, match)):",
        "if True:",
        "scores/test_changes.py::test_a_change_applies_where_it_changes_the_meaning_and_nowhere_else",
    ),
    mutant(
        "abbreviations-swapped",
        "a probe swaps the sides in texts that explain an abbreviation by one",
        "side_swap",
        " or _ABBREVIATION.search(text)",
        "",
        "scores/test_changes.py::test_a_change_applies_where_it_changes_the_meaning_and_nowhere_else",
    ),
    mutant(
        "denied-after-any-comma",
        'what follows any comma after a "no" is denied',
        "_forward",
        "if not (_ADJECTIVE.search(ahead, 0, comma.start()) or _GOES_ON.search(ahead, comma.start(), end)):",
        "if False:",
        "scores/test_facts.py::test_what_is_denied",
    ),
    mutant(
        "denied-up-to-the-first-comma",
        'a comma between adjectives ends what a "no" denies',
        "_forward",
        "_ADJECTIVE.search(ahead, 0, comma.start()) or ",
        "",
        "scores/test_facts.py::test_what_is_denied",
    ),
    mutant(
        "changed-and-original-drawn-apart",
        "the interval of a fall draws changed captions and originals apart",
        "_falls",
        "np.hstack([before.statistics(), after.statistics()])",
        "np.hstack([before.statistics(), after.statistics()[::-1]])",
        "scores/test_probe.py::test_originals_and_changed_captions_are_drawn_together",
    ),
    mutant(
        "scores-of-the-original-probed",
        "a probe shows a score that no caption can move",
        "_falls",
        "if name != OF_THE_ORIGINAL and",
        "if",
        "scores/test_probe.py::test_json_has_the_shape_that_is_documented",
    ),
    mutant(
        "answers-of-a-command-twice",
        "a command that answers twice for a caption is believed",
        "_read_answers",
        "if id in answers:",
        "if False:",
        "scores/test_plugins.py::test_a_command_that_fails_is_not_computed",
    ),
    mutant(
        "first-words-of-a-command",
        "a command that fails is reported with the first that it said, not the last",
        "_lines",
        "[-_TAIL:]",
        "[:_TAIL]",
        "scores/test_plugins.py::test_a_command_that_fails_is_not_computed",
    ),
    mutant(
        "version-of-a-plugin-forgotten",
        "a plug-in of another version is not computed again",
        "_function",
        'edition = f"{place.value} {_version(function, place)}"',
        'edition = f"{place.value}"',
        "scores/test_plugins.py::test_its_version_says_whether_it_is_computed_again",
    ),
    mutant(
        "imageclef-without-a-part",
        "an overall of ImageCLEF is given although some captions lack a part of it",
        "_add_imageclef",
        "if not np.isnan(values[labelled]).any()",
        "",
        "scores/test_imageclef.py::test_a_part_that_some_captions_lack_makes_no_overall",
    ),
    mutant(
        "places-in-answers",
        "a caption that holds a place for a picture becomes an answer",
        "unusable",
        "if control := control_in(answer):",
        "if False:",
        "results/test_publish.py::test_a_caption_with_a_place_for_a_picture_is_left_out_and_told",
    ),
    mutant(
        "originals-over-generated",
        "an export of originals replaces one of generated captions",
        "is_another",
        '("run", "recipe_hash", "format", "text", "captions")',
        '("run", "recipe_hash", "format", "captions")',
        "results/test_publish.py::test_originals_do_not_replace_generated_captions",
    ),
    mutant(
        "headers-published",
        "a DICOM file is published with its header",
        "as_file",
        "if formats.is_dicom(data) or frame > 1:",
        "if frame > 1:",
        "data/test_dicom.py::test_what_is_published_of_it_is_a_png_of_its_pixels",
    ),
    mutant(
        "blank-untold",
        "a picture of one level is not flagged",
        "Fetcher._prepare",
        "is_blank=is_blank(picture)",
        "is_blank=False",
        "worker/test_blank.py::test_a_picture_of_one_level_is_captioned_and_flagged",
    ),
    # --- models and data sets ---
    mutant(
        "ends-of-the-config-alone",
        "a caption continues past the end tokens that only the tokenizer and the chat template name",
        "end_tokens",
        "tokenizer.eos_token_id, turn_end(processor, name)]",
        "*([] if named else [tokenizer.eos_token_id])]",
        "engines/test_template.py::test_captions_end_where_they_did_when_the_generation_config_names_another_end",
    ),
    mutant(
        "adapter-beside-put-on",
        "an adapter beside the weights is applied silently",
        "load",
        "            adapter_kwargs=NO_ADAPTER,\n",
        "",
        "engines/test_adapters.py::test_an_adapter_beside_a_models_weights_is_told_of_and_not_put_on",
    ),
    mutant(
        "vision-quantised",
        "--load-in quantises the vision tower and the head too",
        "quantisation",
        "isinstance(layer, nn.Linear) and layer not in layers]",
        "False]",
        "engines/test_adapters.py::test_only_the_layers_of_the_language_model_are_quantised_in_every_family",
    ),
    mutant(
        "head-quantised",
        "--load-in quantises the head too",
        "quantisation",
        "isinstance(layer, nn.Linear) and layer not in layers]",
        'isinstance(layer, nn.Linear) and layer not in layers and path != "lm_head"]',
        "engines/test_adapters.py::test_only_the_layers_of_the_language_model_are_quantised_in_every_family",
    ),
    mutant(
        "all-counted-as-quantised",
        "the estimate of the memory takes the vision tower and the embeddings for quantised",
        "n_bytes",
        "n_others * dtype.itemsize",
        "n_others * bits // 8",
        "engines/test_adapters.py::test_the_estimate_of_the_memory_is_what_the_weights_take",
    ),
    mutant(
        "copies-untold",
        "nobody hears of a transformers that copies keys and values at each step",
        "warn_of_copies",
        "if n > 1 and not hasattr",
        "if n > 1 and hasattr",
        "engines/test_engines.py::test_a_transformers_that_copies_keys_and_values_at_each_step_is_named_with_the_remedy",
    ),
    mutant(
        "copies-of-nothing",
        "models without shared keys are warned of, too",
        "warn_of_copies",
        "if n > 1 and not hasattr",
        "if n > 0 and not hasattr",
        "engines/test_engines.py::test_a_model_whose_query_heads_share_no_keys_is_not_warned_of",
    ),
    mutant(
        "blind-to-drawings",
        "alike captions of pictures of one scene count as proof that the model is blind",
        "check",
        "    if not sees and _n_captioned(looks) >= MIN_PICTURES:\n",
        "    if False:\n",
        "worker/test_selfcheck.py::test_pictures_of_one_scene_do_not_prove_that_the_model_is_blind",
    ),
    mutant(
        "too-few-pass",
        "a self-check that saw too few pictures counts as passed",
        "check",
        "return ended(False, _too_few(looks), inconclusive=True)",
        "return ended(True, _too_few(looks))",
        "worker/test_selfcheck.py::test_one_caption_for_less_than_four_pictures_proves_nothing_and_is_no_pass",
    ),
    mutant(
        "registered-unseen",
        "a split none of whose pictures can be opened is registered",
        "enqueue",
        "            require_pictures(dataset, split, shards[split], recipe)\n",
        "            pass\n",
        "queue/test_enqueue.py::test_a_split_of_which_no_picture_can_be_opened_is_refused_before_anything_is_written",
    ),
    # --- continuous decoding ---
    mutant(
        "positions-stand-still",
        "positions do not grow with the caption",
        "ContinuousDecoder._decode",
        "        slots.positions.index_add_(-1, slots.chosen, grown.expand(*slots.positions.shape[:-1], -1))\n",
        "",
        SAME,
    ),
    mutant(
        "one-position-too-early",
        "a caption begins at the position of the prompt's last token",
        "ContinuousDecoder._place",
        "positions[..., -1] + 1",
        "positions[..., -1]",
        SAME,
    ),
    mutant(
        "mask-hides-the-newest",
        "a token does not see itself",
        "ContinuousDecoder._decode",
        "[:width] > slots.ends[:, None]",
        "[:width] >= slots.ends[:, None]",
        SAME,
    ),
    mutant(
        "mask-shows-the-dead",
        "a row sees what a longer row left in its slot",
        "ContinuousDecoder._decode",
        "[:width] > slots.ends[:, None]",
        "[:width] > slots.ends[:, None] + 1",
        SAME,
    ),
    mutant(
        "free-slots-grow",
        "a free slot counts on, and in the end writes beyond its buffer",
        "Slots.free",
        "        self.active[at] = 0\n",
        "",
        "engines/test_continuous.py::test_a_row_keeps_its_slot_and_a_free_one_is_taken_from_the_front",
    ),
    mutant(
        "free-slots-keep-their-length",
        "a free slot writes where its last row ended, beyond the width of a step",
        "Slots.free",
        "        self.lengths[at] = 0\n",
        "",
        "engines/test_continuous.py::test_a_step_writes_into_a_free_slot_at_its_first_place_and_nowhere_else",
    ),
    mutant(
        "rows-swapped-when-sparse",
        "a step of the slots in use reads the keys of the first slots",
        "Slots.part_of",
        "            return buffer.index_select(dim, self.chosen)\n",
        "            return buffer.narrow(dim, 0, len(self.chosen))\n",
        "engines/test_continuous.py::test_rows_with_free_slots_before_them_say_the_same",
    ),
    mutant(
        "grown-without-its-content",
        "longer buffers lose the content of the running rows",
        "_grown",
        "    larger[tuple(slice(size) for size in tensor.shape)] = tensor\n",
        "",
        SAME,
    ),
    mutant(
        "infinite-logits-are-a-token",
        "logits that are not finite give a token",
        "ContinuousDecoder._say",
        "tokens.where(torch.isfinite(values), NOT_FINITE)",
        "tokens",
        "engines/test_engines.py::test_logits_that_are_not_finite_are_a_failure_and_never_a_caption",
    ),
    # --- what a GPU is asked to do ---
    mutant(
        "grids-on-the-device",
        "grids are uploaded, and every layer of the vision tower reads them back",
        "keeps_grid",
        'return hasattr(functions(tower(model)), "get_vision_position_ids")',
        "return False",
        "engines/test_launches.py::test_a_prefill_of_8_pictures_reads_nothing_from_the_device_but_its_tokens",
    ),
    mutant(
        "two-reads-a-step",
        "a step reads whether its logits are finite on its own",
        "ContinuousDecoder._charge",
        "        now = time.perf_counter()\n",
        "        self._slots.said[: max(slots) + 1].tolist()\n        now = time.perf_counter()\n",
        "engines/test_launches.py::test_a_step_launches_few_kernels_and_reads_nothing_but_its_tokens",
    ),
    mutant(
        "norms-of-six-kernels",
        "norms stay as they come",
        "_fuse_norm",
        "        norm.forward = forward\n",
        "        pass\n",
        "engines/test_launches.py::test_a_step_launches_few_kernels_and_reads_nothing_but_its_tokens",
    ),
    mutant(
        "every-norm-is-plain",
        "Gemma's norm, which adds one to its weight, is computed without the one",
        "_fuse_norm",
        "    if torch.allclose(norm(sample), forward(sample), rtol=tolerance, atol=tolerance):\n",
        "    if True:\n",
        "engines/test_kernels.py::test_only_norms_that_are_plain_are_fused",
    ),
    mutant(
        "parts-of-another-input",
        "a projection gives its part of the product of an earlier input",
        "_Product.part",
        "        if rows is not self._input:\n",
        "        if not self._parts:\n",
        "engines/test_kernels.py::test_a_part_of_a_product_belongs_to_the_input_it_is_asked_for",
    ),
    mutant(
        "pixels-stay-wide",
        "pixels are uploaded in float32",
        "TransformersEngine._staged",
        "        tensor = tensor.to(self.dtype)\n",
        "",
        "engines/test_launches.py::test_pixels_are_cast_beforehand_as_the_model_casts_them",
    ),
    mutant(
        "cudnn-attention",
        "cuDNN attention stays on",
        "disable_cudnn_attention",
        "    torch.backends.cuda.enable_cudnn_sdp(False)\n",
        "",
        "engines/test_engines.py::test_cudnn_attention_is_off_before_the_first_attention_and_stored_with_the_versions",
    ),
    mutant(
        "graphs-of-buffers-that-are-gone",
        "graphs are replayed after the buffers grew",
        "ContinuousDecoder._place",
        "            self._graphs.clear()\n",
        "            pass\n",
        "engines/test_graphs.py::test_graphs_are_captured_anew_when_the_buffers_are_and_not_while_rows_run",
    ),
    mutant(
        "graphs-captured-among-rows",
        "graphs are captured while rows run, which the trial steps would move on",
        "ContinuousDecoder._place",
        "if self._uses_graphs and not self._graphs and not self._rows:",
        "if self._uses_graphs and not self._graphs:",
        "engines/test_graphs.py::test_graphs_are_captured_anew_when_the_buffers_are_and_not_while_rows_run",
    ),
    mutant(
        "graphs-too-narrow",
        "a graph narrower than a row is replayed",
        "Graphs.replay",
        "shape[0] >= n and shape[1] >= width",
        "shape[0] >= n",
        "engines/test_graphs.py::test_every_step_is_run_once_before_it_is_captured_and_the_smallest_that_holds_it_is_replayed",
    ),
    mutant(
        "rows-before-groups",
        "out of memory while reading restarts the rows in progress",
        "ContinuousDecoder._retreat",
        "        if len(group) > 1 and not self._reserving:\n",
        "        if False:\n",
        "engines/test_continuous.py::test_out_of_memory_while_reading_halves_what_is_read_together_and_keeps_the_rows",
    ),
    mutant(
        "libraries-run-out-of-nothing",
        "cuBLAS without memory ends the worker",
        "is_out_of_memory",
        " or bool(_LIBRARY_OUT_OF_MEMORY.search(str(error)))",
        "",
        "engines/test_engines.py::test_only_allocations_that_failed_in_a_library_count_as_out_of_memory",
    ),
    mutant(
        "claims-two-ahead",
        "the next claim does not wait until the prepared pictures are taken",
        "Holdings.wait_until_taken",
        "not self._state.ready and all(",
        "all(",
        "worker/test_fetcher.py::test_what_is_leased_is_the_running_rows_and_one_claim_and_row_groups_are_read_once",
    ),
    # --- requests ---
    mutant(
        "limit-of-the-recipe-for-all",
        "an answer goes on to the recipe's limit although its request has a smaller one",
        "Loaded.is_over",
        "row.picture.inputs.max_new_tokens",
        "self.max_new_tokens",
        "engines/test_requests.py::test_a_requests_own_limit_holds_and_changes_no_neighbour",
    ),
    mutant(
        "limit-beyond-the-buffers",
        "a request may ask for more tokens than buffers have room for",
        "Request.limit",
        "if self.max_new_tokens > recipe.max_new_tokens:",
        "if False:",
        "engines/test_requests.py::test_a_limit_above_the_recipes_is_refused",
    ),
    mutant(
        "dropped-in-silence",
        "an instruction that the chat template drops is not missed",
        "messages_prompt",
        "    if lack := _lack(prompt, messages, _tokens(processor, OF_A_PICTURE)):\n",
        '    if lack := "":\n',
        "engines/test_requests.py::test_what_a_template_cannot_render_or_drops_is_refused",
    ),
    mutant(
        "pictures-in-other-places",
        "a server gets the pictures of a request in reverse order",
        "_with_pictures",
        "iter(pictures)",
        "iter(pictures[::-1])",
        "engines/test_openai.py::test_messages_arrive_with_their_pictures_in_their_places_and_their_limit",
    ),
    mutant(
        "shrinks-its-limit-away",
        "a request whose pictures are reduced loses its limit",
        "TransformersEngine._shrink",
        "replace(request, pictures=",
        "replace(request, max_new_tokens=None, pictures=",
        "engines/test_requests.py::test_pictures_too_large_together_are_all_reduced_and_their_messages_and_limit_stay",
    ),
    mutant(
        "tells-the-end",
        "the token that ends an answer is told like one of its text",
        "tell",
        " and row.tokens[-1] not in ends",
        "",
        "engines/test_requests.py::test_the_tokens_told_of_every_row_are_those_of_its_completion_and_come_before_it",
    ),
    mutant(
        "tells-from-where-it-was",
        "a row that begins again in a static batch keeps the tokens from before",
        "StaticDecoder._generate",
        "            row.tokens.clear()\n",
        "            pass\n",
        "engines/test_requests.py::test_a_row_that_begins_again_is_told_from_its_first_token_again",
    ),
    # --- the server ---
    mutant(
        "serves-any-name",
        "a name of another site that leads here is answered",
        "_check_host",
        "if not (_is_address(host) or host in access.hosts):",
        "if not host:",
        "web/test_access.py::test_a_name_that_was_rebound_to_it_gets_nothing",
    ),
    mutant(
        "obeys-other-sites",
        "a page of another site changes the queue",
        "_check_origin",
        "    if not is_own:",
        "    if False:",
        "web/test_access.py::test_a_page_of_another_site_changes_nothing",
    ),
    mutant(
        "needs-no-token",
        "every request passes for one with the token",
        "_equal",
        "hmac.compare_digest(given.encode(), token.encode())",
        "True",
        "web/test_access.py::test_beyond_this_machine_nothing_is_told_without_the_token",
    ),
    mutant(
        "writes-though-read-only",
        "--read-only hides the buttons and nothing else",
        "Guard._answer",
        "if is_write and self._access.read_only:",
        "if False:",
        "web/test_access.py::test_a_token_from_the_environment_is_never_printed_and_read_only_lets_nobody_write",
    ),
    mutant(
        "answers-about-another-database",
        "a database that took the place of the first is shown as if it were that one",
        "Site._check",
        "if self._first_run is not None and first != self._first_run:",
        "if False:",
        "web/test_trouble.py::test_a_database_that_was_replaced",
    ),
    mutant(
        "dies-of-sigterm",
        "the server waits for pages that are open until it cuts them off",
        "_Server._stop",
        "self._app.state.dashboard.live.close()",
        "pass",
        "web/test_trouble.py::test_it_stops_at_once_though_pages_are_open",
    ),
    mutant(
        "looks-for-each",
        "every viewer has a look at the queue of its own",
        "Shared.now",
        "if self._seen is None or time.monotonic() - self._seen[0] >= self._every_sec:",
        "if True:",
        "web/test_live.py::test_many_who_ask_at_once_share_one_look",
    ),
    mutant(
        "forgets-segments",
        "captions that are in a checkpoint segment are missing from the throughput",
        "throughput",
        "(_not_in_a_segment(read, keys, since, until), _in_segments(read, keys, since))",
        "(_not_in_a_segment(read, keys, since, until),)",
        "queue/test_rates.py::test_captions_in_checkpoint_segments_are_counted_too_and_none_twice",
    ),
    # --- reviews, edits, studies ---
    mutant(
        "edit-over-another",
        "an edit is taken although somebody else edited the caption since",
        "_refuse_unseen",
        "if current is not None and current.id != seen:",
        "if current is not None and current.id == -1:",
        "review/test_edits.py::test_of_two_people_who_edit_one_caption_the_second_is_given_the_first_ones_edit",
    ),
    mutant(
        "edit-by-the-clock-alone",
        "if the clock goes back, an earlier edit is taken for the latest",
        "_row",
        "at = max(new.at, after + 1)",
        "at = new.at",
        "review/test_edits.py::test_the_latest_edit_stands_although_the_clock_went_back",
    ),
    mutant(
        "latest-edit-by-id",
        "an imported edit stands, however old it is",
        "latest",
        "ORDER BY x.at DESC, x.uuid DESC",
        "ORDER BY x.id DESC",
        "review/test_exchange.py::test_two_halves_come_together_in_any_order",
    ),
    mutant(
        "replace-what-was-edited-since",
        "a replacement overwrites edits that its preview did not show",
        "replace_all",
        "if last == one.seen",
        "if last != -1",
        "review/test_edits.py::test_a_replacement_leaves_alone_what_its_preview_did_not_show",
    ),
    mutant(
        "undo-what-was-edited-since",
        "undoing an act overwrites later edits",
        "undo_act",
        "if current[one.job_id][0] == one.id",
        "if current[one.job_id][0] >= one.id",
        "review/test_edits.py::test_a_replacement_is_shown_made_as_one_act_and_undone_as_one",
    ),
    mutant(
        "delete-what-people-did",
        "a run is deleted although people worked on its captions",
        "delete_run",
        "    _refuse_used(conn, run)\n",
        "",
        "review/test_edits.py::test_a_run_that_people_worked_on_is_not_deleted",
    ),
    mutant(
        "import-beside-another-caption",
        "reviews of another caption of the same picture are imported",
        "_refuse_unknown",
        "if jobs[row.place][1] != row.caption]",
        "if not row.caption]",
        "review/test_exchange.py::test_a_file_with_a_wrong_row_is_refused_whole",
    ),
    mutant(
        "export-with-later-edits",
        "an export holds edits that were made while it was written",
        "latest",
        "AND x.id <= ? ",
        "AND x.id <= ? + 1000000 ",
        "review/test_edited_captions.py::test_an_export_holds_no_edit_that_was_made_after_it_began",
    ),
    mutant(
        "restore-of-edited-captions",
        "an export with edits is restored as if the machine had written it",
        "_check_whole",
        "if any(kinds) or path.stem",
        "if path.stem",
        "review/test_edited_captions.py::test_checkpoints_hold_the_machines_texts_and_restore_takes_only_those",
    ),
    mutant(
        "one-score-for-both-texts",
        "scores of edited captions replace those of the machine's",
        "_key",
        'if texts.kind == "machine" else',
        "if texts.kind else",
        "review/test_edited_captions.py::test_edited_captions_are_scored_apart",
    ),
    mutant(
        "results-while-the-key-is-closed",
        "the results of a study can be seen before everything is read",
        "readings",
        "if not known.is_open:",
        "if known.n_missing < 0:",
        "review/test_studies.py::test_the_key_is_closed_until_everything_is_read_and_nobody_reads_after_that",
    ),
    mutant(
        "reading-with-an-open-key",
        "a reader can go on after the key was opened",
        "_refuse_open",
        "if known.is_open:",
        "if known.n_missing < 0:",
        "review/test_studies.py::test_unblinding_opens_the_key_early_is_recorded_and_ends_the_study",
    ),
    mutant(
        "key-turned-round",
        "the results exchange the texts of each picture",
        "_key",
        "ORDER BY t.reader_number, t.position, t.place",
        "ORDER BY t.reader_number, t.position, t.place DESC",
        "review/test_studies.py::test_preferences_count_each_picture_once_and_are_told_by_modality",
    ),
    mutant(
        "sample-not-balanced",
        "a study is drawn from one modality after the other",
        "_balanced",
        "in_turn = chain.from_iterable(zip_longest(*groups))",
        "in_turn = chain.from_iterable(groups)",
        "review/test_studies.py::test_a_sample_is_balanced_by_modality_and_the_same_for_the_same_seed",
    ),
    # --- from one database into another ---
    mutant(
        "merge-over-a-worker",
        "a merge takes pictures away from the workers that hold them",
        "_Merge._jobs_here",
        'if job["status"] == JobState.LEASED}',
        'if job["status"] == "held"}',
        "transfer/test_merge.py::test_what_a_worker_here_holds_is_left_to_it_and_merged_later",
    ),
    mutant(
        "keep-what-is-here",
        "of two captions, a merge keeps the one that it finds",
        "_Merge._captions",
        "if made < known:",
        "if made.generated_at < 0:",
        "transfer/test_merge.py::test_the_caption_that_was_made_first_is_kept",
    ),
    mutant(
        "verdicts-do-not-count",
        "a caption that people judged gives way to an earlier one",
        "_USED",
        '("reviews", "edits", "study_items")',
        '("study_items",)',
        "transfer/test_merge.py::test_a_caption_that_was_judged_is_kept_before_one_that_was_made_first",
    ),
    mutant(
        "retried-in-vain",
        "a failure comes back whenever its part is merged again",
        "_Merge._state",
        'if status == JobState.FAILED and not has_failed and mine["status"] is not None:',
        'if status == JobState.FAILED and not has_failed and mine["status"] == "retried":',
        "transfer/test_merge.py::test_a_failure_that_was_retried_here_does_not_come_back_with_the_part_but_a_new_one_does",
    ),
    mutant(
        "failures-as-they-come",
        "the failure that was merged last is shown as the latest",
        "add_to_log",
        "and place < latest[row[key]]}",
        "and place < ()}",
        "transfer/test_merge.py::test_the_latest_failure_is_shown_in_whatever_order_they_come",
    ),
    mutant(
        "lease-of-another-database",
        "the spool takes a merged lease for the one of that id",
        "belongs",
        'AND l.origin_id IS NULL"',
        '"',
        "transfer/test_merge.py::test_a_spooled_caption_of_a_part_is_not_taken_for_one_of_the_database_it_was_merged_into",
    ),
    mutant(
        "copied-on-trust",
        "a copy is not compared with the original",
        "_copy",
        "_verify(write, one, progress)",
        "progress(one.table, one.rows, one.rows)",
        "transfer/test_copy.py::test_a_row_that_is_not_what_was_read_is_noticed",
    ),
    mutant(
        "copied-under-way",
        "what begins while a database is copied is not noticed",
        "_copy",
        "if _newest_lease(read) != newest:",
        "if _newest_lease(read) < newest:",
        "transfer/test_copy.py::test_what_begins_while_a_database_is_copied_is_noticed_and_the_copy_stays_empty",
    ),
    mutant(
        "lease-ids-again",
        "a copied database gives ids of leases once more",
        "_continue_ids",
        'execute(read, "SELECT seq FROM sqlite_sequence WHERE name = ?", (table.name,)).scalar() or 0)',
        "0)",
        "transfer/test_copy.py::test_a_copy_has_every_row_and_its_ids_go_on_where_those_of_the_original_do",
    ),
    mutant(
        "units-of-each-shard",
        "parts count the row groups of each shard from the first",
        "Units.of",
        "first[shard.path] = n",
        "first[shard.path] = 0",
        "queue/test_enqueue.py::test_parts_are_every_nth_row_group_across_shards_disjoint_and_together_everything",
    ),
)


# --- Running the tests ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    verdict: str
    by: str
    seconds: float


@contextmanager
def copy() -> Iterator[Path]:
    """A copy of the files that the tests need, in a folder whose path is short enough for a socket below it."""
    with tempfile.TemporaryDirectory(prefix="mut_") as folder:
        place = Path(folder)
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, place / part)
        yield place


def environment(place: Path) -> dict[str, str]:
    # No bytecode: Python would not notice that a source of the same size changed within a second.
    return os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}


def check_that_the_copy_is_imported(place: Path) -> None:
    """Exits if the environment imports an installed original instead of the copy."""
    told = subprocess.run(
        [sys.executable, "-c", "import rococap.queue; print(rococap.queue.__file__)"],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if told != str(place / "rococap" / "queue" / "__init__.py"):
        sys.exit(f"The tests would import {told}, not the copy in {place}.")


def ask(place: Path, tests: Sequence[str]) -> Answer:
    """Runs tests up to the first failure. Tests that hang for LIMIT_SEC count as failed."""
    started = time.monotonic()
    options = ("-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(place / "t"))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)],
        cwd=place,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=LIMIT_SEC)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so that it stops its database server
        out = ""
    seconds = time.monotonic() - started
    _end(process)
    if not out:
        return Answer("caught", f"nothing: it hung for {LIMIT_SEC} s", seconds)
    if process.returncode == 0:
        return Answer("SURVIVED", "", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", out, re.MULTILINE)
    if process.returncode != 1 or failed is None:
        return Answer("BROKEN", out.strip().splitlines()[-1], seconds)
    return Answer("caught", failed[1], seconds)


def _end(process: "subprocess.Popen[str]") -> None:
    """Kills the test process and the workers that a failed test left behind."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def definitions(source: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, line after the last) of the functions, classes, methods and constants of a module."""

    def within(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, int, int]]:
        for node in body:
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))]) - 1
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name, first, node.end_lineno or 0
            if isinstance(node, ast.ClassDef):
                yield from within(node.body, f"{prefix}{node.name}.")
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    yield prefix + target.id, first, node.end_lineno or 0

    return within(ast.parse(source).body, "")


def find(root: Path, where: str, old: str) -> list[tuple[Path, int, int]]:
    """The occurrences of `old` in definitions called `where`: the file, and the lines of the definition."""
    found = []
    for path in sorted((root / "rococap").rglob("*.py")):
        source = path.read_text()
        lines = source.splitlines(keepends=True)
        if old in source:
            for name, first, last in definitions(source):
                found += [(path, first, last)] * "".join(lines[first:last]).count(old) if name == where else []
    return found


def apply(place: Path, mutant: Mutant) -> str | None:
    """Breaks the copy. Returns a reason if the mutant no longer fits the source, and None if it does."""
    for where, old, new in mutant.edits:
        found = find(place, where, old)
        if len(found) != 1:
            return f"its text is {len(found)} times in {where}: {old.strip().splitlines()[0]}"
        path, first, last = found[0]
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join([*lines[:first], "".join(lines[first:last]).replace(old, new), *lines[last:]]))
    return None


def try_out(place: Path, mutant: Mutant) -> Answer:
    paths = {path for where, old, _ in mutant.edits for path, _, _ in find(place, where, old)}
    whole = {path: path.read_text() for path in paths}
    try:
        if misfit := apply(place, mutant):
            return Answer("MISFIT", misfit, 0.0)
        return ask(place, mutant.tests)
    finally:
        for path, source in whole.items():
            path.write_text(source)


def listed() -> str:
    """The text of docs/mutants.md."""
    head = "# Mutants\n\nFaults that tests must catch: `python tests/mutants.py` tries each in a copy.\n"
    rows = (f"| `{one.name}` | `{one.edits[0][0]}` | {one.what} |" for one in MUTANTS)
    return "\n".join([head, "| mutant | in | fault |", "| --- | --- | --- |", *rows])


def main(names: Sequence[str]) -> int:
    if names == ["--list"]:
        print(listed())
        return 0
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        sys.exit(f"No such mutant: {', '.join(sorted(unknown))}. There are: {', '.join(one.name for one in MUTANTS)}")
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    started = time.monotonic()
    with copy() as place:
        check_that_the_copy_is_imported(place)
        whole = ask(place, sorted({test for mutant in chosen for test in mutant.tests}))
        if whole.verdict != "SURVIVED":
            sys.exit(f"The tests fail without any mutant: {whole.by}")
        print(f"The tests pass without mutants, in {whole.seconds:.0f} s.\n")
        width = max(len(mutant.name) for mutant in chosen)
        answers = []
        for mutant in chosen:
            answer = try_out(place, mutant)
            answers.append(answer)
            print(f"{answer.verdict:<8}  {mutant.name:<{width}}  {answer.seconds:5.1f} s  {mutant.what}", flush=True)
            if answer.by:
                print(f"{'':<8}  {'':<{width}}           {answer.by}", flush=True)
    caught = sum(answer.verdict == "caught" for answer in answers)
    print(f"\n{caught} of {len(chosen)} mutants caught, in {time.monotonic() - started:.0f} s.")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
