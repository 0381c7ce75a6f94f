"""An OpenAI-compatible server, asked over HTTP: its models, and one answer for one request body.

What goes wrong is raised by what can be done about it: Refused is for ever, and about one picture if others are
captioned; Away may pass; and ModelError needs a person. Knows no picture and no queue. The API key is sent, and never
told.
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
"""How long one request may take in all, below a worker's stall timeout: a server that drips bytes hangs too."""
LOAD_SEC = 30.0
KEEP_SEC = 2.0
"""How long an idle connection is kept: below the 5 s after which servers close theirs, just as it is used again."""
LONGEST_WAIT_SEC = 600.0
"""As long as a server may ask to be left alone."""
MAX_TOLD = 300
MAX_PAGE = 20_000
"""Characters of a web page, in which its words are looked for."""
LOCAL = ("localhost", "127.0.0.1", "::1")

FINISHED = ("stop", "length")
REFUSALS = frozenset({400, 413, 415, 422})
BUSY = frozenset({408, 409, 425, 429, 503})
"""What a server says of itself, whatever it was asked."""

_MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)

T = TypeVar("T")


class Refused(Exception):
    """The server will not take this picture; nor any other, if something is wrong with it."""


class Away(Exception):
    """The same request may succeed later; after `wait` seconds, if the server said when.

    `code` tells what it was where the picture may be the reason; else it is empty.
    """

    def __init__(self, reason: str, *, code: str = "", wait: float = 0.0) -> None:
        super().__init__(reason)
        self.code = code
        self.wait = wait


class NoCaption(Away):
    """The server is there and answered, but not with a caption."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Served:
    """What the server tells of itself and of the model that is asked for. `about` is the same after a restart."""

    about: str
    version: str


class Server:
    """`open` begins a thread of its own, which `close` ends; `ask` may be called from any."""

    def __init__(self, base_url: str | None) -> None:
        """Raises ModelError for what is no base URL."""
        self.url = _checked(base_url)
        self.place = urlsplit(self.url).netloc
        self._chat = httpx.URL(f"{self.url}/chat/completions")
        self._key = _key()
        self._model = ""
        self._others: frozenset[str] = frozenset()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle: list[httpx.AsyncClient] = []

    def open(self, model: str) -> Served:
        """Finds the model that every request will name. Raises ModelError if it is not to be had."""
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
        """Raises Refused, Away or ModelError in the future. Cancelling it closes its connection."""
        return self._start(self._ask(body))

    def close(self) -> None:
        """What is asked is cancelled."""
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
        """Each for one request at a time: with every request a client looks at all of its connections, and twice."""
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
            trust_env=urlsplit(self.url).hostname not in LOCAL,  # clusters set a proxy, which cannot reach this machine
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
                f"{self.url} is not ready (status {response.status_code}{self._said(response)}): "
                "start again when it is, or correct --base-url."
            )
        if models is None:
            raise ModelError(
                f"{self.url} is no OpenAI-compatible server: its /models gives no list of models "
                f"(status {response.status_code}). Correct --base-url, which mostly ends in /v1."
            )
        if self._model not in models:
            raise ModelError(self._unknown(list(models)))
        self._others = frozenset(models) - {self._model}
        told = {"served": self._model, **{name: models[self._model].get(name) for name in ("id", "root", "owned_by")}}
        about = ", ".join(f"{name}: {value}" for name, value in told.items() if isinstance(value, str))
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
            return f"{self.url} serves no model. Load one there, then start again."
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        return (
            f"{self.url} serves no {self._model}; it has {shown}. "
            "If one of them is the run's model, say so: --served-model NAME"
        )

    async def _version(self, response: httpx.Response) -> str:
        """What the server's header says of its software, and vLLM's version, which it tells beside /v1."""
        told = [response.headers.get("server", "")]
        with suppress(ModelError, ValueError):
            answer = (await self._get(urljoin(self.url + "/", "../version"))).json()
            version = answer.get("version") if isinstance(answer, dict) else None
            told.append(version if isinstance(version, str) else "")
        return " ".join(filter(None, told))[:MAX_TOLD]

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
            told = f"no answer within {REQUEST_SEC:.0f} s: with a smaller --batch-size each comes sooner"
            raise Away(told, code="server_timeout") from error
        except httpx.RequestError as error:
            raise Away(_reason(error), code="server_error") from error
        if response.status_code != 200:
            self._refuse(response)
        return self._read(response)

    def _refuse(self, response: httpx.Response) -> NoReturn:
        status, said = response.status_code, self._said(response)
        if 300 <= status < 400:
            told = self._quoted(response.headers.get("location", ""))
            raise NoCaption(f"a redirect with status {status}{told}", code="garbage_answer")
        if status in REFUSALS:
            raise Refused(f"status {status}{said}")
        if status in BUSY or status >= 500:
            code = "" if status in BUSY else "server_error"
            raise Away(f"status {status}{said}", code=code, wait=_retry_after(response.headers.get("retry-after")))
        if status in (401, 403):
            raise self._locked(status)
        raise ModelError(
            f"{self.url} no longer captions with {self._model} (status {status}{said}). "
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
            raise self._no_caption("an answer whose caption is no text", response)
        if not (reasoning or text or finish_reason):
            raise self._no_caption(_kind(response), response)
        if isinstance(model, str) and model in self._others:
            raise ModelError(
                f"{self.url} answered with the model {model}, not with {self._model}, and a run never mixes. "
                "Start the server again with the run's model."
            )
        return Answer(
            reasoning + text,
            finish_reason or "stop",  # some servers leave it out
            _count(usage, "prompt_tokens"),
            _count(usage, "completion_tokens"),
        )

    def _check_ended(self, choice: dict[str, Any]) -> None:
        """Whatever text comes with another reason was cut, or withheld."""
        reason, error = choice.get("finish_reason"), choice.get("error")
        if not error and (not reason or reason in FINISHED):
            return
        told = self._quoted(reason if isinstance(reason, str) else json.dumps(reason or "error"))
        raise NoCaption(
            f"an answer that ended with the reason{told}{self._quoted(_message(error))}", code="ended_by_server"
        )

    def _no_caption(self, what: str, response: httpx.Response, code: str = "garbage_answer") -> NoCaption:
        return NoCaption(what + (self._said(response) or self._quoted(response.text)), code=code)

    def _locked(self, status: int) -> ModelError:
        which = "the one in OPENAI_API_KEY is refused" if self._key else "OPENAI_API_KEY is not set"
        return ModelError(f"{self.url} asks for an API key (status {status}), and {which}. Set OPENAI_API_KEY.")

    def _said(self, response: httpx.Response) -> str:
        """The server's own words, or those of a page that answers in its place."""
        if _is_page(response):
            return self._quoted(html.unescape(_MARKUP.sub(" ", response.text[:MAX_PAGE])))
        said: object = response.text
        with suppress(ValueError, RecursionError):
            said = _message(response.json())
        return self._quoted(said)

    def _quoted(self, said: object) -> str:
        """After a colon, bounded, without the key that some servers repeat."""
        words = " ".join(str(said or "").split())
        if self._key:
            words = words.replace(self._key, "***")
        return f": {words[:MAX_TOLD]}" if words else ""


