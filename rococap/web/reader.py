"""Who is reading: a name that people give themselves, kept in a cookie. It says who did what, and proves nothing.

A route that needs the name has a parameter `reader: Reader`; one that can do without it has `reader: MaybeReader`.
Pages that pass `reader=…` on to their template show it in the header, with a form that changes it.
"""

from typing import Annotated, Final
from urllib.parse import parse_qs, quote, unquote

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import RedirectResponse

from rococap.errors import RococapError
from rococap.review import checked_name
from rococap.web.site import Here

KEPT_SEC: Final = 400 * 86_400
"""How long browsers keep a name. They would keep none for longer."""

router = APIRouter()


class ReaderUnknown(RococapError):
    """A request has no name of a reader, and needs one."""


def known_reader(request: Request, site: Here) -> str:
    """The reader's name, "" if it is not known."""
    try:
        return checked_name(unquote(request.cookies.get(_cookie(site), "")))
    except RococapError:
        return ""


MaybeReader = Annotated[str, Depends(known_reader)]
"""The annotation of a parameter that receives the reader's name, "" if it is not known."""


def needed_reader(reader: MaybeReader) -> str:
    """The reader's name. Raises ReaderUnknown, which is answered with a form, or with status 409 for programs."""
    if not reader:
        raise ReaderUnknown("What you do here is kept under your name, with the time. Say who you are first.")
    return reader


Reader = Annotated[str, Depends(needed_reader)]
"""The annotation of a parameter that receives the reader's name, without which the route is not called."""


@router.post("/reader")
async def name_reader(request: Request, site: Here) -> RedirectResponse:
    """Keeps the name of a form's field `name`, and goes on to `next`, a path of this server."""
    form = parse_qs((await request.body()).decode(errors="replace"))
    name = checked_name(form.get("name", [""])[0])
    path = form.get("next", ["/"])[0]
    answer = RedirectResponse(path if path.startswith("/") and not path.startswith("//") else "/", status_code=303)
    is_https = request.url.scheme == "https"
    value = quote(name, safe="")
    answer.set_cookie(
        _cookie(site), value, max_age=KEPT_SEC, path="/", httponly=True, samesite="strict", secure=is_https
    )
    return answer


def _cookie(site: Here) -> str:
    return f"{site.access.cookie}-reader"
