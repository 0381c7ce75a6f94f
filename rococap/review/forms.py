"""What a reader study asks: which text is preferred, or ratings of each text on scales that a TOML file defines."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rococap.errors import RococapError
from rococap.review.records import checked_name

MAX_LEVELS = 20
MAX_QUESTION = 500


@dataclass(frozen=True, slots=True)
class Scale:
    """A question about each text, answered by one of its levels. If `ordered`, these go from one end to the other."""

    name: str
    question: str
    levels: tuple[str, ...]
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Form:
    """The questions of a study. With `preference`, a reader says which text of a picture is best, or that none is."""

    preference: bool = True
    ratings: tuple[Scale, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Form":
        given = json.loads(text)
        scales = [Scale(**{**one, "levels": tuple(one["levels"])}) for one in given.get("ratings", [])]
        return cls(given.get("preference", True), tuple(scales))


@dataclass(frozen=True, slots=True)
class Answers:
    """What a reader says of one picture.

    `preference` is the number of the text that is best, counted from 1 as shown; 0 if none is; None if the form
    does not ask. `ratings` has the index of a level for each text and scale: one mapping per text, in the order shown.
    """

    preference: int | None = None
    ratings: tuple[Mapping[str, int], ...] = ()

    def to_json(self) -> str:
        return json.dumps({"preference": self.preference, "ratings": [dict(one) for one in self.ratings]})

    @classmethod
    def from_json(cls, text: str) -> "Answers":
        given = json.loads(text)
        return cls(given.get("preference"), tuple(given.get("ratings", ())))

    def check(self, form: Form, n_texts: int) -> None:
        """Raises RococapError for answers that are missing, or that the form does not ask for or allow."""
        if form.preference and self.preference not in range(n_texts + 1):
            raise RococapError("Say which text is best, or that none is: nothing was recorded.")
        if not form.preference and self.preference is not None:
            raise RococapError("This study asks for no preference: nothing was recorded.")
        if len(self.ratings) != (n_texts if form.ratings else 0):
            raise RococapError(f"Rate each of the {n_texts} texts: nothing was recorded.")
        for rated in self.ratings:
            for scale in form.ratings:
                if rated.get(scale.name) not in range(len(scale.levels)):
                    raise RococapError(f"Answer {scale.name!r} for each text: nothing was recorded.")
            if unknown := sorted(rated.keys() - {scale.name for scale in form.ratings}):
                raise RococapError(f"This study does not ask for {unknown[0]!r}: nothing was recorded.")


def read_form(path: Path) -> Form:
    """Reads a form from a TOML file. Raises RococapError for a file that is not one."""
    try:
        return form_of(tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, RococapError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise RococapError(f"{path} is not a form for a study ({what}). For an example, see docs/review.md.") from error


def form_of(given: Mapping[str, Any]) -> Form:
    """The form in the content of a TOML file. Raises ValueError, KeyError or RococapError for what is not one."""
    _refuse_others(given, ("preference", "rating"))
    ratings = tuple(_scale(table) for table in given.get("rating", []))
    preference = given.get("preference", not ratings)
    if not isinstance(preference, bool):
        raise ValueError("preference must be true or false")
    if not preference and not ratings:
        raise ValueError("it asks for nothing")
    if len({scale.name for scale in ratings}) < len(ratings):
        raise ValueError("two ratings have the same name")
    return Form(preference, ratings)


def _scale(table: Mapping[str, Any]) -> Scale:
    _refuse_others(table, ("name", "question", "levels", "ordered"))
    levels, ordered, question = table["levels"], table.get("ordered", True), table["question"]
    if not isinstance(levels, list) or not 2 <= len(levels) <= MAX_LEVELS or len(set(levels)) < len(levels):
        raise ValueError(f"levels must be a list of 2 to {MAX_LEVELS} different texts")
    if not isinstance(ordered, bool):
        raise ValueError("ordered must be true or false")
    if not isinstance(question, str) or not 1 <= len(question) <= MAX_QUESTION:
        raise ValueError(f"question must have 1 to {MAX_QUESTION} characters")
    named = tuple(checked_name(level, "level") for level in levels)
    return Scale(checked_name(table["name"], "rating"), question, named, ordered)


def _refuse_others(table: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := sorted(table.keys() - set(known)):
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(known)}")
