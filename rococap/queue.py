"""The state machine: every transition of a job, each a function over a connection inside the caller's transaction.

    pending -> leased -> done            waiting -> pending when its time has come
               leased -> waiting         failed, cancelled -> pending by retry
               leased -> failed          pending, waiting, leased -> cancelled
               leased -> pending         (released, or its worker died)

Knows no torch and reads no picture. Every write of a worker carries lease, worker and state in its WHERE, so that one
who lost its lease changes nothing. Rows are locked in one order: lease, jobs by id, captions, tallies, worker. `now`
is the database's clock unless a test passes its own. The status stands in the SQL as a literal: as a bound value it
would miss the partial indexes (11 microseconds become 32 milliseconds).
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sqlalchemy import Connection

from rococap import db
from rococap.datasets import SPLITS, STANDARD, Columns, Place
from rococap.db import execute
from rococap.engines import Completion, EngineInfo, Failure
from rococap.errors import LeaseLost, RunError
from rococap.flags import FLAGS, degenerate, of_reasoning, without_reasoning
from rococap.models import JobState
from rococap.recipe import RULES, Recipe, refuse_placeholders

SLOTS = 16
MAX_TEXT = 65_536
MAX_MESSAGE = 2_000
MAX_BACKOFF_MS = 15 * 60_000
RATE_WINDOW_MS = 5 * 60_000

NORMAL, SUSPECTS, SOLO = 0, 4, 1
"""Lanes. A job that was in a crash is claimed by fours, after a second crash alone; the value bounds the claim."""

_CRASHES = {NORMAL: (0, 0), SUSPECTS: (1, 1), SOLO: (2, 1 << 30)}


@dataclass(frozen=True, slots=True)
class Run:
    id: int
    name: str
    dataset_id: int
    dataset: str
    dataset_revision: str
    recipe: Recipe
    resolved: dict[str, Any] | None
    max_attempts: int
    paused: bool
    columns: Columns = STANDARD


@dataclass(frozen=True, slots=True)
class Job:
    """One picture of one run, leased to a worker."""

    id: int
    lease_id: int
    place: Place


@dataclass(frozen=True, slots=True)
class Lease:
    """What one claim took. `lane` is NORMAL, SUSPECTS or SOLO."""

    id: int
    worker_id: int
    run_id: int
    split: str
    lane: int
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds that a lease's pictures took in each stage."""

    load_ms: float = 0.0
    prepare_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    store_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a worker made of its time and memory, as it told last. None: not known. MB are millions of bytes.

    While it runs, the rates and shares are over its last minute or so; once it has said goodbye, over its whole time.
    `fill`: rows decoded a step, as a share of the batch size. `busy`: the share of the time that the model worked.
    `waited_sec`: how long in all it had no picture to work on. `memory_mb` and `gpu_memory_mb` are the process's peaks;
    `gpu_utilisation` is the driver's share of a moment, by whatever process.
    """

    captioning_sec: float
    pictures_per_sec: float
    new_tokens_per_sec: float
    fill: float | None
    busy: float
    waited_sec: float
    batch_size: int
    memory_mb: float
    gpu_memory_mb: float | None = None
    gpu_memory_total_mb: float | None = None
    gpu_utilisation: float | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Telemetry":
        """Without what only a later version knows."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})


def clean_text(text: str, most: int = MAX_TEXT) -> str:
    """Text as the database can hold it: NUL becomes U+FFFD, lone surrogates too, and the length is bounded."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")[:most]


def _at(conn: Connection, now: int | None) -> int:
    return db.now(conn) if now is None else now


def tally(conn: Connection, run_id: int, split: str, slot: int, changes: Mapping[str, int]) -> None:
    rows = [(run_id, split, status, slot % SLOTS, n) for status, n in sorted(changes.items()) if n]
    if rows:
        execute(
            conn,
            "INSERT INTO tallies (run_id, split, status, slot, n) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (run_id, split, status, slot) DO UPDATE SET n = tallies.n + excluded.n",
            rows,
        )


# --- Runs ------------------------------------------------------------------------------------------------------

_RUNS = (
    "SELECT r.id, r.name, r.dataset_id, d.name, d.revision, r.recipe, r.resolved, r.max_attempts, "
    "r.paused, d.columns FROM runs r JOIN datasets d ON d.id = r.dataset_id AND r.deleted_at IS NULL "
)


def _run(row: Sequence[Any]) -> Run:
    run_id, name, dataset_id, dataset, revision, recipe, resolved, max_attempts, paused, columns = row
    parsed = json.loads(resolved) if resolved else None
    return Run(
        *(run_id, name, dataset_id, dataset, revision, Recipe.from_json(recipe), parsed, max_attempts, bool(paused)),
        columns=Columns.from_json(columns),
    )


def list_runs(conn: Connection) -> list[Run]:
    return [_run(row) for row in execute(conn, _RUNS + "ORDER BY r.id").fetchall()]


def get_run(conn: Connection, name: str) -> Run:
    """The run of that name. Raises RunError, naming those that exist."""
    row = execute(conn, _RUNS + "WHERE r.name = ?", (name,)).one_or_none()
    if row is None:
        names = ", ".join(run.name for run in list_runs(conn))
        raise RunError(
            f"There is no run {name!r}. "
            + (f"Runs here: {names}." if names else "Register one: rococap enqueue --split train")
        )
    return _run(row)


def find_run(conn: Connection, name: str | None) -> Run:
    """The run of that name; without one, `default`, or the only run. Raises RunError, naming them."""
    if name is not None:
        return get_run(conn, name)
    runs = list_runs(conn)
    if len(runs) == 1:
        return runs[0]
    return get_run(conn, "default")


def refuse_deleted(conn: Connection, run: Run) -> None:
    """Raises RunError if the run was deleted since it was looked up. A writer that holds `db.lock` on it is safe from
    that until its transaction ends.
    """
    if execute(conn, "SELECT deleted_at FROM runs WHERE id = ?", (run.id,)).scalar_one() is not None:
        raise RunError(f"Run {run.name!r} was deleted meanwhile. See: rococap runs")


def create_run(conn: Connection, name: str, dataset_id: int, recipe: Recipe, now: int | None = None) -> Run:
    """The run of that name, made if it is new. Raises RunError if it exists with another recipe or data set, or if a
    new one's prompt holds what would have to be filled in for each picture.
    """
    made = execute(
        conn,
        "INSERT INTO runs (name, dataset_id, recipe, recipe_hash, created_at) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (name) DO NOTHING",
        (name, dataset_id, recipe.to_json(), recipe.hash, _at(conn, now)),
    )
    if made.rowcount:
        _check_prompt(name, recipe)
    run = get_run(conn, name)
    if differences := run.recipe.differences(recipe):
        told = "; ".join(f"{field}: {mine!r}, not {asked!r}" for field, (mine, asked) in differences.items())
        raise RunError(f"Run {name!r} has another recipe ({told}). Give this one a name of its own: --run NAME")
    if run.dataset_id != dataset_id:
        raise RunError(
            f"Run {name!r} is on another data set ({' at '.join(filter(None, (run.dataset, run.dataset_revision)))}). "
            "Give this one a name of its own: --run NAME"
        )
    return run


def _check_prompt(name: str, recipe: Recipe) -> None:
    try:
        refuse_placeholders(recipe.prompt)
    except ValueError as error:
        raise RunError(f"Run {name!r} cannot be: {error}") from error


def pin(conn: Connection, run: Run, info: EngineInfo, *, accept_new_rules: bool = False) -> None:
    """Fixes what the run's recipe came to on its first worker. Raises RunError for a worker that differs.

    A run without captions takes new rules; one that has some does with `accept_new_rules` alone, and remembers it.
    """
    db.lock(conn, "runs", run.id)
    pin_first(conn, run, info.resolved())
    check_pinned(conn, run, info, accept_new_rules=accept_new_rules)
    pinned = get_run(conn, run.name).resolved or {}
    if (rules := rules_of(pinned)) != RULES:
        changed = pinned | {"rules": RULES}
        if n := _n_begun(conn, run):
            accepted = {"from": rules, "to": RULES, "captions_before": n, "at": db.now(conn)}
            changed["accepted_rules"] = [*pinned.get("accepted_rules", []), accepted]
        told = json.dumps(changed, sort_keys=True)
        execute(conn, "UPDATE runs SET resolved = ? WHERE id = ?", (told, run.id))


def check_pinned(conn: Connection, run: Run, info: EngineInfo, *, accept_new_rules: bool = False) -> None:
    """Raises RunError for a worker that differs from what is pinned, if anything is."""
    mine = info.resolved()
    pinned = get_run(conn, run.name).resolved
    if pinned is None:
        return
    check_rules(conn, run, accept_new_rules=accept_new_rules)
    if differing := differences(pinned, mine):
        told = "; ".join(f"{key}: {pinned[key]}, here {mine[key]}" for key in differing)
        raise RunError(
            f"Run {run.name!r} was started with another model state ({told}), and a run never mixes. "
            "Use the same engine (--engine), model and dtype, or enqueue a new run: rococap enqueue --run NAME"
        )


def differences(pinned: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two model states differ in, apart from their rules. What only one of them knows is no difference."""
    return [key for key in other if key in pinned and key not in _OF_RULES and other[key] != pinned[key]]


