"""The gallery: pictures with what any runs say about each, filtered, searched, sorted and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from rococap import queue
from rococap.errors import DatabaseError, RococapError
from rococap.flags import FLAGS
from rococap.queue import Run
from rococap.review import VERDICTS
from rococap.scores.concepts import CONCEPTS
from rococap.web import gallery
from rococap.web.asked import MAX_RUNS, USUAL, Asked
from rococap.web.gallery import Page, Picture, Said
from rococap.web.index import KEYS, SearchUnavailable
from rococap.web.marks import Opinion, opinions
from rococap.web.pieces import Piece, pieces
from rococap.web.reader import MaybeReader
from rococap.web.search import Search
from rococap.web.site import Here, Site
from rococap.web.words import Term

SHOWN: Final = 2_000
"""Characters of a text in the gallery. The picture's own page has all of it."""
SORTS: Final = {
    "image": "Order of the data set",
    "length": "Length of the caption",
    "time": "Time of the caption",
    "rouge_l": "ROUGE-L",
    "meteor_nltk": "METEOR",
    "cider_d": "CIDEr-D",
    "concept_f1": "Concept F1",
    "bertscore_f1": "BERTScore F1",
    "disagreement": "Disagreement of runs",
}
"""What pictures can be sorted by, with names for people."""
RANGES: Final = {name: SORTS[name] for name in KEYS if name != "time"}
"""What a range can be given for."""
SCORES: Final = {name: SORTS[name] for name in SORTS if name not in ("image", "length", "time")}
NAMES: Final = {concept.cui: concept.name for concept in CONCEPTS}

router = APIRouter()


@router.get("/pictures")
def page(request: Request, site: Here, reader: MaybeReader, asked: Annotated[Asked, Query()]) -> HTMLResponse:
    """A page of pictures. Without a search index it still shows pictures in the order of the data set."""
    index = search_of(request).begin()
    with site.read() as conn:
        chosen = Chosen.of(conn, asked)
    values: dict[str, Any] = {"asked": asked, "chosen": chosen, "sorts": SORTS, "ranges": RANGES, "flags": FLAGS}
    values |= {"concepts": CONCEPTS, "names": NAMES, "verdicts": VERDICTS, "scores": SCORES, "max_runs": MAX_RUNS}
    values |= {"usual": _USUAL_OF_FORM, "chips": _chips(asked), "reader": reader}
    passed = {"run": [run.name for run in chosen.runs], "split": chosen.split}
    values |= {"passed": asked.string(**passed, after=asked.after, before=asked.before)}
    values |= {"being_filled": gallery.BEING_FILLED, "indexed": index.status, "found": None, "cards": [], "problem": ""}
    if chosen.runs:
        try:
            query = asked.query(chosen.split)
            found = gallery.page(
                site.database, index, chosen.runs, query, after=asked.after, before=asked.before, limit=asked.limit
            )
            values |= {"found": found, "cards": _cards(site, chosen, asked, found, query.terms)}
            if found.why:
                values["indexed"] = replace(index.status, why=found.why)
        except DatabaseError:
            raise
        except SearchUnavailable as error:
            values["indexed"] = replace(index.status, state="off", why=str(error))
        except RococapError as error:
            values["problem"] = str(error)
    return site.page(request, "pictures.html", **values)


_USUAL_OF_FORM: Final = {name: str(value) for name, value in USUAL.items() if isinstance(value, str | int)}


def _chips(asked: Asked) -> list[tuple[str, str, str]]:
    """The filters in use: a name and a value for people, and the address without it."""
    score = RANGES.get(asked.score, asked.score)
    names = {"q": "words", "least": f"{score} from", "most": f"{score} to"}
    found = []
    for name, value in asked.filters.items():
        shown = "" if value is True else NAMES.get(value, str(value))
        found.append((names.get(name, name), shown, asked.link(**{name: USUAL[name]})))
    return found


