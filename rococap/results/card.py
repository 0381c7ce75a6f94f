"""The card (README.md) of a data set of captions."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rococap import __version__
from rococap.data import HUB_ID, parse_name
from rococap.files import read_json
from rococap.queue import Run

if TYPE_CHECKING:
    pass


@dataclass(slots=True)
class Written:
    """What a folder holds of a split. `missing` jobs are not done; `without_picture` were captioned and are left out,
    since their pictures can no longer be read: image_id -> why.
    """

    split: str
    captions: int
    missing: int
    flags: dict[str, int]
    without_picture: dict[str, str] = field(default_factory=dict)


CARD = Path(__file__).with_name("card.md.jinja")
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


_OF_MODEL = ("engine", "dtype", "revision", "digest", "adapter", "rules", "accepted_rules")


def card(run: Run, written: Sequence[Written], manifest: dict[str, Any]) -> str:
    """README.md: what made the captions, and what they are not for."""
    from jinja2 import Environment, StrictUndefined

    # Markdown with our own texts, names and a prompt: there is nothing to escape but fences.
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {"fenced": _fenced, "code": _code, "quoted": quoted}
    rows = sum(one.captions for one in written)
    source, _ = parse_name(run.dataset)
    return environment.from_string(CARD.read_text(encoding="utf-8")).render(
        title=f"Captions of radiology pictures by {Path(run.recipe.model).name}",
        source=source if HUB_ID.fullmatch(source) else None,
        size=next((size for most, size in _SIZES.items() if rows < most), "n>10M"),
        run=run,
        recipe=run.recipe,
        resolved=dict.fromkeys(_OF_MODEL, "") | (run.resolved or {}),
        written=written,
        is_qwen2_vl=_is_qwen2_vl(run.recipe.model),
        version=__version__,
        manifest=json.dumps(manifest, indent=2, ensure_ascii=False),
    )


def _fenced(text: str, language: str = "") -> str:
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    """Within a line. Markdown takes one space away at either end, which keeps a backtick there from the fence."""
    fence = "`" * (_longest_ticks(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def quoted(text: str) -> str:
    """For YAML, which reads JSON's escapes of an emoji as two characters: so it stays as it is."""
    return json.dumps(text, ensure_ascii=False)


def _is_qwen2_vl(model: str) -> bool:
    if "qwen2-vl" in model.lower():
        return True
    config = Path(model) / "config.json"
    return config.is_file() and (read_json(config) or {}).get("model_type") == "qwen2_vl"