_OF_RULES = ("rules", "accepted_rules")


def rules_of(resolved: Mapping[str, Any]) -> int:
    """Those that a run was begun under, or has accepted since."""
    return int(resolved.get("rules", 1))


def check_rules(conn: Connection, run: Run, *, accept_new_rules: bool = False) -> None:
    """Raises RunError if going on would mix captions that were made by different rules: see `rococap.recipe.RULES`."""
    pinned = get_run(conn, run.name).resolved
    rules = RULES if pinned is None else rules_of(pinned)
    if rules > RULES:
        raise RunError(
            f"Run {run.name!r} was begun by a newer rococap, which opens pictures by other rules ({rules}, here "
            f"{RULES}), and a run never mixes. Upgrade rococap."
        )
    if rules < RULES and not accept_new_rules and _n_begun(conn, run):
        raise RunError(
            f"Run {run.name!r} was begun under older rules of opening pictures and ending captions ({rules}, here "
            f"{RULES}), and a run never mixes. Caption its pictures anew: rococap enqueue --run NEW --from {run.name}; "
            f"or go on, which its manifests will tell: rococap worker --run {run.name} --accept-new-rules"
        )


def _n_begun(conn: Connection, run: Run) -> int:
    """Captions that a run has, or is about to have."""
    sql = "SELECT COALESCE(sum(n), 0) FROM tallies WHERE run_id = ? AND status IN ('done', 'leased')"
    return int(execute(conn, sql, (run.id,)).scalar_one())


def pin_first(conn: Connection, run: Run, resolved: Mapping[str, Any]) -> None:
    """Pins what a run came to, unless it is pinned already."""
    pinned = json.dumps(resolved, sort_keys=True)
    execute(conn, "UPDATE runs SET resolved = ? WHERE id = ? AND resolved IS NULL", (pinned, run.id))


# --- Workers ---------------------------------------------------------------------------------------------------


def register_worker(
    conn: Connection,
    uuid: str,
    host: str,
    pid: int,
    info: EngineInfo,
    *,
    self_check: str | None = None,
    lease_ttl_ms: int = 120_000,
    now: int | None = None,
) -> int:
    """`lease_ttl_ms`: unseen for longer, it counts as lost."""
    at = _at(conn, now)
    row = execute(
        conn,
        "INSERT INTO workers (uuid, host, pid, device, engine, versions, self_check, lease_ttl_ms, started_at, "
        "seen_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
        (uuid, host, pid, info.device, info.name, _versions(info), self_check, lease_ttl_ms, at, at),
    )
    return int(row.scalar_one())


def _versions(info: EngineInfo) -> str:
    return json.dumps(info.versions, sort_keys=True)


def store_self_check(conn: Connection, worker_id: int, told: str | None) -> None:
    execute(conn, "UPDATE workers SET self_check = ? WHERE id = ?", (told, worker_id))


def last_self_check(conn: Connection, host: str, info: EngineInfo, run: str) -> tuple[int, str] | None:
    """The pid of the latest worker with this engine on this device of this machine that looked at that run, and what
    it found; None if none did.
    """
    rows = execute(
        conn,
        "SELECT pid, self_check FROM workers WHERE host = ? AND device = ? AND engine = ? AND versions = ? "
        "AND self_check IS NOT NULL ORDER BY id DESC LIMIT 100",
        (host, info.device, info.name, _versions(info)),
    )
    return next(((pid, told) for pid, told in rows.fetchall() if json.loads(told)["run"] == run), None)


def stop_worker(
    conn: Connection,
    worker_id: int,
    *,
    store_ms: Mapping[int, float] | None = None,
    telemetry: Telemetry | None = None,
    now: int | None = None,
) -> None:
    """Its goodbye, with what it measured: milliseconds of storing by lease, and the rest."""
    at = _at(conn, now)
    for lease_id, ms in sorted((store_ms or {}).items()):
        _book(conn, worker_id, lease_id, ms)
    execute(conn, "UPDATE workers SET stopped_at = ? WHERE id = ?", (at, worker_id))
    _see(conn, worker_id, at, telemetry)


