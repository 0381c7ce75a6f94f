"""Chooses the pictures that a report shows, and makes a card for each: a thumbnail, the original, each run's caption.

Knows nothing of HTML.
"""

import random
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from sqlalchemy import Engine as Database

from rococap.data import PictureReader, Place, cached, parse_name
from rococap.data.images import open_picture
from rococap.db import execute, transaction
from rococap.errors import DatasetError, PictureError
from rococap.progress import Progress
from rococap.queue import PLACE, Failed, Run, place_of, root_here
from rococap.scores import concepts
from rococap.scores.disagreement import between, weight
from rococap.scores.evaluate import SEED, Evaluation, Scored
from rococap.scores.explained import CARD_SCORES, explained
from rococap.scores.shown import folders_of, rounded, short_within

EDGE: Final = 256
"""Longest side of a thumbnail, in pixels."""
QUALITIES: Final = (75, 60, 45, 30, 15, 5)
"""JPEG qualities, tried in this order until a thumbnail fits into MAX_BYTES."""
MAX_BYTES: Final = 24_000
"""Size limit of a thumbnail. Only noise exceeds it at the first quality; radiology pictures do not."""
MAX_CHARACTERS: Final = 2_000
"""Longer captions are cut on a card."""
SECTIONS: Final = ("best", "worst", "random", "flagged", "failed")
_ROWS_AT_ONCE: Final = 500


# --- Which pictures --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gallery:
    """The chosen pictures: `tags` maps image_id to the sections that it is shown in, `of` each section to the number of
    pictures that belong to it, shown or not.
    """

    tags: dict[str, list[str]]
    of: dict[str, int]


