"""A client for an OpenAI-compatible server over HTTP: asks for its models, and for one answer to one request body.

Errors are classified by what can be done about them. Refused is permanent, and about one picture if the server captions
others; Away is temporary; ModelError needs a person. Knows no picture and no queue. The API key is sent to the server,
and never logged, stored or quoted. The requests follow OpenAI's API reference for chat completions.
"""

import asyncio
import html
import json
import os
import re
import threading
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx

from rococap.errors import ModelError

CONNECT_SEC = 10.0
REQUEST_SEC = 300.0
"""Limit for an entire request, below a worker's stall timeout: a server that sends byte by byte hangs as well."""
LOAD_SEC = 30.0
"""Limit for a request at the start, when the server is asked for its models and its version."""
KEEP_SEC = 2.0
"""How long an idle connection is kept. Servers close theirs after 5 s, possibly just as it is used again."""
MAX_WAIT_SEC = 600.0
"""Upper bound for the wait that a server may ask for."""
MAX_QUOTED = 300
"""Up to how many characters of a server's message are quoted."""
MAX_PAGE = 20_000
"""Up to how many characters of a web page are searched for text."""
LOCAL = ("localhost", "127.0.0.1", "::1")

FINISHED = ("stop", "length")
REFUSALS = frozenset({400, 413, 415, 422})
BUSY = frozenset({408, 409, 425, 429, 503})
"""Statuses that describe the server, whatever the request was."""

_MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)

T = TypeVar("T")


class Refused(Exception):
    """The server rejects this picture, or, if the server itself is at fault, every picture."""


class Away(Exception):
    """The same request may succeed later, after `wait` seconds if the server said so.

    `code` is the failure's code if the picture may be the cause, and otherwise empty.
    """

    def __init__(self, reason: str, *, code: str = "", wait: float = 0.0) -> None:
        super().__init__(reason)
        self.code = code
        self.wait = wait


class NoCaption(Away):
    """The server answered, but not with a caption."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A caption as the server returned it. The numbers of tokens are 0 if the server does not report them."""

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Served:
    """What the server reports about itself and the requested model. `about` stays the same after a restart."""

    about: str
    version: str


