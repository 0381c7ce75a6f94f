"""The engine interface: an engine takes prepared requests from a Source and yields a Completion for each.

An engine knows no database, no data set and no lease. Importing this module does not import torch.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from PIL.Image import Image

from rococap.errors import PictureError
from rococap.recipe import Recipe

EngineName = Literal["transformers", "vllm", "openai"]
Decode = Literal["auto", "continuous", "static"]
DeviceMap = Literal["auto"]
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What an engine needs besides the recipe; it affects speed, never the text.

    `base_url` and `served_model` are for the engine `openai`, and name its server and the model there. `batch_size` is
    in pictures, or in requests in flight for `openai`; None lets the engine choose. `device_map` "auto" spreads a model
    that does not fit on one GPU over all GPUs. `graphs` lets the engine `transformers` use CUDA graphs.
    """

    engine: EngineName = "transformers"
    base_url: str | None = None
    served_model: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    decode: Decode = "auto"
    device_map: DeviceMap | None = None
    graphs: bool = True


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What produces the captions, as loaded: `auto` and branch names are resolved.

    `digest` identifies the exact weights: the hub's commit, or SHA-256, in hex, over a local folder's files; for the
    engine `openai`, what the server reports about its model. `adapter` is the digest of an adapter applied to them.
    """

    name: str
    versions: dict[str, str]
    model: str
    revision: str
    dtype: str
    device: str
    digest: str
    adapter: str = ""

    def resolved(self) -> dict[str, Any]:
        """The state of the model, which a run pins so that it never mixes two: all its workers agree on all of it."""
        state = {"engine": self.name, "dtype": self.dtype, "revision": self.revision, "digest": self.digest}
        return state | ({"adapter": self.adapter} if self.adapter else {})


@dataclass(frozen=True, slots=True)
class Request:
    """What a model is asked: to caption one picture, or to answer messages with pictures.

    `pictures` are RGB, in the order of their places in the messages. `messages` have the format of transformers' chat
    templates: each is {"role": …, "content": […]}, with the parts {"type": "image"} and {"type": "text", "text": …}.
    None means the recipe's prompt about one picture, which is what captioning asks. `max_new_tokens` limits the answer;
    None means the recipe's limit.
    Raises ValueError for messages of another form, for a number of pictures that differs from the number of places,
    and for a limit below 1.
    """

    pictures: Sequence[Image]
    messages: Sequence[Message] | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        n_places = 1 if self.messages is None else _n_places(self.messages)
        if n_places != len(self.pictures) or not self.pictures:
            raise ValueError(f"pictures: there are {len(self.pictures)}, and the messages have places for {n_places}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")

    def limit(self, recipe: Recipe) -> int:
        """Returns the largest number of tokens in the answer.

        Raises PictureError if the request asks for more than the recipe's limit, for which buffers are sized.
        """
        if self.max_new_tokens is None:
            return recipe.max_new_tokens
        if self.max_new_tokens > recipe.max_new_tokens:
            raise PictureError(
                "unprocessable",
                f"max_new_tokens must be at most {recipe.max_new_tokens}, as in the recipe, not {self.max_new_tokens}.",
            )
        return self.max_new_tokens


def _n_places(messages: Sequence[Message]) -> int:
    """How many pictures the messages have places for. Raises ValueError if their form is wrong."""
    n = 0
    for number, message in enumerate(messages):
        match message:
            case {"role": str(), "content": [*parts]}:
                n += sum(_is_place(part, number) for part in parts)
            case _:
                raise ValueError(f"messages[{number}] must have a role and, as its content, a list of parts")
    return n


def _is_place(part: object, number: int) -> bool:
    """Whether a part is a picture's place, in the message of this number. Raises ValueError if it is no text either."""
    match part:
        case {"type": "image"}:
            return True
        case {"type": "text", "text": str(text)}:
            if text != text.encode(errors="replace").decode():
                raise ValueError(f"messages[{number}] is not valid Unicode")
            return False
    raise ValueError(f"messages[{number}] has a part that is neither an image nor a text")


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request, ready for the model. `inputs` is private to the engine; `n_tokens` is the prompt's length."""

    job_id: int
    inputs: Any
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one picture has no caption. A transient failure is retried later, up to the run's max_attempts."""

    code: str
    message: str
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """The result for one picture: a caption, or a failure.

    `processing_ms` is the picture's share of the model's time: the sum, over all steps, of the step's time divided by
    the rows active in it, so that the column adds up to the time spent. `prefill_ms` is its part up to the first token.
    `latency_ms` is the time from taking the picture to its last token. `batch_size` is the largest number of rows that
    shared a step with it.
    """

    job_id: int
    text: str = ""
    flags: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    new_tokens: int = 0
    processing_ms: float = 0.0
    prefill_ms: float = 0.0
    latency_ms: float = 0.0
    batch_size: int = 1
    failure: Failure | None = None


