"""The recipe: everything a user chooses that determines a caption's text.

A run has one recipe, and a worker that would caption differently is refused. Knows no model and no database.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
DEFAULT_PROMPT = "Describe this medical image in detail."
DTYPES = ("auto", "bfloat16", "float16", "float32")

LOAD_IN = ("8bit", "4bit")
OMITTED_AT_DEFAULT = ("trust_remote_code", "load_in", "adapter_base", "frame")
"""Fields added after the first release: left out of the JSON while at their defaults, so that the hashes of older runs
stay valid."""
RULES = 2
"""Version of the rules for opening pictures, quantising weights and ending captions, incremented whenever texts change
under an unchanged recipe. A run pins the version it was started under (`Recipe.rules`); a run that pinned none was
started under version 1."""
QUANTISED_RULES = 3
"""The version for quantised weights: as version 2, but only the layers of the language model are quantised."""

_PLACEHOLDER = re.compile(r"\{\s*(caption|original_caption|image_id|split|cui)\s*\}")

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LoadIn = Literal["8bit", "4bit"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Model, prompt, decoding settings and pixel bounds of a run.

    `min_pixels` and `max_pixels` are areas in pixels; one visual token of Qwen2-VL covers 28 x 28 = 784 of them.
    Every decoding field has a value here, because a checkpoint's own generation_config would fill in a missing one.
    Decoding is greedy: the fields that would say otherwise (`do_sample`, `num_beams` …) are constants, which are part
    of the JSON, the hash and every manifest.
    `adapter` is the folder or hub id of a PEFT adapter; `adapter_base` "any" accepts one that was trained on a base
    model of another name. `load_in` quantises the weights with bitsandbytes. `frame` selects which frame of a
    multi-frame picture file is captioned, counted from 1.
    Raises ValueError, naming the field, for values that no model could use.
    """

    model: str = DEFAULT_MODEL
    revision: str = "main"
    adapter: str | None = None
    prompt: str = DEFAULT_PROMPT
    max_new_tokens: int = 256
    min_pixels: int = 3_136
    max_pixels: int = 1_003_520
    dtype: Dtype = "auto"
    do_sample: bool = field(default=False, init=False)
    num_beams: int = field(default=1, init=False)
    repetition_penalty: float = 1.0
    temperature: float | None = field(default=None, init=False)
    top_p: float | None = field(default=None, init=False)
    top_k: int | None = field(default=None, init=False)
    trust_remote_code: bool = False
    load_in: LoadIn | None = None
    adapter_base: Literal["any"] | None = None
    frame: int = 1

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("prompt is empty")
        if self.prompt != self.prompt.encode(errors="replace").decode():
            raise ValueError("prompt is not valid Unicode")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels ({self.min_pixels}) must be positive and at most max_pixels ({self.max_pixels})"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype}")
        if self.load_in not in (None, *LOAD_IN):
            raise ValueError(f"load_in must be one of {', '.join(LOAD_IN)}, not {self.load_in}")
        if self.adapter_base not in (None, "any"):
            raise ValueError(f"adapter_base must be any, not {self.adapter_base}")
        if self.frame < 1:
            raise ValueError(f"frame must be at least 1, not {self.frame}")

    def to_json(self) -> str:
        """The recipe as JSON with sorted keys, so that equal recipes give equal text."""
        defaults = {field.name: field.default for field in fields(self)}
        stated = {
            name: value
            for name, value in asdict(self).items()
            if name not in OMITTED_AT_DEFAULT or value != defaults[name]
        }
        return json.dumps(stated, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        for name, constant in GREEDY.items():
            if (value := values.pop(name, constant)) != constant:
                raise ValueError(f"{name} must be {constant}, not {value}: captions are decoded greedily")
        return cls(**values)

    @property
    def hash(self) -> str:
        """SHA-256 of `to_json()`, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def rules(self) -> int:
        """The version of the rules that a run with this recipe is started under."""
        return RULES if self.load_in is None else QUANTISED_RULES

    def differences(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """The fields in which the two recipes differ: name -> (this one's value, the other's value)."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return {name: (mine, theirs) for name, mine, theirs in pairs if mine != theirs}


GREEDY = {constant.name: constant.default for constant in fields(Recipe) if not constant.init}
"""The fields of a recipe that nobody chooses."""


def refuse_placeholders(prompt: str) -> None:
    """Raises ValueError for a prompt with a placeholder for a column, such as {caption}; other braces are plain text.

    Called when a run is registered rather than by Recipe: otherwise a single stored prompt would keep a whole older
    database from opening.
    """
    if found := _PLACEHOLDER.search(prompt):
        name = found[1]
        if name in ("caption", "original_caption"):
            raise ValueError(f"prompt contains {{{name}}}, which would give the model the answer. Remove it.")
        raise ValueError(
            f"prompt contains {{{name}}}, but every picture gets the same prompt. "
            "Remove it, or write it without braces."
        )
