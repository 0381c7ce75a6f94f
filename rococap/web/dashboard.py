"""The dashboard: how far each run is, who works on it, and what has failed. It shows what `rococap status` prints."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from rococap import db, queue
from rococap.queue import Failed, FailedAlike, Interval, LeaseSeen, RunSeen, WorkerSeen
from rococap.web.live import Events, Live, Shared
from rococap.web.site import Here, Site

EXAMPLES = 3
GROUPS = 20
"""Failures are shown for at most so many codes."""
HISTORY_MS = 6 * 3_600_000
INTERVAL_MS = 60_000
LATE_MS = 2 * INTERVAL_MS
"""How late a transaction may be committed and still be in the history, which is read once otherwise."""
HISTORY_EVERY_SEC = 15.0
PARTS = ("summary", "runs", "workers", "leases", "failures")
"""Ids of the parts of the page that are live, which are also the names of their events."""

router = APIRouter()


@router.get("/")
def page(request: Request, site: Here) -> HTMLResponse:
    dashboard: Dashboard = request.app.state.dashboard
    return site.page(request, "dashboard.html", parts=dashboard.shared.now())


@router.get("/live")
async def stream(request: Request) -> StreamingResponse:
    dashboard: Dashboard = request.app.state.dashboard
    # nginx would otherwise keep events back until it has a buffer full of them.
    return StreamingResponse(
        dashboard.live.stream(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )


@router.get("/throughput")
def throughput(request: Request) -> Response:
    """Captions and tokens of each minute of the last hours, by run and split."""
    dashboard: Dashboard = request.app.state.dashboard
    return JSONResponse(dashboard.history.now())


class Dashboard:
    """What the dashboard shows to all of its viewers."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._failures = Failures()
        history = History(site)
        self.history = Shared(history.read, HISTORY_EVERY_SEC)
        self.shared: Shared[Events] = Shared(self._look, 1.0)
        self.live = Live(self.shared)

    def forget(self) -> None:
        """Shows what was just changed without delay."""
        self.shared.forget()

    def _look(self) -> Events:
        """The HTML of each of PARTS, from one transaction."""
        with self._site.read() as conn:
            runs = queue.runs_seen(conn)
            workers = queue.list_workers(conn)
            leases = queue.list_leases(conn)
            groups = self._failures.of(runs, lambda: queue.list_failures(conn))
        values = {
            "totals": Totals.of(runs, workers),
            "runs": runs,
            "workers": [(worker, limit_of(worker, leases)) for worker in workers],
            "leases": leases,
            "expiring": sorted(filter(is_expiring, leases), key=lambda lease: lease.expires_in_sec or 0),
            "groups": groups[:GROUPS],
            "more_groups": len(groups) - GROUPS,
            "examples": EXAMPLES,
        }
        return {part: self._site.render(f"dashboard/{part}.html", **values) for part in PARTS}


@dataclass(frozen=True, slots=True)
class Totals:
    """All runs together. Rates are those that running workers measured in their last minute; `eta_sec` is the longest
    of what is being captioned, 0 if all is finished or paused, and None if nothing that is left has a rate.
    """

    done: int
    pictures: int
    per_sec: float
    tokens_per_sec: float
    eta_sec: float | None
    running: int
    lost: int

    @classmethod
    def of(cls, runs: Sequence[RunSeen], workers: Sequence[WorkerSeen]) -> "Totals":
        splits = [split for run in runs for split in run.counts]
        left = [split.eta_sec for split in splits if split.unfinished and not split.paused]
        known = [eta_sec for eta_sec in left if eta_sec is not None]
        running = [worker for worker in workers if worker.state == "running"]
        measured = [worker.telemetry for worker in running if worker.telemetry]
        return cls(
            done=sum(split.done for split in splits),
            pictures=sum(split.total - split.cancelled for split in splits),
            per_sec=sum(one.pictures_per_sec for one in measured),
            tokens_per_sec=sum(one.new_tokens_per_sec for one in measured),
            eta_sec=max(known) if known else None if left else 0.0,
            running=len(running),
            lost=sum(worker.state == "lost" for worker in workers),
        )


def limit_of(worker: WorkerSeen, leases: Sequence[LeaseSeen]) -> str:
    """What keeps a worker from being faster, as far as its telemetry tells."""
    telemetry = worker.telemetry
    if worker.state != "running":
        return ""
    if not any(lease.worker == worker.id for lease in leases):
        return "It holds no pictures"
    if telemetry is None or not telemetry.captioning_sec:
        return "Not measured yet"
    if telemetry.waited_sec / telemetry.captioning_sec > 0.2:
        return "Pictures: disk, network or decoding is too slow"
    if telemetry.fill is not None and telemetry.fill < 0.6:
        return "Batches that are not full"
    return "The model" if telemetry.busy > 0.8 else "The work around the model"


def is_expiring(lease: LeaseSeen) -> bool:
    """Whether more than two thirds of the lease time have passed since the last heartbeat."""
    left = lease.expires_in_sec
    return left is not None and left < (left + lease.beat_sec_ago) / 3


class Failures:
    """The failed pictures by code. They are read again when their number changes, and never for a tenth of the time."""

    def __init__(self) -> None:
        self._counts: list[tuple[str, str, int]] = []
        self._groups: list[FailedAlike] = []
        self._again_at = 0.0

    def of(self, runs: Sequence[RunSeen], read: Callable[[], list[Failed]]) -> list[FailedAlike]:
        counts = [(split.run, split.split, split.failed) for run in runs for split in run.counts if split.failed]
        started = time.monotonic()
        if counts != self._counts and started >= self._again_at:
            self._groups = queue.by_code(read()) if counts else []
            self._counts = counts
            ended = time.monotonic()
            self._again_at = ended + 10 * (ended - started)
        return self._groups


class History:
    """What was captioned in each of the last minutes that are over. After the first time, only new ones are read."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._captions: dict[Interval, int] = {}
        self._tokens: dict[Interval, int] = {}
        self._until = 0

    def read(self) -> dict[str, Any]:
        with self._site.read() as conn:
            until = db.now(conn) // INTERVAL_MS * INTERVAL_MS
        oldest = until - HISTORY_MS
        since = max(oldest, self._until - LATE_MS)
        made = queue.throughput(self._site.read, since=since, every_ms=INTERVAL_MS)
        for kept, new in ((self._captions, made.captions), (self._tokens, made.tokens)):
            for interval in [interval for interval in kept if not oldest <= interval.at < since]:
                del kept[interval]
            kept |= {interval: n for interval, n in new.items() if interval.at < until}
        self._until = until
        return {"from": oldest, "until": until, "every": INTERVAL_MS, "series": self._series(oldest)}

    def _series(self, oldest: int) -> list[dict[str, Any]]:
        series = []
        for run, split in sorted({(interval.run, interval.split) for interval in self._captions}):
            captions, tokens = [0] * (HISTORY_MS // INTERVAL_MS), [0] * (HISTORY_MS // INTERVAL_MS)
            for interval, n in self._captions.items():
                if (interval.run, interval.split) == (run, split):
                    at = (interval.at - oldest) // INTERVAL_MS
                    captions[at], tokens[at] = n, self._tokens[interval]
            series.append({"run": run, "split": split, "captions": captions, "tokens": tokens})
        return series