def _see(conn: Connection, worker_id: int, at: int, telemetry: Telemetry | None) -> None:
    sql = "UPDATE workers SET seen_at = ?, telemetry = COALESCE(?, telemetry) WHERE id = ?"
    execute(conn, sql, (at, telemetry.to_json() if telemetry else None, worker_id))


# --- A lease's life --------------------------------------------------------------------------------------------

_PENDING = (
    "SELECT j.id, s.path, i.row_group, i.row_in_group, i.image_id "
    "FROM runs r JOIN jobs j ON j.run_id = r.id JOIN images i ON i.id = j.image_id JOIN shards s ON s.id = i.shard_id "
    "WHERE r.id = ? AND r.paused = 0 AND j.split = ? AND j.status = 'pending' AND j.crashes BETWEEN ? AND ? "
    "ORDER BY j.crashes, j.id LIMIT ?"
)
_SKIP_LOCKED = {"sqlite": "", "postgresql": " FOR UPDATE OF j SKIP LOCKED"}
_ANY_SUSPECT = "SELECT 1 FROM jobs WHERE run_id = ? AND split = ? AND status = 'pending' AND crashes > 0 LIMIT 1"


def claim(
    conn: Connection,
    worker_id: int,
    run_id: int,
    split: str,
    most: int,
    *,
    ttl_ms: int,
    lane: int = NORMAL,
    now: int | None = None,
) -> Lease | None:
    """Leases up to `most` pending jobs of one split to a worker, in order of id; None if there are none.

    Neighbours in a claim are neighbours on disk. The lanes SUSPECTS and SOLO bound the claim by 4 and 1.
    """
    bound = min(most, lane) if lane else most
    sql = _PENDING + _SKIP_LOCKED[conn.dialect.name]
    rows = execute(conn, sql, (run_id, split, *_CRASHES[lane], bound)).fetchall()
    if not rows:
        return None
    lease_id = _lease(conn, worker_id, run_id, split, lane, [row[0] for row in rows], ttl_ms, _at(conn, now))
    columns = _columns(conn, run_id)
    jobs = tuple(Job(row[0], lease_id, Place(row[1], split, row[2], row[3], row[4], columns)) for row in rows)
    return Lease(lease_id, worker_id, run_id, split, lane, jobs)


def _columns(conn: Connection, run_id: int) -> Columns:
    sql = "SELECT d.columns FROM datasets d JOIN runs r ON r.dataset_id = d.id WHERE r.id = ?"
    return Columns.from_json(execute(conn, sql, (run_id,)).scalar_one())


def _lease(
    conn: Connection, worker_id: int, run_id: int, split: str, lane: int, job_ids: list[int], ttl_ms: int, at: int
) -> int:
    """Puts pending jobs, which the transaction has locked, under a new lease."""
    lease_id = execute(
        conn,
        "INSERT INTO leases (worker_id, run_id, split, lane, state, n_jobs, claimed_at, beat_at, expires_at) "
        "VALUES (?, ?, ?, ?, 'open', ?, ?, ?, ?) RETURNING id",
        (worker_id, run_id, split, lane, len(job_ids), at, at, at + ttl_ms),
    ).scalar_one()
    execute(
        conn,
        "UPDATE jobs SET status = 'leased', lease_id = ?, attempts = attempts + 1 WHERE id = ? AND status = 'pending'",
        [(lease_id, job_id) for job_id in job_ids],
    )
    tally(conn, run_id, split, lease_id, {JobState.PENDING: -len(job_ids), JobState.LEASED: len(job_ids)})
    return int(lease_id)


def has_suspects(conn: Connection, run: Run, splits: Sequence[str]) -> bool:
    """Whether jobs that were in a crash are pending."""
    return any(execute(conn, _ANY_SUSPECT, (run.id, split)).one_or_none() for split in splits)


def heartbeat(
    conn: Connection,
    worker_id: int,
    lease_ids: Iterable[int],
    *,
    ttl_ms: int,
    store_ms: Mapping[int, float] | None = None,
    telemetry: Telemetry | None = None,
    now: int | None = None,
) -> set[int]:
    """Extends the leases that are still this worker's; returns those. The others are lost: abandon their rows.

    `store_ms` is what storing took since the last one, by lease: those may have ended.
    """
    at = _at(conn, now)
    held, took = set(lease_ids), store_ms or {}
    kept = set()
    for lease_id in sorted(held | took.keys()):
        if lease_id in held and _extend(conn, worker_id, lease_id, at, ttl_ms):
            kept.add(lease_id)
        if lease_id in took:
            _book(conn, worker_id, lease_id, took[lease_id])
    # After the leases, as in `complete`: PostgreSQL would find a deadlock between the two.
    _see(conn, worker_id, at, telemetry)
    return kept


def _extend(conn: Connection, worker_id: int, lease_id: int, at: int, ttl_ms: int) -> bool:
    """Whether it is this worker's still."""
    sql = "UPDATE leases SET beat_at = ?, expires_at = ? WHERE id = ? AND worker_id = ? AND state = 'open'"
    return bool(execute(conn, sql, (at, at + ttl_ms, lease_id, worker_id)).rowcount)


def _book(conn: Connection, worker_id: int, lease_id: int, store_ms: float) -> None:
    """Adds what storing took to a lease of this worker, whatever became of it."""
    sql = "UPDATE leases SET store_ms = store_ms + ? WHERE id = ? AND worker_id = ?"
    execute(conn, sql, (store_ms, lease_id, worker_id))


def lock_leases(conn: Connection, worker_id: int, lease_ids: Iterable[int]) -> None:
    """Locks a worker's open leases and those named, in order of id, for who goes on to change some of each kind."""
    ids = tuple(lease_ids)
    if ids and conn.dialect.name != "sqlite":
        sql = f"SELECT id FROM leases WHERE worker_id = ? AND (state = 'open' OR id IN ({', '.join('?' * len(ids))})) "
        execute(conn, sql + "ORDER BY id" + db.for_update(conn, "leases"), (worker_id, *ids))


def _hold(conn: Connection, lease: Lease, n_done: int = 0, timing: Timing = Timing()) -> None:
    """Locks the lease and proves that it is still ours, adding what its jobs took."""
    t = timing
    held = execute(
        conn,
        "UPDATE leases SET n_done = n_done + ?, load_ms = load_ms + ?, prepare_ms = prepare_ms + ?, "
        "prefill_ms = prefill_ms + ?, decode_ms = decode_ms + ?, store_ms = store_ms + ? "
        "WHERE id = ? AND worker_id = ? AND state = 'open'",
        (n_done, t.load_ms, t.prepare_ms, t.prefill_ms, t.decode_ms, t.store_ms, lease.id, lease.worker_id),
    )
    if held.rowcount != 1:
        raise LeaseLost(f"Lease {lease.id} is not this worker's any more: nothing was changed.")