@router.get("/pictures/index")
def index(request: Request) -> Response:
    """How far the search index is."""
    status = search_of(request).begin().status
    return JSONResponse({"state": status.state, "done": status.done, "total": status.total, "why": status.why})


def search_of(request: Request) -> Search:
    search: Search = request.app.state.search
    return search


@dataclass(frozen=True, slots=True)
class Chosen:
    """The runs and the split to show, and those that there are: `done` captions by run and split."""

    runs: list[Run] = field(default_factory=list)
    split: str = ""
    every_run: list[Run] = field(default_factory=list)
    done: Mapping[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, conn: Connection, asked: Asked) -> "Chosen":
        """Those asked for; else the newest run that has captions, in the split in which it has most.

        Raises RunError if one does not exist, or if the runs are on different data sets.
        """
        every = queue.list_runs(conn)
        done = {(counts.run, counts.split): counts.done for counts in queue.counts(conn)}
        if not every:
            return cls()
        runs = queue.find_runs(conn, asked.run) if asked.run else [_newest(every, done)]
        splits = sorted((split for run, split in done if run == runs[0].name), key=lambda one: -done[runs[0].name, one])
        return cls(runs, asked.split or (splits or [""])[0], every, done)

    @property
    def splits(self) -> list[str]:
        """The splits that the runs have, and the one asked for."""
        names = {run.name for run in self.runs}
        return sorted({split for run, split in self.done if run in names} | {self.split})

    @property
    def comparable(self) -> list[Run]:
        """The runs on the same data set."""
        return [run for run in self.every_run if run.dataset_id == self.runs[0].dataset_id]


def _newest(runs: Sequence[Run], done: Mapping[tuple[str, str], int]) -> Run:
    busy = {name for (name, _), n in done.items() if n}
    return next((run for run in reversed(runs) if run.name in busy), runs[-1])


@dataclass(frozen=True, slots=True)
class Column:
    """What one run says of a picture, in pieces. `is_cut` if the text is longer."""

    said: Said
    text: list[Piece]
    is_cut: bool
    opinion: Opinion | None

    @property
    def scores(self) -> list[tuple[str, float]]:
        return [(label, self.said.scores[name]) for name, label in SCORES.items() if name in self.said.scores]


@dataclass(frozen=True, slots=True)
class Card:
    """A picture as the gallery shows it."""

    picture: Picture
    original: list[Piece]
    is_cut: bool
    columns: list[Column]


def _cards(site: Site, chosen: Chosen, asked: Asked, found: Page, terms: tuple[Term, ...]) -> list[Card]:
    images = [picture.id for picture in found.pictures]
    with site.read() as conn:
        said = [opinions(conn, run, images) for run in chosen.runs]
    compare = asked.compare or ("run" if len(chosen.runs) > 1 else "original")
    cards = []
    for picture in found.pictures:
        opinion_of = [by_image.get(picture.id) for by_image in said]
        original = picture.original[:SHOWN]
        first = picture.said[0].text
        columns = []
        for number, (one, opinion) in enumerate(zip(picture.said, opinion_of, strict=True)):
            reference = {"original": original, "run": first if number else None}.get(compare)
            columns.append(_column(one, opinion, terms, asked, reference, in_full=compare == "run"))
        in_original = terms if asked.where != "caption" else ()
        cards.append(Card(picture, pieces(original, in_original), len(picture.original) > SHOWN, columns))
    return cards


def _column(
    said: Said, opinion: Opinion | None, terms: tuple[Term, ...], asked: Asked, reference: str | None, *, in_full: bool
) -> Column:
    """An edited caption is shown with what the edit has changed: a search still finds what the machine wrote."""
    machine = said.text or ""
    text = machine if opinion is None or opinion.text is None else opinion.text
    if text != machine and asked.compare != "none":
        reference, in_full = machine, True
    before = None if reference is None else reference[:SHOWN]
    in_caption = terms if asked.where != "original" else ()
    shown = pieces(text[:SHOWN], in_caption, before, removed=in_full)
    return Column(said, shown, len(text) > SHOWN, opinion)
