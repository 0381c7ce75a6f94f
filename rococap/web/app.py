"""Puts the routers together, and answers what goes wrong with a page or, for programs, with JSON."""

import logging
from collections.abc import Mapping

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy import Engine as Database
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from rococap import queue
from rococap.errors import DatabaseError, DatabaseUnavailable, RococapError, RunError
from rococap.recipe import Recipe
from rococap.web import actions, browse, dashboard, images, operations, picture, reader, reference, replace, studies
from rococap.web.access import API, MAX_BODY, READS, Access, Guard, Refused
from rococap.web.calls import Service, error_response
from rococap.web.pictures import PictureGone, Pictures, Thumbnails, folder_of
from rococap.web.pool import Pool
from rococap.web.proxy import api_of
from rococap.web.reader import ReaderUnknown
from rococap.web.search import Search
from rococap.web.site import Site, assets, site_of

log = logging.getLogger(__name__)

ROUTERS = (
    dashboard.router,
    actions.router,
    browse.router,
    images.router,
    picture.router,
    reader.router,
    replace.router,
    studies.router,
)
"""The router of every page. A path in `site.NAVIGATION` is linked on every page once one of them answers it."""

router = APIRouter()


@router.get("/static/{version}/{name}")
def static(version: str, name: str) -> Response:
    """A file that was loaded at the start. Its address changes with its content, so that browsers may keep it."""
    asset = assets().get(name)
    if asset is None or asset.version != version:
        raise HTTPException(404)
    kept = {"Cache-Control": "private, max-age=31536000, immutable"}
    return Response(asset.content, media_type=asset.media_type, headers=kept)


class App(FastAPI):
    """FastAPI behind the guard, which stands before everything, FastAPI's own answers to errors included."""

    def __init__(self, site: Site, service: Service | Pool | None) -> None:
        super().__init__(openapi_url=None, max_body_size=MAX_BODY, telemetry={"auto_configure": False})
        self.state.site = site
        self.state.dashboard = dashboard.Dashboard(site)
        self.state.service = service
        self.state.pictures = Pictures(Thumbnails(folder_of(site.database)))
        self.state.search = Search(site.database)

    def close(self) -> None:
        """Closes what requests have opened."""
        self.state.search.close()
        self.state.pictures.close()

    def build_middleware_stack(self) -> ASGIApp:
        def refuse(request: Request, error: Refused) -> Response:
            if request.url.path.startswith(API):
                return error_response(error.status, str(error))
            return answer(request, site, error.status, str(error))

        site: Site = self.state.site
        return Guard(super().build_middleware_stack(), site.access, refuse)


def create_app(database: Database, access: Access, service: Service | Pool | None = None) -> App:
    """The application for a database that `db.connect(…, pooled=False)` has opened.

    With a `service`, the inference API is beside the pages.
    """
    site = Site(database, access)
    app = App(site, service)
    for one in (router, operations.router, *ROUTERS):
        app.include_router(one)
    site.paths = frozenset(route.path for one in ROUTERS for route in one.routes if isinstance(route, APIRoute))
    if service is not None:
        app.include_router(reference.router)
        site.paths |= {"/docs"}
        app.mount(API.rstrip("/"), api_of(service, lambda name: _recipe_of(site, name)))
    app.add_exception_handler(RococapError, _explain)
    app.add_exception_handler(ReaderUnknown, _ask_reader)
    app.add_exception_handler(HTTPException, _explain_status)
    app.add_exception_handler(RequestValidationError, _explain_request)
    app.add_exception_handler(Exception, _report)
    return app


def _recipe_of(site: Site, run: str) -> Recipe:
    with site.read() as conn:
        return queue.get_run(conn, run).recipe


# --- What goes wrong ---------------------------------------------------------------------------------------------

TITLES = {
    400: "That cannot be done",
    401: "Which token?",
    403: "Not allowed",
    404: "There is no such page",
    405: "Not allowed",
    409: "That cannot be done",
    413: "Too large",
    421: "Another name",
    422: "That cannot be understood",
    500: "Something went wrong",
    503: "The database cannot be read",
}
MESSAGES = {
    404: "The address may have been mistyped, or what it showed is gone.",
    405: "This address does not accept that kind of request.",
}
NO_API = "This server only shows the queue. Start it with --run NAME to have requests for captions answered."


def answer(
    request: Request, site: Site, status: int, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    """An error as a page for browsers, and as {"error": {"message": …}} for scripts and other programs."""
    headers = headers or {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}.get(status)
    if "text/html" in request.headers.get("accept", ""):
        title = TITLES.get(status, TITLES[400])
        page = site.page(request, "error.html", status, status_code=status, title=title, message=message)
        page.headers.update(headers or {})
        return page
    return JSONResponse({"error": {"message": message}}, status, headers)


def _explain(request: Request, error: Exception) -> Response:
    match error:
        case Refused():
            status = error.status
        case PictureGone():
            status = 404
        case DatabaseUnavailable() | DatabaseError():
            status = 503
        case RunError():
            status = 409
        case _:
            status = 400
    return answer(request, site_of(request), status, str(error))


def _ask_reader(request: Request, error: Exception) -> Response:
    """A form that asks for the name and then goes on; an error for whoever cannot fill it in."""
    site = site_of(request)
    if request.method in READS and "text/html" in request.headers.get("accept", ""):
        return site.page(request, "reader.html", 409, message=str(error))
    return answer(request, site, 409, str(error))


def _explain_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.url.path.startswith(API) and request.app.state.service is None:
        return error_response(404, NO_API)
    return answer(
        request, site_of(request), error.status_code, MESSAGES.get(error.status_code, error.detail), error.headers
    )


def _explain_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return answer(request, site_of(request), 422, f"{where}: {first['msg']}.")


def _report(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return answer(request, site_of(request), 500, "The server could not answer this request. Its log says why.")