def _leave(conn: Connection, lease: Lease, sql: str, rows: list[tuple[Any, ...]]) -> None:
    """Moves jobs out of the lease; every one of them must still be in it. Rows end in job id and lease id."""
    if rows and execute(conn, sql, rows).rowcount != len(rows):
        raise LeaseLost(f"Lease {lease.id} does not hold all of {[row[-2] for row in rows]}: nothing was changed.")


def _close_if_empty(conn: Connection, lease_id: int, state: str, at: int) -> None:
    execute(
        conn,
        "UPDATE leases SET state = ?, closed_at = ? WHERE id = ? AND state = 'open' "
        "AND NOT EXISTS (SELECT 1 FROM jobs WHERE lease_id = ?)",
        (state, at, lease_id, lease_id),
    )


def complete(
    conn: Connection,
    lease: Lease,
    completions: Sequence[Completion],
    *,
    timing: Timing = Timing(),
    now: int | None = None,
) -> None:
    """Stores captions and makes their jobs done, all or nothing. Raises LeaseLost if the lease is no longer ours.

    A lease may be completed in parts, also after its time ran out as long as nobody reaped it: no GPU work is thrown
    away. It closes with its last job.
    """
    at = _at(conn, now)
    done = sorted(completions, key=lambda completion: completion.job_id)
    _hold(conn, lease, len(done), timing)
    _leave(
        conn,
        lease,
        "UPDATE jobs SET status = 'done', lease_id = NULL, finished_at = ? "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'",
        [(at, c.job_id, lease.id) for c in done],
    )
    flags = {one.job_id: flags_of(one.text, one.finish_reason, one.flags) for one in done}
    execute(
        conn,
        "INSERT INTO captions (job_id, lease_id, text, flags, finish_reason, prompt_tokens, new_tokens, processing_ms, "
        "latency_ms, batch_size, generated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *(
                    c.job_id,
                    lease.id,
                    clean_text(c.text),
                    flags[c.job_id],
                    c.finish_reason,
                    c.prompt_tokens,
                    c.new_tokens,
                ),
                *(c.processing_ms, c.latency_ms, c.batch_size, at),
            )
            for c in done
        ],
    )
    changes: dict[str, int] = {JobState.LEASED: -len(done), JobState.DONE: len(done)}
    tally(conn, lease.run_id, lease.split, lease.id, changes | flag_counts(flags.values()))
    execute(conn, "UPDATE workers SET n_done = n_done + ?, seen_at = ? WHERE id = ?", (len(done), at, lease.worker_id))
    _close_if_empty(conn, lease.id, "closed", at)


def flags_of(text: str, finish_reason: str, told: str = "") -> str:
    """What is odd about a caption, joined by commas: what its engine told, what it is like, and `replaced` where
    `clean_text` had to change or cut it.
    """
    said = without_reasoning(text) or text
    odd = (*degenerate(said, finish_reason), *of_reasoning(text))
    return ",".join(filter(None, (told, *odd, "" if clean_text(text) == text else "replaced")))


def flagged(flag: str) -> str:
    """The status under which captions with a flag are tallied, beside the states of jobs."""
    return f"flag:{flag}"


def flag_counts(flags: Iterable[str]) -> dict[str, int]:
    """How many captions to tally under each flag."""
    return dict(Counter(flagged(flag) for told in flags for flag in told.split(",") if flag))


def backoff_ms(attempts: int, jitter: float | None = None) -> int:
    """How long to wait after the nth attempt failed: min(15 min, 5 s * 4^n), up to a quarter less by jitter."""
    full = min(MAX_BACKOFF_MS, 5_000 * 4 ** min(attempts - 1, 10))
    return int(full * (1 - 0.25 * (random.random() if jitter is None else jitter)))


def fail(conn: Connection, lease: Lease, failed: Mapping[int, Failure], *, now: int | None = None) -> None:
    """Ends jobs (id -> failure) without a caption: for good, or, if the failure is transient and attempts are left,
    to be tried again later. Raises LeaseLost if the lease is no longer ours.
    """
    at = _at(conn, now)
    _hold(conn, lease)
    attempts = {
        row[0]: row[1] for row in execute(conn, "SELECT id, attempts FROM jobs WHERE lease_id = ?", (lease.id,))
    }
    most = execute(conn, "SELECT max_attempts FROM runs WHERE id = ?", (lease.run_id,)).scalar_one()
    again = {id for id, failure in failed.items() if failure.transient and attempts.get(id, most) < most}
    _leave(
        conn,
        lease,
        "UPDATE jobs SET status = 'waiting', lease_id = NULL, not_before = ? "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'",
        [(at + backoff_ms(attempts[id]), id, lease.id) for id in sorted(again)],
    )
    _leave(
        conn,
        lease,
        "UPDATE jobs SET status = 'failed', lease_id = NULL, finished_at = ? "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'",
        [(at, id, lease.id) for id in sorted(failed.keys() - again)],
    )
    _record(conn, lease.id, at, failed)
    changes: dict[str, int] = {
        JobState.WAITING: len(again),
        JobState.FAILED: len(failed) - len(again),
        JobState.LEASED: -len(failed),
    }
    tally(conn, lease.run_id, lease.split, lease.id, changes)
    _close_if_empty(conn, lease.id, "closed", at)


def _record(conn: Connection, lease_id: int, at: int, failed: Mapping[int, Failure]) -> None:
    execute(
        conn,
        "INSERT INTO failures (job_id, lease_id, code, message, at) VALUES (?, ?, ?, ?, ?)",
        [(id, lease_id, f.code, clean_text(f.message, MAX_MESSAGE), at) for id, f in sorted(failed.items())],
    )


def release(conn: Connection, lease: Lease, job_ids: Iterable[int], *, now: int | None = None) -> int:
    """Gives jobs back as they were before the claim, the attempt refunded; returns how many.

    Jobs that left the lease meanwhile stay as they are. Raises LeaseLost if the lease is not ours any more.
    """
    at = _at(conn, now)
    _hold(conn, lease)
    rows = [(id, lease.id) for id in sorted(job_ids)]
    sql = (
        "UPDATE jobs SET status = 'pending', lease_id = NULL, attempts = attempts - 1 "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'"
    )
    released = execute(conn, sql, rows).rowcount if rows else 0
    tally(conn, lease.run_id, lease.split, lease.id, {JobState.LEASED: -released, JobState.PENDING: released})
    _close_if_empty(conn, lease.id, "released", at)
    return released


# --- When the answer did not come ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recovered:
    """Job ids by what became of their completions. `kept`: another worker holds the picture at the moment."""

    stored: frozenset[int]
    dropped: frozenset[int]
    kept: frozenset[int]


