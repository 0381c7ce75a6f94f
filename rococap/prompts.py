"""Named prompts: the presets of the package and those of a user's own file. Their text is used verbatim."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rococap.errors import RococapError
from rococap.recipe import Recipe, refuse_placeholders

OURS = Path(__file__).parent / "prompts.toml"
KEYS = ("prompt", "about")


@dataclass(frozen=True, slots=True)
class Preset:
    """A named prompt; `about` describes it in one line."""

    name: str
    prompt: str
    about: str = ""


def presets(extra: Path | None = None) -> dict[str, Preset]:
    """The package's presets by name, followed by those of a TOML file, which replace presets of the same name.

    Raises RococapError for a file that cannot be read or contains anything but presets.
    """
    return _read(OURS) | (_read(extra) if extra else {})


def find(name: str, extra: Path | None = None) -> Preset:
    """The preset called `name`. Raises RococapError, listing the presets that exist, if there is none."""
    known = presets(extra)
    if name not in known:
        raise RococapError(f"There is no preset {name!r}. Presets: {', '.join(known)}. See: rococap prompts")
    return known[name]


def read_prompt(path: Path) -> str:
    """The prompt in a text file, without its final newline. Raises RococapError if it is not UTF-8 or is empty."""
    text = _text(path).removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise RococapError(f"{path} contains no prompt: write one into it.")
    return text


def _read(path: Path) -> dict[str, Preset]:
    try:
        tables = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise RococapError(
            f'{path} is not TOML ({error}). Write each preset as [name], and below it: prompt = "…"'
        ) from error
    return {name: _preset(path, name, table) for name, table in tables.items()}


def _text(path: Path) -> str:
    """The file's text with its newlines unchanged and without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RococapError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise RococapError(f"{path} cannot be read ({error.strerror or error}). Name another file.") from error


def _preset(path: Path, name: str, table: Any) -> Preset:
    where = f"{path}: preset {name!r}"
    if not isinstance(table, dict):
        raise RococapError(f'{path}: {name!r} is not a preset. Write it as [{name}], and below it: prompt = "…"')
    if unknown := sorted(table.keys() - set(KEYS)):
        raise RococapError(f"{where} has unknown keys ({', '.join(unknown)}). Keep only {' and '.join(KEYS)}.")
    if "prompt" not in table:
        raise RococapError(f'{where} has no prompt. Write below it: prompt = "…"')
    if not_text := [key for key in KEYS if not isinstance(table.get(key, ""), str)]:
        raise RococapError(f"{where}: {not_text[0]} is not text. Put it in quotes.")
    if "\n" in table.get("about", ""):
        raise RococapError(f"{where}: about spans several lines. Make it one line.")
    try:
        Recipe(prompt=table["prompt"])
        refuse_placeholders(table["prompt"])
    except ValueError as error:
        raise RococapError(f"{where}: {error}") from error
    return Preset(name, **table)
