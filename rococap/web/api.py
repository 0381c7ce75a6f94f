"""The application of the inference API, below /v1."""

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rococap.errors import RococapError
from rococap.web.access import MAX_REQUEST
from rococap.web.calls import RecipeOf, Service, Serving, error_response, explain, invalid
from rococap.web.captioner import LOADING
from rococap.web.captions import captions
from rococap.web.chat import chat_completions
from rococap.web.intake import Intake
from rococap.web.requests import Unavailable


def create_api(service: Service, recipe_of: RecipeOf) -> FastAPI:
    """The application below /v1."""
    api = FastAPI(openapi_url=None, max_body_size=MAX_REQUEST, telemetry={"auto_configure": False})
    api.state.service = service
    api.state.recipe_of = recipe_of
    api.add_api_route("/captions", captions, methods=["POST"])
    api.add_api_route("/chat/completions", chat_completions, methods=["POST"], response_model=None)
    api.add_api_route("/models", models, methods=["GET"])
    api.add_middleware(Intake, service=service)
    for expected in (RococapError, ClientDisconnect):
        api.add_exception_handler(expected, _explain)
    api.add_exception_handler(HTTPException, _explain_status)
    api.add_exception_handler(RequestValidationError, _explain_validation)
    return api


def models(service: Serving) -> dict[str, Any]:
    """The one model that is served, as OpenAI lists models. `root` changes with its weights."""
    if service.captioner.info is None:
        raise Unavailable(LOADING)
    digest = service.captioner.info.digest
    model = {"id": service.model, "object": "model", "created": 0, "owned_by": "rococap", "root": digest}
    return {"object": "list", "data": [model]}


# --- what goes wrong -------------------------------------------------------------------------------------------


def _explain(request: Request, error: Exception) -> Response:
    return explain(error)


def _explain_status(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "There is no such address.", 413: f"A request may have {MAX_REQUEST:,} bytes."}
    code = "queue_full" if error.status_code == 429 else None
    return error_response(error.status_code, messages.get(error.status_code, error.detail), code=code)


def _explain_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return explain(invalid(error.errors()[0]))
