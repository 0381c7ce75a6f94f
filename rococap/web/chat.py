"""`POST /v1/chat/completions`, as OpenAI's API reference describes it: what is understood, refused and answered."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Final, Literal

from fastapi.sse import format_sse_event
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from rococap.engines import Completion, Message
from rococap.web.calls import (
    ApiError,
    Events,
    Service,
    Serving,
    answers,
    check_model,
    check_text,
    decoded,
    explain,
    timed_out,
    unless_gone,
)
from rococap.web.requests import Asked

MAX_PICTURES: Final = 8
"""Pictures in one conversation."""
MAX_MESSAGES: Final = 64
NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "temperature": (0,),
    "top_p": (1,),
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([], ""),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that would change the answer in a way that is not possible here, and their values that change nothing."""
WITHOUT_EFFECT: Final = frozenset(
    [
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "seed",
        "service_tier",
        "store",
        "user",
    ]
)
"""Fields that are accepted, since they change no answer that is decoded greedily."""
Tokens = tuple[int, Sequence[int]]
"""The position of the first of some new tokens, and the tokens."""
Arrived = asyncio.Queue[Tokens | None]
"""Tokens as they come, and None at the end."""
SERVERS_FAULT: Final = frozenset(["non_finite", "out_of_memory"])
"""Codes of failures that are not the request's fault."""


# --- what is understood ----------------------------------------------------------------------------------------


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# Not a union of both: what is wrong with a part would be reported as its not being a text.
Content = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]


class ChatMessage(BaseModel):
    """One turn of the conversation. `developer` is what OpenAI now calls `system`."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    refusal: None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        """Clients send an answer back with all the fields that answers may have, such as `tool_calls`."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if name in cls.model_fields or value not in (None, [])}


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A conversation, whose next answer is wanted. Fields that are not listed here are in NEUTRAL or WITHOUT_EFFECT."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _check(chat: ChatRequest, service: Service) -> None:
    """Raises ApiError for what is not served here."""
    check_model(chat.model, service)
    for name, value in (chat.model_extra or {}).items():
        if name in WITHOUT_EFFECT or value is None:
            continue
        if name not in NEUTRAL:
            raise ApiError(400, f"{name[:100]} is not a field that this server knows.", param=name[:100])
        if value not in NEUTRAL[name]:
            message = f"{name} cannot be set: each request gets one answer, decoded greedily, as text. Leave it out."
            raise ApiError(400, message, code="unsupported_parameter", param=name)
    most = service.captioner.recipe.max_new_tokens
    if chat.limit is not None and chat.limit > most:
        name = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        raise ApiError(400, f"{name} may be at most {most}, not {chat.limit}.", param=name)


def _read(chat: ChatRequest) -> tuple[list[Message], list[bytes]]:
    """The messages as an engine takes them, and the bytes of their pictures. Raises ApiError."""
    pictures: list[bytes] = []

    def part(given: TextPart | ImagePart, where: str) -> dict[str, str]:
        if isinstance(given, ImagePart):
            pictures.append(decoded(given.image_url.url, where))
            return {"type": "image"}
        check_text(given.text, where)
        return {"type": "text", "text": given.text}

    messages: list[Message] = []
    for number, message in enumerate(chat.messages):
        role = "system" if message.role == "developer" else message.role
        content = [part(one, f"messages[{number}].content[{at}]") for at, one in enumerate(message.content)]
        messages.append({"role": role, "content": content})
    if not 1 <= len(pictures) <= MAX_PICTURES:
        raise ApiError(400, f"A request may have 1 to {MAX_PICTURES} pictures, not {len(pictures)}.", param="messages")
    return messages, pictures


# --- what is answered ------------------------------------------------------------------------------------------