def recover(
    conn: Connection, worker_id: int, lease: Lease, completions: Sequence[Completion], *, now: int | None = None
) -> Recovered:
    """Stores what `complete` and `fail` could not, or could without the answer coming back; none is stored twice.

    What the lease still holds is completed, and what it had completed is recognised. Captions of jobs that are free
    again are completed under a new lease, of `worker_id`; where another result stands they are dropped, as are those of
    a run that was deleted, whose jobs' ids may be another run's by now.
    """
    execute(conn, "SELECT id FROM leases WHERE id = ?" + db.for_update(conn, "leases"), (lease.id,))
    at = _at(conn, now)
    jobs = _jobs_and_captions(conn, lease.run_id, [completion.job_id for completion in completions])
    mine, free, stored, kept = [], [], set(), set()
    for one in completions:
        status, lease_id, caption_lease_id = jobs.get(one.job_id, ("", None, None))
        if lease_id == lease.id:
            mine.append(one)
        elif status == JobState.DONE and caption_lease_id == lease.id:
            stored.add(one.job_id)
        elif one.failure is None and status in (JobState.PENDING, JobState.WAITING):
            free.append(one)
        elif one.failure is None and status == JobState.LEASED:
            kept.add(one.job_id)
    _store(conn, lease, mine, at)
    if free:
        _store(conn, _take(conn, worker_id, lease, [(one.job_id, jobs[one.job_id][0]) for one in free], at), free, at)
    stored |= {one.job_id for one in (*mine, *free)}
    dropped = {one.job_id for one in completions} - stored - kept
    return Recovered(frozenset(stored), frozenset(dropped), frozenset(kept))


def _jobs_and_captions(
    conn: Connection, run_id: int, job_ids: Sequence[int]
) -> dict[int, tuple[str, int | None, int | None]]:
    """id -> (status, lease, the lease of its caption) of those that are the run's, locked in order of id."""
    found = {}
    for job_id in sorted(job_ids):
        sql = "SELECT status, lease_id FROM jobs j WHERE id = ? AND run_id = ?" + db.for_update(conn, "j")
        if row := execute(conn, sql, (job_id, run_id)).one_or_none():
            by = execute(conn, "SELECT lease_id FROM captions WHERE job_id = ?", (job_id,)).scalar()
            found[job_id] = (row[0], row[1], by)
    return found


def _store(conn: Connection, lease: Lease, completions: Sequence[Completion], at: int) -> None:
    if captions := [one for one in completions if one.failure is None]:
        complete(conn, lease, captions, now=at)
    if failed := {one.job_id: one.failure for one in completions if one.failure is not None}:
        fail(conn, lease, failed, now=at)


def _take(conn: Connection, worker_id: int, lost: Lease, jobs: Sequence[tuple[int, str]], at: int) -> Lease:
    """A lease on jobs that are pending or waiting, in place of one that is lost."""
    waiting = [(id,) for id, status in jobs if status == JobState.WAITING]
    if waiting:
        execute(conn, "UPDATE jobs SET status = 'pending', not_before = NULL WHERE id = ?", waiting)
        changes: dict[str, int] = {JobState.WAITING: -len(waiting), JobState.PENDING: len(waiting)}
        tally(conn, lost.run_id, lost.split, 0, changes)
    lease_id = _lease(conn, worker_id, lost.run_id, lost.split, lost.lane, [id for id, _ in jobs], 0, at)
    return Lease(lease_id, worker_id, lost.run_id, lost.split, lost.lane, ())


def belongs(conn: Connection, lease: Lease, uuid: str) -> bool:
    """Whether this database gave the lease to that worker: another's ids mean other pictures."""
    sql = "SELECT 1 FROM leases l JOIN workers w ON w.id = l.worker_id WHERE l.id = ? AND w.uuid = ?"
    return execute(conn, sql, (lease.id, uuid)).one_or_none() is not None


def release_forgotten(conn: Connection, worker_id: int, held: Set[int], *, now: int | None = None) -> int:
    """Gives back what this worker leased without knowing, since the answer to its claim was lost; returns how many.

    `held` are the leases that it knew of before this transaction began: others' stores may close some meanwhile.
    """
    open_leases = execute(
        conn,
        "SELECT id, run_id, split, lane FROM leases WHERE state = 'open' AND worker_id = ? ORDER BY id"
        + db.for_update(conn, "leases"),
        (worker_id,),
    ).fetchall()
    released = 0
    for lease_id, run_id, split, lane in open_leases:
        if lease_id not in held:
            lease = Lease(lease_id, worker_id, run_id, split, lane, ())
            rows = execute(conn, "SELECT id FROM jobs WHERE lease_id = ?", (lease_id,)).fetchall()
            released += release(conn, lease, [row[0] for row in rows], now=now)
    return released


# --- Crashes and time ------------------------------------------------------------------------------------------


# In order of time: asked for in order of id, SQLite walks the table instead of the index.
_EXPIRED = (
    "SELECT id FROM leases WHERE state = 'open' AND expires_at <= ? AND worker_id <> ? AND expires_at - beat_at <= ? "
    "ORDER BY expires_at, id"
)


def reap(
    conn: Connection, *, but: int = 0, contact_ms: int = 1 << 62, most: int | None = None, now: int | None = None
) -> list[int]:
    """Frees the jobs of leases whose time ran out; returns the leases. Their workers are taken for dead.

    A worker passes its own id as `but`: it knows better than the clock that it lives. And for how long it has been in
    touch with the database: a lease that lasts longer may belong to one that was cut off as well.
    """
    at = _at(conn, now)
    _bring_back(conn, at)
    expired = sorted(row[0] for row in execute(conn, _EXPIRED, (at, but, contact_ms)).fetchall()[:most])
    return [lease_id for lease_id in expired if crash(conn, lease_id, now=at, expired_by=at)]


def _bring_back(conn: Connection, at: int) -> None:
    """Lets leases that were extended in what is the future, since the clock was set back, run out one lease time from
    now: a worker that lives extends its own before, and one that died keeps its pictures no longer.
    """
    found = execute(conn, f"{_OF_THE_FUTURE} ORDER BY id{db.for_update(conn, 'leases')}", (at,)).fetchall()
    if found:
        sql = "UPDATE leases SET beat_at = ?, expires_at = ? + expires_at - beat_at WHERE id = ? AND beat_at > ?"
        execute(conn, sql, [(at, at, row[0], at) for row in found])


_OF_THE_FUTURE = "SELECT id FROM leases WHERE state = 'open' AND beat_at > ?"