class Source(Protocol):
    """The worker's side of the interface: it supplies pictures that are leased, decoded and prepared."""

    def take(self, limit: int, wait: float | None) -> list[Prepared]:
        """Returns up to `limit` pictures that are ready, after waiting at most `wait` seconds for the first.

        With 0 it never blocks. With None it blocks until a picture is ready; [] then means that there are no more.
        """

    def step(self, rows: int) -> Set[int]:
        """Reports progress after every step, and returns the ids of the jobs whose rows to abandon.

        `rows` is how many rows the step decoded; 0 for a step that reads pictures and prompts. The set is live: an
        engine that waits for a server may look at it without reporting progress.
        """


@runtime_checkable
class Streaming(Source, Protocol):
    """A source that also wants the tokens of each answer as they come. The engine `openai` does not stream."""

    def tokens(self, job_id: int, start: int, ids: Sequence[int]) -> None:
        """Gets a row's new tokens after a step: those at the positions `start`, `start` + 1, … of its answer.

        Called on the thread of `run`, before `step` and before the row's completion. The token that ends the answer is
        not among them, so that all `ids`, decoded without special tokens, are the completion's text. After running out
        of memory a row begins again at 0: whoever passes tokens on skips the positions that it has passed on before.
        They hold the same tokens in float32; in half precision, or in fewer pixels, they may differ. The completion is
        what counts, also if it is a failure.
        """


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    @property
    def batch_size(self) -> int:
        """How many pictures the engine takes at a time."""

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        """May be set after `load`, while nothing runs. The engine lowers it if it runs out of memory."""

    def load(self) -> None:
        """Loads the model. Raises ModelError if that fails, or if the model does not caption pictures."""

    def prepare(self, job_id: int, request: Request) -> Prepared:
        """Prepares a request on the CPU, in any thread. Raises PictureError if the model cannot take it."""

    def run(self, source: Source) -> Iterator[Completion]:
        """Yields exactly one completion per request taken and not abandoned, as each finishes, until the source ends.

        Tells a Streaming source the tokens meanwhile. Raises ModelError if the engine can caption no further picture.
        """

    def close(self) -> None:
        """Releases the model and its memory, or the connections to its server."""


@runtime_checkable
class Detokenizing(Protocol):
    """An engine that tells a Streaming source tokens, and anybody what they say. All but `openai` are."""

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, decoded without special tokens. May be called in any thread."""


LINGER_SEC = 0.2
"""How long an incomplete batch waits for another picture before it starts."""


def gather(source: Source, limit: int) -> list[Prepared]:
    """Collects a batch of `limit` pictures, or fewer if none comes for LINGER_SEC. Empty when the source has ended."""
    batch = source.take(limit, None)
    while batch and len(batch) < limit:
        more = source.take(limit - len(batch), LINGER_SEC)
        if not more:
            break
        batch += more
    return batch


def load_engine(recipe: Recipe, options: Options) -> Engine:
    """Returns the engine for a recipe, not loaded yet."""
    match options.engine:
        case "transformers":
            from rococap.engines.hf import TransformersEngine

            return TransformersEngine(recipe, options)
        case "vllm":
            from rococap.engines.vllm import VLLMEngine

            return VLLMEngine(recipe, options)
        case "openai":
            from rococap.engines.openai import OpenAIEngine

            return OpenAIEngine(recipe, options)
