"""The application of the inference API, below /v1."""

from typing import Literal

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rococap.errors import RococapError
from rococap.web.access import API, MAX_REQUEST
from rococap.web.calls import ERRORS, RecipeOf, Service, Serving, check_model, explain, explain_status, invalid
from rococap.web.captioner import LOADING
from rococap.web.captions import CAPTIONS, captions
from rococap.web.chat import CHAT, chat_completions
from rococap.web.intake import Intake
from rococap.web.requests import Unavailable

router = APIRouter(tags=["captions"], responses=ERRORS)
router.add_api_route("/captions", captions, methods=["POST"], **CAPTIONS)
router.add_api_route("/chat/completions", chat_completions, methods=["POST"], response_model=None, **CHAT)


def create_api(service: Service, recipe_of: RecipeOf) -> FastAPI:
    """The application below /v1."""
    api = FastAPI(
        openapi_url=None,
        max_body_size=MAX_REQUEST,
        telemetry={"auto_configure": False},
        # To another host: a process of a pool is not told by which name the client knows the server.
        redirect_slashes=False,
        # A body is JSON unless the request says otherwise: the guard asks browsers for their origin.
        strict_content_type=False,
    )
    api.state.service = service
    api.state.recipe_of = recipe_of
    api.include_router(router)
    paths = {API.rstrip("/") + route.path for route in router.routes if isinstance(route, APIRoute)}
    api.add_middleware(Intake, service=service, paths=paths)
    explain_errors(api)
    return api


class Model(BaseModel):
    """A model, as OpenAI describes it. `root` changes with its weights."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "rococap"
    root: str


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/models")
def models(service: Serving) -> Models:
    """The one model that is served."""
    if service.captioner.info is None:
        raise Unavailable(LOADING)
    return Models(data=[Model(id=service.model, root=service.captioner.info.digest)])


@router.get("/models/{name:path}")
def model(name: str, service: Serving) -> Model:
    """The model of this name."""
    check_model(name, service)
    return models(service).data[0]


# --- what goes wrong -------------------------------------------------------------------------------------------


def explain_errors(api: Starlette) -> None:
    """Has an application answer what goes wrong with errors in OpenAI's shape."""
    for expected in (RococapError, ClientDisconnect):
        api.add_exception_handler(expected, _explain)
    api.add_exception_handler(HTTPException, _explain_status)
    api.add_exception_handler(RequestValidationError, _explain_validation)


def _explain(request: Request, error: Exception) -> Response:
    return explain(error)


def _explain_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return explain_status(request, error)


def _explain_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return explain(invalid(error.errors()[0]))
