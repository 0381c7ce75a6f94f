"""Changes of the queue from the dashboard, through the functions that the commands call."""

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, StringConstraints
from starlette.requests import Request

from rococap import queue
from rococap.web.site import Here

router = APIRouter(prefix="/actions")

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class Chosen(BaseModel):
    """What to change: a run, and in it only one split or one failure code, if given."""

    run: Name
    split: Literal["train", "validation", "test"] | None = None
    code: Name | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        return (self.split,) if self.split else ()


class Told(BaseModel):
    """What was done, in a sentence."""

    message: str


@router.post("/pause")
def pause(request: Request, site: Here, chosen: Chosen) -> Told:
    return _paused(request, site, chosen, True)


@router.post("/resume")
def resume(request: Request, site: Here, chosen: Chosen) -> Told:
    return _paused(request, site, chosen, False)


def _paused(request: Request, site: Here, chosen: Chosen, paused: bool) -> Told:
    with site.write() as conn:
        queue.pause(conn, queue.get_run(conn, chosen.run), paused)
    done = "paused. Workers finish what they hold" if paused else "resumed. Workers may claim its pictures again"
    return _told(request, f"{chosen.run}: {done}.")


@router.post("/retry")
def retry(request: Request, site: Here, chosen: Chosen) -> Told:
    """Makes failed pictures pending again."""
    with site.write() as conn:
        codes = (chosen.code,) if chosen.code else ()
        n = queue.retry(conn, queue.get_run(conn, chosen.run), splits=chosen.splits, codes=codes)
    return _told(request, f"{chosen.run}: {n:,} pending again.")


@router.post("/cancel")
def cancel(request: Request, site: Here, chosen: Chosen) -> Told:
    """Withdraws pictures that are not finished."""
    with site.write() as conn:
        n = queue.cancel(conn, queue.get_run(conn, chosen.run), splits=chosen.splits)
    return _told(request, f"{chosen.run}: {n:,} cancelled. Undo: {site.command('retry --cancelled', chosen.run)}")


def _told(request: Request, message: str) -> Told:
    request.app.state.dashboard.forget()
    return Told(message=message)