def crash(conn: Connection, lease_id: int, *, now: int | None = None, expired_by: int = 1 << 62) -> bool:
    """Ends a lease whose worker died, or is about to: its jobs are suspects, the attempt refunded.

    A job that was alone in two such leases fails. Returns False, changing nothing, if the lease was not open, or was
    extended beyond `expired_by` meanwhile.
    """
    at = _at(conn, now)
    row = execute(
        conn,
        "UPDATE leases SET state = 'expired', closed_at = ? WHERE id = ? AND state = 'open' AND expires_at <= ? "
        "RETURNING run_id, split, lane",
        (at, lease_id, expired_by),
    ).one_or_none()
    if row is None:
        return False
    run_id, split, lane = row
    solo = int(lane == SOLO)
    jobs = execute(conn, "SELECT id, solo_crashes FROM jobs WHERE lease_id = ? ORDER BY id", (lease_id,)).fetchall()
    killers = [id for id, solo_crashes in jobs if solo and solo_crashes >= 1]
    execute(
        conn,
        "UPDATE jobs SET status = 'pending', lease_id = NULL, attempts = attempts - 1, crashes = crashes + 1, "
        "solo_crashes = solo_crashes + ? WHERE lease_id = ? AND status = 'leased'",
        (solo, lease_id),
    )
    if killers:
        failing = "UPDATE jobs SET status = 'failed', finished_at = ? WHERE id = ? AND status = 'pending'"
        execute(conn, failing, [(at, id) for id in killers])
        reason = Failure("crashed", "Two workers died while they captioned this picture alone.")
        _record(conn, lease_id, at, dict.fromkeys(killers, reason))
    freed = len(jobs) - len(killers)
    tally(
        conn,
        run_id,
        split,
        lease_id,
        {JobState.LEASED: -len(jobs), JobState.PENDING: freed, JobState.FAILED: len(killers)},
    )
    return True


_WAKE = (
    "UPDATE jobs SET status = 'pending', not_before = NULL WHERE id IN ("
    "SELECT j.id FROM jobs j WHERE j.status = 'waiting' AND (j.not_before <= ? OR j.not_before > ?) "
    "ORDER BY j.not_before{skip_locked}) RETURNING run_id, split"
)


def wake(conn: Connection, *, now: int | None = None) -> int:
    """Makes waiting jobs pending whose time has come; returns how many.

    So are those that would wait longer than anything does: the clock has been set back since.
    """
    at = _at(conn, now)
    sql = _WAKE.format(skip_locked=_SKIP_LOCKED[conn.dialect.name])
    rows = execute(conn, sql, (at, at + MAX_BACKOFF_MS)).fetchall()
    for (run_id, split), n in sorted(Counter((row[0], row[1]) for row in rows).items()):
        tally(conn, run_id, split, 0, {JobState.WAITING: -n, JobState.PENDING: n})
    return len(rows)


def overdue(conn: Connection, *, now: int | None = None) -> bool:
    """Whether `reap` or `wake` would do anything: a read, so that idle workers need no write lock."""
    at = _at(conn, now)
    row = execute(
        conn,
        "SELECT EXISTS (SELECT 1 FROM leases WHERE state = 'open' AND (expires_at <= ? OR beat_at > ?)) "
        "OR EXISTS (SELECT 1 FROM jobs WHERE status = 'waiting' AND (not_before <= ? OR not_before > ?))",
        (at, at, at, at + MAX_BACKOFF_MS),
    )
    return bool(row.scalar_one())


# --- By hand ---------------------------------------------------------------------------------------------------


def _selected(
    conn: Connection, run: Run, statuses: str, splits: Sequence[str], image_ids: Sequence[str], codes: Sequence[str]
) -> list[tuple[int, str, str]]:
    """(id, split, status) of the run's jobs in these statuses (a literal list), narrowed by what is not empty."""

    def within(column: str, values: Sequence[str]) -> str:
        return f"AND {column} IN ({', '.join('?' * len(values))}) " if values else ""

    latest = "(SELECT f.code FROM failures f WHERE f.job_id = j.id ORDER BY f.id DESC LIMIT 1)"
    sql = (
        "SELECT j.id, j.split, j.status FROM jobs j JOIN images i ON i.id = j.image_id "
        f"WHERE j.run_id = ? AND j.status IN ({statuses}) "
        + within("j.split", splits)
        + within("i.image_id", image_ids)
        + within(latest, codes)
        + "ORDER BY j.id"
        + db.for_update(conn, "j")
    )
    return [(row[0], row[1], row[2]) for row in execute(conn, sql, (run.id, *splits, *image_ids, *codes)).fetchall()]


def _count(conn: Connection, run: Run, jobs: Iterable[tuple[int, str, str]], to: str) -> None:
    """Tallies the move of jobs (id, split, status) to another state."""
    for (split, status), n in sorted(Counter((split, status) for _, split, status in jobs).items()):
        tally(conn, run.id, split, 0, {status: -n, to: n})


def retry(
    conn: Connection,
    run: Run,
    *,
    splits: Sequence[str] = (),
    image_ids: Sequence[str] = (),
    codes: Sequence[str] = (),
    cancelled: bool = False,
) -> int:
    """Makes failed (or, if `cancelled`, cancelled) jobs pending with a clean record; returns how many.

    Named image_ids are retried in either state.
    """
    statuses = "'failed', 'cancelled'" if image_ids else "'cancelled'" if cancelled else "'failed'"
    jobs = _selected(conn, run, statuses, splits, image_ids, codes)
    if jobs:
        sql = (
            "UPDATE jobs SET status = 'pending', attempts = 0, crashes = 0, solo_crashes = 0, finished_at = NULL "
            "WHERE id = ?"
        )
        execute(conn, sql, [(id,) for id, _, _ in jobs])
    _count(conn, run, jobs, JobState.PENDING)
    return len(jobs)


def unknown_images(conn: Connection, run: Run, image_ids: Sequence[str]) -> list[str]:
    """Those that no picture of the run has."""
    sql = "SELECT 1 FROM jobs j JOIN images i ON i.id = j.image_id WHERE j.run_id = ? AND i.image_id = ? LIMIT 1"
    return [image_id for image_id in image_ids if execute(conn, sql, (run.id, image_id)).one_or_none() is None]


def unknown_codes(conn: Connection, run: Run, codes: Sequence[str]) -> list[str]:
    """Those that no failure of the run has, also of pictures that were tried again since."""
    sql = "SELECT 1 FROM failures f JOIN jobs j ON j.id = f.job_id WHERE j.run_id = ? AND f.code = ? LIMIT 1"
    return [code for code in codes if execute(conn, sql, (run.id, code)).one_or_none() is None]


