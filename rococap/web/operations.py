"""What those who run a server ask it: whether it lives, whether it answers, and what it counts."""

from typing import Final, cast

from fastapi import APIRouter
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rococap.errors import RococapError
from rococap.web.calls import Service
from rococap.web.metrics import CONTENT_TYPE, exposition
from rococap.web.pool import Pool
from rococap.web.site import Site

UNHEALTHY: Final = "The model is loading or does not answer, the server is stopping, or the database cannot be read."

router = APIRouter(tags=["operations"])


@router.get("/health")
def health() -> dict[str, str]:
    """That the process answers. Needs no token."""
    return {"status": "ok"}


@router.get("/healthz", responses={503: {"description": UNHEALTHY}})
def healthz(request: Request) -> Response:
    """Whether requests are answered. Needs no token, so that why not, which may name hosts and files, is left out."""
    status = _status(request.app.state)
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


def _status(server: State) -> str:
    service, site = cast(Service | Pool | None, server.service), cast(Site | None, server.site)
    if service is not None and service.state != "ok":
        return service.state
    if site is not None:
        try:
            with site.read():
                pass
        except RococapError:
            return "database unavailable"
    return "ok"


@router.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE: {}}}})
def metrics(request: Request) -> Response:
    """What the server counts, for Prometheus: see docs/serving.md."""
    server = request.app.state
    return Response(exposition(server.service, server.site), media_type=CONTENT_TYPE)
