"""The OpenAPI document of the inference API, and a page that shows it and tries it out, without the network."""

from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any, Final

from fastapi import APIRouter
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from rococap import __version__
from rococap.web import api, operations
from rococap.web.access import API, HEADERS
from rococap.web.site import FOLDER, MEDIA_TYPES, assets

# Swagger UI has icons in its style sheet.
POLICY: Final = HEADERS["Content-Security-Policy"].replace("img-src 'self'", "img-src 'self' data:")
CACHED: Final = {"Cache-Control": "private, max-age=3600"}
PAGE: Final = (FOLDER / "templates" / "docs.html").read_text()
SWAGGER: Final = files("fastapi_offline") / "static"
FILES: Final = {
    **{name: assets()[name].content for name in ("icon.svg", "docs.js")},
    **{name: (SWAGGER / name).read_bytes() for name in ("swagger-ui.css", "swagger-ui-bundle.js")},
}
"""The files of the page, which a server without other pages has as well."""

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json")
def openapi() -> Response:
    """The description of the API for programs."""
    return JSONResponse(document())


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document, with the paths as clients see them."""
    described = APIRouter()
    described.include_router(api.router, prefix=API.rstrip("/"))
    described.include_router(operations.router)
    found = get_openapi(
        title="rococap",
        version=__version__,
        summary="Captions of radiology pictures",
        description="Machine-generated captions. Not for clinical use.",
        routes=described.routes,
    )
    found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    found["security"] = [{"token": []}, {}]  # a server on the machine's own address may have none
    return found


@router.get("/docs")
def page() -> Response:
    """The description for people."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})


@router.get("/docs/{name}")
def file(name: str) -> Response:
    """A file of the page."""
    if name not in FILES:
        raise HTTPException(404)
    return Response(FILES[name], media_type=MEDIA_TYPES[PurePath(name).suffix], headers=CACHED)