class Server:
    """Connections to one server. `open` starts a thread, which `close` ends; `ask` may be called from any thread."""

    def __init__(self, base_url: str | None) -> None:
        """Raises ModelError if the base URL or the API key is unusable."""
        self.url = _checked(base_url)
        self.place = urlsplit(self.url).netloc
        self._chat = httpx.URL(f"{self.url}/chat/completions")
        self._key = _key()
        self._model = ""
        self._others: frozenset[str] = frozenset()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle: list[httpx.AsyncClient] = []

    def open(self, model: str) -> Served:
        """Finds the model that every request will name. Raises ModelError if the server does not serve it."""
        self._model = model
        self._trusted = httpx.create_ssl_context()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()
        try:
            return self._start(self._find()).result()
        except BaseException:
            self.close()
            raise

    def ask(self, body: bytes) -> Future[Answer]:
        """Sends a request. The future raises Refused, Away or ModelError; cancelling it closes the connection."""
        return self._start(self._ask(body))

    def close(self) -> None:
        """Cancels all requests, closes the connections and ends the thread."""
        if (loop := self._loop) is None:
            return
        self._loop = None
        asyncio.run_coroutine_threadsafe(self._end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        assert self._loop is not None, "not open"
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    @contextmanager
    def _client(self) -> Iterator[httpx.AsyncClient]:
        """Lends a client to one request at a time: a client scans all of its connections twice for every request."""
        client = self._idle.pop() if self._idle else self._new_client()
        try:
            yield client
        finally:
            self._idle.append(client)

    def _new_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            verify=self._trusted,
            timeout=httpx.Timeout(None, connect=CONNECT_SEC),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_SEC),
            trust_env=urlsplit(self.url).hostname not in LOCAL,  # a cluster's proxy cannot reach this machine
        )

    async def _end(self) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        while self._idle:
            await self._idle.pop().aclose()

    # --- at the start ---

    async def _find(self) -> Served:
        response = await self._get(f"{self.url}/models")
        models = _models(response)
        if response.status_code in (401, 403):
            raise self._locked(response.status_code)
        if response.status_code >= 500 or response.status_code in BUSY:
            raise ModelError(
                f"{self.url} is not ready (status {response.status_code}{self._server_message(response)}): "
                "start the worker again when it is, or correct --base-url."
            )
        if models is None:
            raise ModelError(
                f"{self.url} is not an OpenAI-compatible server: its /models returns no list of models "
                f"(status {response.status_code}). Correct --base-url, which usually ends in /v1."
            )
        if self._model not in models:
            raise ModelError(self._unknown(list(models)))
        self._others = frozenset(models) - {self._model}
        facts = {"served": self._model, **{name: models[self._model].get(name) for name in ("id", "root", "owned_by")}}
        about = ", ".join(f"{name}: {value}" for name, value in facts.items() if isinstance(value, str))
        return Served(about, await self._version(response))

    async def _get(self, url: str) -> httpx.Response:
        try:
            with self._client() as client:
                async with asyncio.timeout(LOAD_SEC):
                    return await client.get(url)
        except (httpx.RequestError, TimeoutError) as error:
            raise ModelError(
                f"Nothing answers at {self.url} ({_reason(error)}): start the server, or correct --base-url."
            ) from error

    def _unknown(self, names: list[str]) -> str:
        if not names:
            return f"{self.url} serves no model. Load one there, then start the worker again."
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        return (
            f"{self.url} does not serve {self._model}; it serves {shown}. "
            "If one of these is the run's model, name it: --served-model NAME"
        )

    async def _version(self, response: httpx.Response) -> str:
        """The server's software according to its header, and vLLM's version, which is published beside /v1."""
        versions = [response.headers.get("server", "")]
        with suppress(ModelError, ValueError):
            answer = (await self._get(urljoin(self.url + "/", "../version"))).json()
            version = answer.get("version") if isinstance(answer, dict) else None
            versions.append(version if isinstance(version, str) else "")
        return " ".join(filter(None, versions))[:MAX_QUOTED]

    # --- a picture ---

    async def _ask(self, body: bytes) -> Answer:
        try:
            with self._client() as client:
                async with asyncio.timeout(REQUEST_SEC):
                    response = await client.post(self._chat, content=body, headers={"Content-Type": "application/json"})
        except httpx.ConnectError as error:
            raise Away(_reason(error)) from error
        except httpx.ConnectTimeout as error:
            raise Away(f"no connection within {CONNECT_SEC:.0f} s") from error
        except TimeoutError as error:
            reason = f"no answer within {REQUEST_SEC:.0f} s: with a smaller --batch-size, answers come sooner"
            raise Away(reason, code="server_timeout") from error
        except httpx.RequestError as error:
            raise Away(_reason(error), code="server_error") from error
        if response.status_code != 200:
            self._refuse(response)
        return self._read(response)

    def _refuse(self, response: httpx.Response) -> NoReturn:
        status, reason = response.status_code, self._server_message(response)
        if 300 <= status < 400:
            location = self._quoted(response.headers.get("location", ""))
            raise NoCaption(f"a redirect with status {status}{location}", code="garbage_answer")
        if status in REFUSALS:
            raise Refused(f"status {status}{reason}")
        if status in BUSY or status >= 500:
            code = "" if status in BUSY else "server_error"
            raise Away(f"status {status}{reason}", code=code, wait=_retry_after(response.headers.get("retry-after")))
        if status in (401, 403):
            raise self._locked(status)
        raise ModelError(
            f"{self.url} no longer captions with {self._model} (status {status}{reason}). "
            "Start the server again with this model, or correct --base-url."
        )

    def _read(self, response: httpx.Response) -> Answer:
        try:
            answer = response.json()
            if answer.get("error"):
                raise self._no_caption("an error with status 200", response, "server_error")
            choice = answer["choices"][0]
            self._check_ended(choice)
            message, finish_reason = choice["message"], choice.get("finish_reason")
            text, reasoning = _text(message["content"]), _reasoning(message)
            model, usage = answer.get("model"), answer.get("usage")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._no_caption(_kind(response), response) from error
        if text is None:
            raise self._no_caption("an answer whose caption is not text", response)
        if not (reasoning or text or finish_reason):
            raise self._no_caption(_kind(response), response)
        if isinstance(model, str) and model in self._others:
            raise ModelError(
                f"{self.url} answered with the model {model}, not with {self._model}, and a run never mixes models. "
                "Start the server again with the run's model."
            )
        return Answer(
            reasoning + text,
            finish_reason or "stop",  # some servers leave it out
            _count(usage, "prompt_tokens"),
            _count(usage, "completion_tokens"),
        )

    def _check_ended(self, choice: dict[str, Any]) -> None:
        """Raises NoCaption for any other finish reason: the text was cut or withheld."""
        reason, error = choice.get("finish_reason"), choice.get("error")
        if not error and (not reason or reason in FINISHED):
            return
        quoted = self._quoted(reason if isinstance(reason, str) else json.dumps(reason or "error"))
        raise NoCaption(
            f"an answer that ended with the reason{quoted}{self._quoted(_message(error))}", code="ended_by_server"
        )

    def _no_caption(self, what: str, response: httpx.Response, code: str = "garbage_answer") -> NoCaption:
        return NoCaption(what + (self._server_message(response) or self._quoted(response.text)), code=code)

    def _locked(self, status: int) -> ModelError:
        problem = "refuses the one in OPENAI_API_KEY" if self._key else "OPENAI_API_KEY is not set"
        return ModelError(f"{self.url} requires an API key (status {status}), and {problem}. Set OPENAI_API_KEY.")

    def _server_message(self, response: httpx.Response) -> str:
        """Quotes the server's own message, or the text of a web page that answers in its place."""
        if _is_page(response):
            return self._quoted(html.unescape(_MARKUP.sub(" ", response.text[:MAX_PAGE])))
        message: object = response.text
        with suppress(ValueError, RecursionError):
            message = _message(response.json())
        return self._quoted(message)

    def _quoted(self, message: object) -> str:
        """A message after a colon, bounded in length, without the API key, which some servers repeat; "" if empty."""
        words = " ".join(str(message or "").split())
        if self._key:
            words = words.replace(self._key, "***")
        return f": {words[:MAX_QUOTED]}" if words else ""


