"""The application without pages: the inference API alone."""

from typing import NoReturn

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp

from rococap.errors import RunError
from rococap.web import operations, reference
from rococap.web.access import API, MAX_BODY, Access, Guard, Refused
from rococap.web.calls import RecipeOf, Service, error_response, explain_status
from rococap.web.pool import Pool
from rococap.web.proxy import api_of


class Bare(FastAPI):
    """FastAPI behind the guard."""

    def __init__(self, access: Access, service: Service | Pool) -> None:
        super().__init__(openapi_url=None, max_body_size=MAX_BODY, telemetry={"auto_configure": False})
        self._access = access
        self.state.service = service
        self.state.site = None

    def build_middleware_stack(self) -> ASGIApp:
        return Guard(super().build_middleware_stack(), self._access, _refuse)


def create_bare_app(access: Access, service: Service | Pool, recipe_of: RecipeOf | None = None) -> FastAPI:
    """The application of a server that has a model and no pages."""
    app = Bare(access, service)

    app.include_router(operations.router)
    app.include_router(reference.router)
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    app.mount(API.rstrip("/"), api_of(service, recipe_of or _no_run))
    app.add_exception_handler(HTTPException, _explain_status)
    return app


def _no_run(name: str) -> NoReturn:
    raise RunError(f"This server has no database, so it knows no run {name!r}. Start it with --db and --run.")


def _refuse(request: Request, error: Refused) -> Response:
    return error_response(error.status, str(error))


def _explain_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return explain_status(request, error)