# --- reading what comes ----------------------------------------------------------------------------------------


def _checked(base_url: str | None) -> str:
    if not base_url:
        raise ModelError("The engine openai needs to know its server: --base-url http://localhost:8000/v1")
    try:
        parts = urlsplit(base_url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx.URL(base_url)
    except (ValueError, httpx.InvalidURL):
        is_url = False
    if "@" in base_url or "?" in base_url or "#" in base_url:  # it is logged and stored: no key may be in it
        raise ModelError(
            "--base-url holds a user name, a password or a query. Leave them out: "
            "the API key is taken from OPENAI_API_KEY."
        )
    if not is_url:
        raise ModelError(f"--base-url must be like http://localhost:8000/v1, not {base_url}")
    return base_url.rstrip("/")


def _key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ModelError("OPENAI_API_KEY holds characters that cannot be sent. Set it again.")
    return key


def _models(response: httpx.Response) -> dict[str, Mapping[str, object]] | None:
    """By id; None if it is no list of models."""
    try:
        listed = response.json()["data"]
        return {one["id"]: one for one in listed if isinstance(one["id"], str)}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _text(content: object) -> str | None:
    """Of a caption, or of its parts; None if it is something else."""
    if isinstance(content, list):
        texts = [part["text"] for part in content if _is_text(part)]
        return "".join(texts) if len(texts) == len(content) else None
    return content or "" if isinstance(content, str | None) else None


def _reasoning(message: dict[str, Any]) -> str:
    """What some servers tell apart from the content, as a model writes it."""
    told = message.get("reasoning_content") or message.get("reasoning")
    return f"<think>{told}</think>\n" if told and isinstance(told, str) else ""


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _kind(response: httpx.Response) -> str:
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return "an event stream, which was not asked for"
    return "a web page" if _is_page(response) else "an answer that holds no caption"


def _is_page(response: httpx.Response) -> bool:
    """By what it holds: proxies and portals often name its type wrongly."""
    text = response.text[:MAX_PAGE].lstrip("\ufeff \r\n\t").lower()
    return text.startswith("<") and ("<html" in text or "<!doctype html" in text)


def _message(answer: object) -> object:
    """Where servers put it: error.message, error, message or detail."""
    while isinstance(answer, dict):
        answer = next((answer[name] for name in ("error", "message", "detail") if answer.get(name)), "")
    return answer


def _count(usage: object, name: str) -> int:
    n = usage.get(name) if isinstance(usage, dict) else None
    return n if isinstance(n, int) and 0 <= n < 1 << 31 else 0


def _retry_after(told: str | None) -> float:
    """Seconds from a number of them or a date, within bounds; 0 if it tells nothing."""
    if told is None:
        return 0.0
    try:
        seconds = float(told) if told.strip()[:1].isdigit() else _seconds_until(parsedate_to_datetime(told))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT_SEC)


def _seconds_until(date: datetime) -> float:
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