# --- reading settings and answers ------------------------------------------------------------------------------


def _checked(base_url: str | None) -> str:
    if not base_url:
        raise ModelError("The engine openai needs the URL of its server: --base-url http://localhost:8000/v1")
    try:
        parts = urlsplit(base_url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx.URL(base_url)
    except (ValueError, httpx.InvalidURL):
        is_url = False
    if "@" in base_url or "?" in base_url or "#" in base_url:  # the URL is logged and stored, so it must hold no key
        raise ModelError(
            "--base-url contains a user name, a password or a query. Leave them out: "
            "the API key is taken from OPENAI_API_KEY."
        )
    if not is_url:
        raise ModelError(f"--base-url must look like http://localhost:8000/v1, not {base_url}")
    return base_url.rstrip("/")


def _key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ModelError("OPENAI_API_KEY contains characters that cannot be sent. Set it again.")
    return key


def _models(response: httpx.Response) -> dict[str, Mapping[str, object]] | None:
    """The models by id; None if the response is not a list of models."""
    try:
        listed = response.json()["data"]
        return {model["id"]: model for model in listed if isinstance(model["id"], str)}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _text(content: object) -> str | None:
    """The text of a caption, or of its parts; None if the content is something else."""
    if isinstance(content, list):
        texts = [part["text"] for part in content if _is_text(part)]
        return "".join(texts) if len(texts) == len(content) else None
    return content or "" if isinstance(content, str | None) else None


def _reasoning(message: dict[str, Any]) -> str:
    """The reasoning that some servers return apart from the content, in the form in which models write it."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return f"<think>{reasoning}</think>\n" if reasoning and isinstance(reasoning, str) else ""


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _kind(response: httpx.Response) -> str:
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return "an event stream, which was not asked for"
    return "a web page" if _is_page(response) else "an answer that holds no caption"


def _is_page(response: httpx.Response) -> bool:
    """Whether the content is a web page: the content type of proxies and portals is often wrong."""
    text = response.text[:MAX_PAGE].lstrip("\ufeff \r\n\t").lower()
    return text.startswith("<") and ("<html" in text or "<!doctype html" in text)


def _message(answer: object) -> object:
    """The error message, which servers put in error.message, error, message or detail."""
    while isinstance(answer, dict):
        answer = next((answer[name] for name in ("error", "message", "detail") if answer.get(name)), "")
    return answer


def _count(usage: object, name: str) -> int:
    n = usage.get(name) if isinstance(usage, dict) else None
    return n if isinstance(n, int) and 0 <= n < 1 << 31 else 0


def _retry_after(header: str | None) -> float:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3), a number or a date, bounded; 0 if there is none."""
    if header is None:
        return 0.0
    try:
        seconds = float(header) if header.strip()[:1].isdigit() else _seconds_until(parsedate_to_datetime(header))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), MAX_WAIT_SEC)


def _seconds_until(date: datetime) -> float:
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