def choose(evaluated: Evaluation, failures: Mapping[str, Sequence[Failed]], limit: int) -> Gallery:
    """Chooses at most `limit` pictures: a fifth at random, up to a fifth for each other section, the rest at random.

    Best and worst are by CIDEr-D of the first run, ties by image id; each takes at most a quarter of that run's
    captions, so that they never overlap. The random sample is drawn independently of the other sections.
    """
    candidates = _candidates(evaluated, failures)
    fifth = max(1, limit // len(SECTIONS))
    n_ranked = len(candidates["best"])
    n_extreme = min(fifth, max(1, n_ranked // 4) if n_ranked > 1 else 0)
    sections = {
        "random": candidates["random"][:fifth],
        "failed": candidates["failed"][:fifth],
        "flagged": candidates["flagged"][:fifth],
        "worst": candidates["worst"][:n_extreme],
        "best": candidates["best"][:n_extreme],
    }
    chosen = list(dict.fromkeys(chain.from_iterable(sections.values())))[:limit]
    sections["random"] = _fitting(candidates["random"], chosen, limit)
    # A picture chosen for another section may also be flagged or have failed.
    sections |= {name: candidates[name] for name in ("flagged", "failed")}
    members = {section: set(sections[section]) for section in SECTIONS}
    tags = {
        image_id: [section for section in SECTIONS if image_id in members[section]]
        for image_id in dict.fromkeys([*chosen, *sections["random"]])
    }
    return Gallery(tags, {section: len(candidates[section]) for section in SECTIONS})


def _fitting(drawn: Sequence[str], chosen: Sequence[str], limit: int) -> Sequence[str]:
    """The longest prefix of those drawn that fits beside the chosen ones. None is skipped, so that the sample stays
    unbiased.
    """
    shown = set(chosen)
    for n, image_id in enumerate(drawn):
        if image_id not in shown and len(shown) == limit:
            return drawn[:n]
        shown.add(image_id)
    return drawn


def _candidates(evaluated: Evaluation, failures: Mapping[str, Sequence[Failed]]) -> dict[str, Sequence[str]]:
    """All pictures that belong to each section, in the order in which they are to be chosen."""
    first = evaluated.scored[0]
    # CIDEr-D is undefined for a single caption, and there is no score at all without originals.
    values: Iterable[float] = next((first.values[name] for name in ("cider_d", "rouge_l") if name in first.values), [])
    scores = [(value, pair.image_id) for value, pair in zip(values, first.pairs, strict=False) if not np.isnan(value)]
    ranked = [image_id for _, image_id in sorted(scores, key=lambda one: (-one[0], one[1]))]
    equal = {pair.image_id for pair in first.pairs if pair.text == pair.reference}
    everything = list(dict.fromkeys(pair.image_id for one in evaluated.scored for pair in one.pairs))
    return {
        "best": ranked,
        "worst": [image_id for image_id in ranked[::-1] if image_id not in equal],
        "random": random.Random(SEED).sample(everything, len(everything)),
        "flagged": list(dict.fromkeys(pair.image_id for one in evaluated.scored for pair in one.pairs if pair.flags)),
        "failed": list(dict.fromkeys(one.image_id for several in failures.values() for one in several)),
    }


@dataclass(frozen=True, slots=True)
class Row:
    """A picture of the data set, with its original caption and the name of its modality."""

    place: Place
    original: str
    modality: str


def rows_of(database: Database, run: Run, split: str, image_ids: Sequence[str]) -> list[Row]:
    """The pictures with these ids, in data set order."""
    found: list[tuple[int, Row]] = []
    for start in range(0, len(image_ids), _ROWS_AT_ONCE):
        batch = image_ids[start : start + _ROWS_AT_ONCE]
        sql = (
            f"SELECT {PLACE}, i.id, i.caption, i.cui FROM images i "
            "JOIN shards s ON s.id = i.shard_id WHERE i.dataset_id = ? AND i.split = ? "
            f"AND i.image_id IN ({', '.join('?' * len(batch))})"
        )
        with transaction(database) as conn:
            rows = execute(conn, sql, (run.dataset_id, split, *batch)).fetchall()
        found += [
            (id, Row(place_of(place, run.columns), caption, concepts.modality(concepts.parse(cui))))
            for *place, id, caption, cui in rows
        ]
    return [row for _, row in sorted(found, key=lambda one: one[0])]


# --- Cards -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Said:
    """What a run has for a picture: a caption with its scores, or in `why` the reason why there is none.

    `number` is the index of the run, and `scores` are titles with formatted values.
    """

    run: str
    number: int
    text: str | None = None
    is_equal: bool = False
    scores: list[tuple[str, str]] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    why: str = ""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture as a data URI, with its size in pixels; or in `why` the reason why there is none."""

    source: str = ""
    width: int = 0
    height: int = 0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One picture of the report. `number` counts in data set order; `mean` is the mean ROUGE-L of the runs;
    `disagreement` is larger the more facts the runs state differently, opposite ones before all others.
    """

    number: int
    image_id: str
    modality: str
    original: str
    tags: list[str]
    said: list[Said]
    mean: float | None
    disagreement: float | None
    thumbnail: Thumbnail


class Captions:
    """Looks up what each run has for an image: its caption, or its failure."""

    def __init__(self, evaluated: Evaluation, failures: Mapping[str, Sequence[Failed]]) -> None:
        self._scored = evaluated.scored
        self._at = [{pair.image_id: at for at, pair in enumerate(one.pairs)} for one in evaluated.scored]
        self._failed = [{one.image_id: one for one in failures[scored.run.name]} for scored in evaluated.scored]

    def of(self, image_id: str) -> list[Said]:
        return [self._said(number, one, image_id) for number, one in enumerate(self._scored)]

    def mean(self, image_id: str) -> float | None:
        places = [(one, at[image_id]) for one, at in zip(self._scored, self._at, strict=True) if image_id in at]
        values = [float(one.values["rouge_l"][at]) for one, at in places if "rouge_l" in one.values]
        known = [value for value in values if not np.isnan(value)]
        return sum(known) / len(known) if known else None

    def disagreement(self, image_id: str) -> float | None:
        """None if fewer than two runs have a caption in English."""
        places = [(one, at[image_id]) for one, at in zip(self._scored, self._at, strict=True) if image_id in at]
        differences = between({one.run.name: one.pairs[at].text for one, at in places})
        return None if differences is None else weight(differences)

    def _said(self, number: int, scored: Scored, image_id: str) -> Said:
        at = self._at[number].get(image_id)
        if at is not None:
            pair = scored.pairs[at]
            names = [name for name in CARD_SCORES if name in scored.values]
            scores = [(explained(name).title, rounded(scored.values[name][at], 2)) for name in names]
            flags = [flag for flag in pair.flags.split(",") if flag]
            is_equal = bool(pair.reference) and pair.text == pair.reference
            return Said(scored.run.name, number, _cut(pair.text), is_equal, scores, flags)
        if failed := self._failed[number].get(image_id):
            return Said(
                scored.run.name,
                number,
                why=f"Failed: {failed.code}. {short_within(failed.message, folders_of(scored.run))}",
            )
        return Said(scored.run.name, number, why="Not captioned yet.")


def _cut(text: str) -> str:
    left = len(text) - MAX_CHARACTERS
    return text if left <= 0 else f"{text[:MAX_CHARACTERS]} … ({left} more characters)"


def cards_of(
    gallery: Gallery, captions: Captions, rows: Sequence[Row], run: Run, unreadable: list[str], progress: Progress
) -> Iterator[Card]:
    """Yields the cards in the order of `rows`; pictures are read as the iterator advances.

    The ids of pictures that cannot be read are appended to `unreadable`.
    """
    root, absent = root_of(run, [row.place.shard for row in rows])
    with PictureReader(root) as reader:
        for number, row in enumerate(rows):
            progress("reading pictures", number, len(rows))
            image_id = row.place.image_id
            thumbnail = Thumbnail(why=absent) if absent else _thumbnail(reader, row.place, root, run.recipe.frame)
            if thumbnail.why:
                unreadable.append(image_id)
            yield Card(
                *(number, image_id, row.modality, _cut(row.original), gallery.tags[image_id]),
                *(captions.of(image_id), captions.mean(image_id), captions.disagreement(image_id), thumbnail),
            )
    progress("reading pictures", len(rows), len(rows))


def root_of(run: Run, shards: Sequence[str]) -> tuple[Path, str]:
    """The folder of the data set, and a message if it is not available. Nothing is downloaded to show pictures."""
    if root := root_here():
        return root, ""
    name, _ = parse_name(run.dataset)
    if not run.dataset_revision:
        return Path(name), ""
    for shard in dict.fromkeys(shards):
        if file := cached(name, shard, run.dataset_revision, "dataset"):
            return Path(file.removesuffix(shard)), ""
    command = f"hf download --repo-type dataset --revision {run.dataset_revision} {name}"
    return Path(), f"The data set is not in this machine's hub cache. Download it: {command}"


def _thumbnail(reader: PictureReader, place: Place, root: Path, frame: int) -> Thumbnail:
    try:
        picture = open_picture(reader.picture(place), frame)
        data = reduced(picture)
    except (DatasetError, PictureError, OSError) as error:
        return Thumbnail(why=short_within(str(error), [str(root)]))
    return Thumbnail(f"data:image/jpeg;base64,{b64encode(data).decode()}", *picture.size)


def reduced(picture: Image.Image) -> bytes:
    """Shrinks the picture to EDGE at most; returns it as a JPEG, of at most MAX_BYTES unless it is noise."""
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    for quality in QUALITIES:
        data = _jpeg(picture, quality)
        if len(data) <= MAX_BYTES:
            break
    return data


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()