def cancel(
    conn: Connection,
    run: Run,
    *,
    splits: Sequence[str] = (),
    image_ids: Sequence[str] = (),
    now: int | None = None,
) -> int:
    """Withdraws jobs that are not finished; returns how many. A worker that holds some drops their captions."""
    at = _at(conn, now)
    sql = "UPDATE jobs SET status = 'cancelled', lease_id = NULL, not_before = NULL, finished_at = ? WHERE id = ?"
    # First what is free: after that no claim can put any of it under a lease. Then leases before their jobs, as always.
    free = _selected(conn, run, "'pending', 'waiting'", splits, image_ids, ())
    if free:
        execute(conn, sql, [(at, id) for id, _, _ in free])
    leases = execute(
        conn,
        "SELECT id FROM leases WHERE state = 'open' AND run_id = ? ORDER BY id" + db.for_update(conn, "leases"),
        (run.id,),
    ).fetchall()
    held = _selected(conn, run, "'pending', 'waiting', 'leased'", splits, image_ids, ())  # some given back meanwhile
    if held:
        execute(conn, sql, [(at, id) for id, _, _ in held])
    for row in leases:
        _close_if_empty(conn, row[0], "closed", at)
    _count(conn, run, (*free, *held), JobState.CANCELLED)
    return len(free) + len(held)


def pause(conn: Connection, run: Run, paused: bool) -> None:
    """Stops or allows claims of the run. What is leased goes on."""
    execute(conn, "UPDATE runs SET paused = ? WHERE id = ?", (int(paused), run.id))


def prune(conn: Connection, *, before: int, most: int = 1_000) -> int:
    """Deletes up to `most` failures from before a time, each followed by a later one of the same job; returns how many.

    The latest of each job, leases and captions stay: they say what happened and what made it.
    """
    rows = execute(
        conn,
        "SELECT f.id FROM failures f WHERE f.at < ? "
        "AND EXISTS (SELECT 1 FROM failures g WHERE g.job_id = f.job_id AND g.id > f.id) LIMIT ?",
        (before, most),
    ).fetchall()
    if rows:
        execute(conn, "DELETE FROM failures WHERE id = ?", [(row[0],) for row in rows])
    return len(rows)


def delete_run(conn: Connection, run: Run, *, now: int | None = None) -> None:
    """Takes a run out of the queue: nothing finds it any more, and its name is free. Its rows go by `clear_deleted`.

    Raises RunError while workers hold pictures of it.
    """
    db.lock(conn, "runs", run.id)
    refuse_deleted(conn, run)
    sql = "UPDATE runs SET deleted_at = ?, paused = 1, name = ? WHERE id = ?"
    execute(conn, sql, (_at(conn, now), f"{run.name} (deleted {run.id})", run.id))
    # Only now: on PostgreSQL the change has waited for claims that were under way, and whoever claims next is refused.
    is_open = "SELECT count(*) FROM leases WHERE state = 'open' AND run_id = ?"
    if n := execute(conn, is_open, (run.id,)).scalar_one():
        raise RunError(
            f"Workers hold pictures of run {run.name!r} ({n} leases are open), so it stays. Stop them, or withdraw the "
            f"pictures first: rococap cancel --run {run.name} --all"
        )


def clear_deleted(conn: Connection, *, most: int = 1_000) -> int:
    """Removes up to `most` jobs of deleted runs, with their captions, scores and failures; returns how many.

    Leases stay: they say what workers did with their time.
    """
    deleted = "SELECT id FROM runs WHERE deleted_at IS NOT NULL"
    sql = f"SELECT j.id FROM jobs j WHERE j.run_id IN ({deleted}) ORDER BY j.id LIMIT ?" + db.for_update(conn, "j")
    ids = [(row[0],) for row in execute(conn, sql, (most,)).fetchall()]
    if not ids:
        execute(conn, f"DELETE FROM tallies WHERE run_id IN ({deleted})")
        return 0
    for table, key in (("scores", "job_id"), ("captions", "job_id"), ("failures", "job_id"), ("jobs", "id")):
        execute(conn, f"DELETE FROM {table} WHERE {key} = ?", ids)
    return len(ids)


# --- Looking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """One run and split. `per_minute` is over the last five minutes at most; `eta_sec` is None while it is 0."""

    run: str
    split: str
    pending: int
    leased: int
    waiting: int
    done: int
    failed: int
    cancelled: int
    per_minute: float
    eta_sec: float | None
    paused: bool = False
    flags: Mapping[str, int] = field(default_factory=dict)
    """Captions by what is odd about them: see `rococap.flags`."""

    @property
    def total(self) -> int:
        return self.pending + self.leased + self.waiting + self.done + self.failed + self.cancelled

    @property
    def unfinished(self) -> int:
        return self.pending + self.leased + self.waiting


@dataclass(frozen=True, slots=True)
class RunSeen:
    """A run and where it stands, by split. `counts` is empty if it has no pictures yet."""

    run: Run
    created_at: int
    counts: tuple[Counts, ...]


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker process. `state`: running, stopped, or lost (not seen for its own lease time, and never said
    goodbye)."""

    id: int
    host: str
    pid: int
    device: str
    state: str
    done: int
    seen_sec_ago: float
    telemetry: Telemetry | None
    """None before its first heartbeat."""
    self_check: dict[str, Any] | None = None
    """What it found before its first claim; None if it did not look."""


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """A lease. `lane`: normal, suspects or solo; `expires_in_sec` is negative if overdue, None once it has ended.
    `timing`: of what is stored; the part of storing comes with the worker's next heartbeat.
    """

    id: int
    worker: int
    host: str
    pid: int
    run: str
    split: str
    lane: str
    state: str
    jobs: int
    done: int
    age_sec: float
    beat_sec_ago: float
    expires_in_sec: float | None
    timing: Timing


@dataclass(frozen=True, slots=True)
class Failed:
    run: str
    split: str
    image_id: str
    code: str
    message: str
    attempts: int


def counts(conn: Connection, *, now: int | None = None) -> list[Counts]:
    """Every run and split, in constant time: from the tallies, and the rate from the last minutes' leases."""
    at = _at(conn, now)
    per_minute = _rates(conn, at)
    rows = execute(
        conn,
        "SELECT r.id, r.name, r.paused, t.split, t.status, sum(t.n) FROM tallies t JOIN runs r ON r.id = t.run_id "
        "WHERE r.deleted_at IS NULL GROUP BY r.id, r.name, r.paused, t.split, t.status",
    ).fetchall()
    keys = sorted({tuple(row[:4]) for row in rows}, key=lambda key: (key[0], SPLITS.index(key[3])))
    n = {(row[0], row[3], row[4]): int(row[5]) for row in rows}
    return [
        _counts(run_id, name, split, n, per_minute.get((run_id, split), 0.0), bool(paused))
        for run_id, name, paused, split in keys
    ]