class Said(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The only answer to a request."""

    index: Literal[0] = 0
    message: Said
    logprobs: None = None
    finish_reason: str


class Usage(BaseModel):
    """Tokens read, pictures included, and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """An answer, as OpenAI describes it. `created` is in seconds since 1970."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


CHAT: Final[dict[str, Any]] = {
    "responses": {200: {"model": ChatCompletion, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}
}
"""What FastAPI is told of the route."""


async def chat_completions(request: Request, service: Serving, chat: ChatRequest) -> Response | ChatCompletion:
    """Answers a conversation with pictures."""
    _check(chat, service)
    messages, pictures = await asyncio.to_thread(_read, chat)
    request.state.pictures = len(pictures)
    if chat.stream:
        return await _stream(request, service, chat, messages, pictures)
    asked = service.captioner.ask(pictures, messages, chat.limit)
    (completion,) = await answers(request, [asked], service.timeout)
    request.state.tokens = completion.new_tokens
    _check_answer(completion)
    choice = Choice(message=Said(content=completion.text), finish_reason=completion.finish_reason)
    return ChatCompletion(**_head(service, "chat.completion"), choices=[choice], usage=_usage(completion))


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": service.model}


def _usage(completion: Completion) -> Usage:
    asked, said = completion.prompt_tokens, completion.new_tokens
    return Usage(prompt_tokens=asked, completion_tokens=said, total_tokens=asked + said)


def _check_answer(completion: Completion) -> None:
    """Raises ApiError if there is no answer."""
    if (failure := completion.failure) is not None:
        raise ApiError(500 if failure.code in SERVERS_FAULT else 400, failure.message, code=failure.code)


class _Words:
    """The text of an answer as its tokens come."""

    def __init__(self, service: Service) -> None:
        self._text_of = service.captioner.text_of
        self._ids: list[int] = []
        self._said = ""

    def add(self, start: int, ids: Sequence[int]) -> str:
        """What these tokens, which begin at this position, add to the text. A part of a character adds nothing yet."""
        self._ids += ids[len(self._ids) - start :]  # after running out of memory, a row begins again
        text = self._text_of(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self._said = text[len(self._said) :], text
        return new

    def rest(self, completion: Completion) -> str:
        """What is still missing of the text. Raises ApiError if it has become another than what was said of it."""
        if not completion.text.startswith(self._said):
            raise ApiError(500, "The server ran out of memory, and the answer has changed. Ask again.")
        return completion.text[len(self._said) :]


class _Answer:
    """An answer that is streamed."""

    def __init__(self, service: Service, asked: Asked, arrived: Arrived, deadline: float, *, wants_usage: bool) -> None:
        self._service = service
        self._asked = asked
        self._arrived = arrived
        self._wants_usage = wants_usage
        self._head = _head(service, "chat.completion.chunk") | ({"usage": None} if wants_usage else {})
        self._deadline = deadline

    async def events(self, first: Tokens | None) -> AsyncIterator[bytes]:
        """The events of an answer whose first tokens have come, or None if it was complete before any did."""
        yield self._chunk({"role": "assistant", "content": ""})
        words = _Words(self._service)
        try:
            tokens = first
            while tokens is not None:
                if new := words.add(*tokens):
                    yield self._chunk({"content": new})
                tokens = await asyncio.wait_for(self._arrived.get(), self._deadline - time.monotonic())
            completion = self._asked.answer.result()
            _check_answer(completion)
            if rest := words.rest(completion):
                yield self._chunk({"content": rest})
        except TimeoutError:
            yield error_event(timed_out(self._service.timeout))
        except Exception as error:
            yield error_event(error)
        else:
            yield self._chunk({}, completion.finish_reason)
            if self._wants_usage:
                yield _event(self._head | {"choices": [], "usage": _usage(completion).model_dump()})
            yield format_sse_event(data_str="[DONE]")

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event(self._head | {"choices": [choice]})


async def _stream(
    request: Request, service: Service, chat: ChatRequest, messages: Sequence[Message], pictures: Sequence[bytes]
) -> Response:
    """Answers once the first token has come: errors before it have a status."""
    loop, deadline = asyncio.get_running_loop(), time.monotonic() + service.timeout
    arrived: Arrived = asyncio.Queue()

    def tell(start: int, ids: Sequence[int]) -> None:
        loop.call_soon_threadsafe(arrived.put_nowait, (start, ids))

    asked = service.captioner.ask(pictures, messages, chat.limit, tell)
    asyncio.wrap_future(asked.answer).add_done_callback(lambda done: _ended(done, arrived, request))
    try:
        first = await unless_gone(request, arrived.get(), service.timeout)
        if first is None:
            _check_answer(asked.answer.result())
    except BaseException:
        asked.answer.cancel()
        raise
    wants_usage = chat.stream_options is not None and chat.stream_options.include_usage
    answer = _Answer(service, asked, arrived, deadline, wants_usage=wants_usage)
    stack = AsyncExitStack()
    stack.callback(asked.answer.cancel)
    return Events(answer.events(first), stack)


def _ended(answer: "asyncio.Future[Completion]", arrived: Arrived, request: Request) -> None:
    if answer.cancelled():
        return
    if answer.exception() is None:  # one is raised when the events are made
        request.state.tokens = answer.result().new_tokens
    arrived.put_nowait(None)


def _event(content: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(content))


def error_event(error: Exception) -> bytes:
    """The event for an error after the first token, which OpenAI's client raises."""
    return format_sse_event(data_str=bytes(explain(error).body).decode())
