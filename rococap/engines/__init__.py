"""What an engine is: it pulls prepared pictures from a Source and yields a Completion for each.

An engine knows no database, no data set and no lease. Importing this module imports no torch.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL.Image import Image

from rococap.recipe import RULES, Recipe

EngineName = Literal["transformers", "vllm", "openai"]
Decode = Literal["auto", "continuous", "static"]
DeviceMap = Literal["auto"]


@dataclass(frozen=True, slots=True)
class Options:
    """What a worker needs besides the recipe; it decides speed, never text. `batch_size` None: as measured.

    `base_url` and `served_model` are the server's of the engine `openai`; `batch_size` is then the requests in flight.
    `device_map` "auto" spreads a model that does not fit on one GPU over all.
    """

    engine: EngineName = "transformers"
    base_url: str | None = None
    served_model: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    decode: Decode = "auto"
    device_map: DeviceMap | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What made the captions, as loaded: `auto` and branch names are resolved here.

    `digest` names the exact weights: the hub's commit, or SHA-256 over a local folder's files; `adapter` those of an
    adapter on them.
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
        """What a run pins, so that it never mixes: two workers of a run agree in all of it."""
        pinned = {"engine": self.name, "dtype": self.dtype, "revision": self.revision, "digest": self.digest}
        return pinned | ({"adapter": self.adapter} if self.adapter else {}) | {"rules": RULES}


@dataclass(frozen=True, slots=True)
class Prepared:
    """One picture, ready for the model: `inputs` is the engine's own, `n_tokens` the length of its prompt."""

    job_id: int
    inputs: Any
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one picture has no caption. A transient failure is tried again later, up to the run's max_attempts."""

    code: str
    message: str
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one picture: a caption, or a failure.

    `processing_ms` is the picture's share of the model's time: over all steps, step time divided by the rows active
    in it, so that the column sums to the time spent; `prefill_ms` is its part up to the first token. `latency_ms` is
    the time from taking the picture to its last token.
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
    """The worker's side: pictures that are leased, decoded and prepared."""

    def take(self, most: int, wait: float | None) -> list[Prepared]:
        """What is ready, up to `most`. wait=0 never blocks, None blocks until something is; [] after None: the end."""

    def step(self, rows: int) -> Set[int]:
        """Called after every step: vouches for progress, and names the jobs whose rows to abandon.

        The set is live: an engine that waits for another machine may look into it without vouching for anything.
        `rows` is how many were decoded in it; 0 for a step that reads pictures and prompts.
        """


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    @property
    def batch_size(self) -> int:
        """How many pictures it takes at a time."""

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        """Loaded, and while nothing runs. What runs out of memory with so many lowers it again by itself."""

    def load(self) -> None:
        """Loads the model. Raises ModelError if it cannot be had or is not one that captions pictures."""

    def prepare(self, job_id: int, picture: Image) -> Prepared:
        """CPU only; any thread. Raises PictureError for a picture that the model cannot take."""

    def run(self, source: Source) -> Iterator[Completion]:
        """Exactly one completion per picture taken and not abandoned, as each finishes, until the source ends."""

    def close(self) -> None: ...


LINGER_SEC = 0.2
"""How long a batch that is not full waits for the next picture before it starts."""


def gather(source: Source, most: int) -> list[Prepared]:
    """A static batch: full, or all that came until nothing did for a moment. Empty at the source's end."""
    batch = source.take(most, None)
    while batch and len(batch) < most:
        more = source.take(most - len(batch), LINGER_SEC)
        if not more:
            break
        batch += more
    return batch


def load_engine(recipe: Recipe, options: Options) -> Engine:
    """The engine for a recipe, not loaded yet."""
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