def counts_of(conn: Connection, run: Run, splits: Sequence[str] = SPLITS) -> list[Counts]:
    """Those of one run. Raises RunError if it has nothing of these splits, or was deleted."""
    refuse_deleted(conn, run)
    mine = [one for one in counts(conn) if one.run == run.name and one.split in splits]
    if not mine:
        raise RunError(
            f"Run {run.name!r} has no pictures of {', '.join(splits)}. Register them, with the run's own data set and "
            f"recipe: rococap enqueue --run {run.name} --split {splits[0]} …"
        )
    return mine


def runs_seen(conn: Connection) -> list[RunSeen]:
    """Every run, at a cost that does not depend on how many pictures it has."""
    of_run: dict[str, list[Counts]] = {}
    for one in counts(conn):
        of_run.setdefault(one.run, []).append(one)
    created = {row[0]: row[1] for row in execute(conn, "SELECT id, created_at FROM runs")}
    return [RunSeen(run, created[run.id], tuple(of_run.get(run.name, ()))) for run in list_runs(conn)]


def _counts(
    run_id: int, name: str, split: str, n: Mapping[tuple[int, str, str], int], per_minute: float, paused: bool
) -> Counts:
    in_state = {state.value: n.get((run_id, split, state.value), 0) for state in JobState}
    left = in_state["pending"] + in_state["leased"] + in_state["waiting"]
    eta = 60 * left / per_minute if per_minute else (0.0 if not left else None)
    flags = {flag: found for flag in FLAGS if (found := n.get((run_id, split, flagged(flag)), 0))}
    return Counts(name, split, **in_state, per_minute=per_minute, eta_sec=eta, paused=paused, flags=flags)


def _rates(conn: Connection, at: int) -> dict[tuple[int, str], float]:
    """Captions per minute of each (run, split), over the last five minutes or since the first lease in them.

    Without leases of the future, which say that the clock was set back since.
    """
    start = at - RATE_WINDOW_MS
    rows = execute(
        conn,
        "SELECT run_id, split, sum(n_done), min(claimed_at) FROM ("
        "SELECT run_id, split, n_done, claimed_at FROM leases WHERE closed_at BETWEEN ? AND ? UNION ALL "
        "SELECT run_id, split, n_done, claimed_at FROM leases WHERE state = 'open') AS recent "
        "WHERE claimed_at <= ? GROUP BY run_id, split",
        (start, at, at),
    ).fetchall()
    return {
        (run_id, split): float(n_done) * 60_000 / max(at - max(first, start), 1_000)
        for run_id, split, n_done, first in rows
        if n_done
    }


def unfinished(conn: Connection, run: Run, splits: Sequence[str]) -> dict[str, int]:
    """How many jobs of these splits are pending, leased and waiting."""
    rows = execute(
        conn,
        "SELECT split, status, n FROM tallies WHERE run_id = ? AND status IN ('pending', 'leased', 'waiting')",
        (run.id,),
    ).fetchall()
    total = Counter({"pending": 0, "leased": 0, "waiting": 0})
    for split, status, n in rows:
        if split in splits:
            total[status] += n
    return dict(total)


def list_workers(conn: Connection, *, everyone: bool = False, now: int | None = None) -> list[WorkerSeen]:
    """Workers of the last day that have not stopped, and those that stopped in the last five minutes; or `everyone`."""
    at = _at(conn, now)
    since, stopped_since = (0, 0) if everyone else (at - 86_400_000, at - RATE_WINDOW_MS)
    rows = execute(
        conn,
        "SELECT id, host, pid, device, stopped_at, n_done, seen_at, lease_ttl_ms, telemetry, self_check "
        "FROM workers "
        "WHERE seen_at >= ? AND (stopped_at IS NULL OR stopped_at >= ?) ORDER BY id",
        (since, stopped_since),
    ).fetchall()

    def state(stopped_at: int | None, seen_at: int, lease_ttl_ms: int) -> str:
        if stopped_at is not None:
            return "stopped"
        # One that was seen in the future was not seen since the clock was set back.
        return "lost" if abs(at - seen_at) > lease_ttl_ms else "running"

    return [
        WorkerSeen(
            *(id, host, pid, device, state(stopped, seen, ttl_ms), done, max(0, at - seen) / 1000),
            telemetry=Telemetry.from_json(told) if told else None,
            self_check=json.loads(checked) if checked else None,
        )
        for id, host, pid, device, stopped, done, seen, ttl_ms, told, checked in rows
    ]


_LANES = {NORMAL: "normal", SUSPECTS: "suspects", SOLO: "solo"}


def list_leases(conn: Connection, *, closed: int = 0, now: int | None = None) -> list[LeaseSeen]:
    """The open leases, oldest first, after the last `closed` of those that ended."""
    at = _at(conn, now)
    columns = (
        "SELECT l.id, w.id, w.host, w.pid, r.name, l.split, l.lane, l.state, l.n_jobs, l.n_done, l.claimed_at, "
        "l.beat_at, l.expires_at, l.load_ms, l.prepare_ms, l.prefill_ms, l.decode_ms, l.store_ms "
        "FROM leases l JOIN workers w ON w.id = l.worker_id JOIN runs r ON r.id = l.run_id "
    )
    latest = columns + "WHERE l.closed_at IS NOT NULL ORDER BY l.closed_at DESC, l.id DESC LIMIT ?"
    ended = execute(conn, latest, (closed,)).fetchall()
    rows = [*reversed(ended), *execute(conn, columns + "WHERE l.state = 'open' ORDER BY l.id").fetchall()]
    return [_lease_seen(row, at) for row in rows]


def _lease_seen(row: Sequence[Any], at: int) -> LeaseSeen:
    id, worker, host, pid, run, split, lane, state, jobs, done, claimed, beat, expires, *timing = row
    expires_in_sec = (expires - at) / 1000 if state == "open" else None
    age_sec, beat_sec_ago = (at - claimed) / 1000, (at - beat) / 1000
    return LeaseSeen(
        *(id, worker, host, pid, run, split, _LANES[lane], state, jobs, done, age_sec, beat_sec_ago, expires_in_sec),
        timing=Timing(*timing),
    )


# One split at a time: only then does SQLite prefer the index of what failed to that of the whole run.
_FAILED = (
    "SELECT j.split, i.image_id, f.code, f.message, j.attempts FROM jobs j JOIN images i ON i.id = j.image_id "
    "JOIN failures f ON f.id = (SELECT max(id) FROM failures WHERE job_id = j.id) "
    "WHERE j.run_id = ? AND j.split = ? AND j.status = 'failed' ORDER BY j.id"
)


def list_failures(conn: Connection, run: str | None = None, splits: Sequence[str] = ()) -> list[Failed]:
    """What failed, with its latest reason, by run, split and job."""
    return [
        Failed(one.name, *row)
        for one in ([get_run(conn, run)] if run else list_runs(conn))
        for split in splits or SPLITS
        for row in execute(conn, _FAILED, (one.id, split)).fetchall()
    ]
