"""What the address of a gallery asks for, and the addresses of other pages of it."""

from typing import Annotated, Any, Final, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, Field, FiniteFloat, StringConstraints, model_validator

from rococap.web.documents import Where
from rococap.web.gallery import IMAGE, Query
from rococap.web.marks import EDITED_BY_HAND, REVIEWED

PLAIN: Final = r"^[^\x00]*$"
"""What may go into SQL: PostgreSQL has no texts with NUL."""
MAX_RUNS: Final = 6
"""Runs side by side."""

Name = Annotated[str, StringConstraints(max_length=200, pattern=PLAIN)]
Words = Annotated[str, StringConstraints(max_length=1_000, pattern=PLAIN)]
Choice = Literal["", "yes", "no"]


class Asked(BaseModel):
    """The query string of `/pictures`. Every part may be left out or empty.

    `run` names the runs to show, `reviewed` and `edited` ask for captions that were or were not, `compare` says from
    which text the marked words differ. The page begins after the position `after`, or ends before `before`.
    """

    run: Annotated[list[Name], Field(max_length=MAX_RUNS)] = []
    split: Name = ""
    q: Words = ""
    where: Where = "any"
    modality: Name = ""
    concept: Name = ""
    flag: Name = ""
    code: Name = ""
    failed: bool = False
    score: Name = "rouge_l"
    least: FiniteFloat | None = None
    most: FiniteFloat | None = None
    reviewed: Choice = ""
    edited: Choice = ""
    sort: Name = IMAGE
    order: Literal["up", "down"] = "up"
    compare: Literal["", "original", "run", "none"] = ""
    after: Name = ""
    before: Name = ""
    limit: Annotated[int, Field(ge=1, le=100)] = 24

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        """Forms send every field, the empty ones as well."""
        return {name: value for name, value in given.items() if value not in ("", [""])}

    @property
    def filters(self) -> dict[str, Any]:
        """The fields by which pictures are left out, with their values."""
        changed = self.model_dump(exclude_defaults=True)
        return {name: changed[name] for name in FILTERS if name in changed}

    @property
    def everything(self) -> str:
        """The address of all pictures of the same runs and split."""
        return self.link(**{name: USUAL[name] for name in FILTERS}, sort=IMAGE, order="up")

    def query(self, split: str) -> Query:
        """What to ask the gallery for. Raises QueryError for a score or an order that does not exist."""
        marks = {REVIEWED: self.reviewed, EDITED_BY_HAND: self.edited}
        has_range = self.least is not None or self.most is not None
        return Query(
            split=split,
            words=self.q.strip(),
            where=self.where,
            modality=self.modality,
            concept=self.concept,
            flag=self.flag,
            code=self.code,
            failed=self.failed,
            marks={name: choice == "yes" for name, choice in marks.items() if choice},
            score=self.score if has_range else "",
            least=self.least,
            most=self.most,
            sort=self.sort,
            descending=self.order == "down",
        )

    def string(self, **changes: Any) -> str:
        """The query string that asks for the same pictures, from the first page on, apart from these changes."""
        asked = self.model_copy(update={"after": "", "before": "", **changes})
        given = asked.model_dump(exclude_defaults=True)
        return urlencode({name: 1 if value is True else value for name, value in given.items()}, doseq=True)

    def link(self, **changes: Any) -> str:
        """The address of the gallery that asks for this."""
        string = self.string(**changes)
        return f"/pictures?{string}" if string else "/pictures"


FILTERS: Final = ("q", "modality", "concept", "flag", "reviewed", "edited", "least", "most", "failed", "code")
USUAL: Final = Asked().model_dump()
"""The value of each field that an address does not have."""
