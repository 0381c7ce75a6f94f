"""The data set card (README.md) of published captions. Renders a template; reads neither captions nor the database."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rococap import __version__
from rococap.data import HUB_ID, parse_name
from rococap.files import read_json
from rococap.queue import Run


@dataclass(slots=True)
class Written:
    """What a published folder holds of one split.

    `missing` counts the jobs that are not done. `without_picture` maps image_id to the reason for images that were
    captioned but left out, because their pictures can no longer be read, and `without_text` for those whose captions
    the format cannot hold.
    """

    split: str
    captions: int
    missing: int
    flags: dict[str, int]
    without_picture: dict[str, str] = field(default_factory=dict)
    without_text: dict[str, str] = field(default_factory=dict)


CARD = Path(__file__).with_name("card.md.jinja")
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
_RESOLVED_KEYS = ("engine", "dtype", "revision", "digest", "adapter", "rules", "accepted_rules")


def card(run: Run, written: Sequence[Written], manifest: dict[str, Any]) -> str:
    """The text of README.md: what made the captions, and what they must not be used for.

    `manifest` is the manifest of the folder, which the card quotes as JSON.
    """
    from jinja2 import Environment, StrictUndefined

    # The output is Markdown: HTML escaping would corrupt it, and the filters below quote names and prompts safely.
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {"fenced": _fenced, "code": _code, "quoted": quoted}
    rows = sum(entry.captions for entry in written)
    source, _ = parse_name(run.dataset)
    return environment.from_string(CARD.read_text(encoding="utf-8")).render(
        title=f"Captions of radiology pictures by {Path(run.recipe.model).name}",
        source=source if HUB_ID.fullmatch(source) else None,
        size=next((size for limit, size in _SIZES.items() if rows < limit), "n>10M"),
        run=run,
        recipe=run.recipe,
        resolved=dict.fromkeys(_RESOLVED_KEYS, "") | (run.resolved or {}),
        written=written,
        is_qwen2_vl=_is_qwen2_vl(run.recipe.model),
        version=__version__,
        captions=manifest.get("captions", "machine"),
        manifest=json.dumps(manifest, indent=2, ensure_ascii=False),
    )


def _fenced(text: str, language: str = "") -> str:
    fence = "`" * max(3, _longest_ticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    """An inline code span. A text that begins or ends with a backtick is padded with one space on each side, which
    Markdown strips again, so that the backtick does not run into the fence.
    """
    fence = "`" * (_longest_ticks(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def quoted(text: str) -> str:
    """The text as a double-quoted YAML scalar.

    Characters beyond ASCII are not escaped: JSON escapes an emoji as a surrogate pair, which YAML reads as two
    characters.
    """
    return json.dumps(text, ensure_ascii=False)


def _is_qwen2_vl(model: str) -> bool:
    if "qwen2-vl" in model.lower():
        return True
    config = Path(model) / "config.json"
    return config.is_file() and (read_json(config) or {}).get("model_type") == "qwen2_vl"
