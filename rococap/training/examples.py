"""Chooses the pictures to train on from the queue's rows, and reads them as captioning does. Knows no model.

A picture that cannot be read is skipped and listed with the code that captioning fails it with.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL.Image import Image
from sqlalchemy import Engine as Database

from rococap import queue
from rococap.data import PictureReader, Place
from rococap.data.images import open_picture
from rococap.db import transaction
from rococap.errors import DatasetError, PictureError, RococapError
from rococap.files import replacing
from rococap.queue import Run
from rococap.training import processes

ModalityOf = Callable[[Collection[str]], str]
"""Returns the name of the modality among a picture's concepts."""


@dataclass(frozen=True, slots=True)
class Example:
    """A picture's place, and the caption to learn."""

    place: Place
    caption: str


@dataclass(frozen=True, slots=True)
class Selection:
    """Which pictures of a run to train on. Several modalities, or concepts, mean any of them; `limit` takes the first.

    `targets` is the name of a run whose captions to learn instead of the originals.
    """

    split: str
    modalities: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()
    limit: int | None = None
    targets: str | None = None


def select(database: Database, run: Run, selection: Selection, modality_of: ModalityOf) -> list[Example]:
    """Returns the selected pictures that have a caption, in data set order.

    Raises RunError if the run lacks the split, DatasetError if none of its pictures has a caption, and RococapError if
    the filters leave none.
    """
    captions = None if selection.targets is None else _generated(database, run, selection.targets, selection.split)
    modalities: Counter[str] = Counter()
    found: list[Example] = []
    for picture in _pictures(database, run, selection.split):
        caption = (picture.caption if captions is None else captions.get(picture.place.image_id, "")).strip()
        if not caption:
            continue
        modalities[modality := modality_of(picture.concepts)] += 1
        if _is_wanted(picture, modality, selection) and len(found) != selection.limit:
            found.append(Example(picture.place, caption))
    if not modalities:
        raise _no_captions(run, selection)
    if not found:
        listed = ", ".join(f"{name} ({n})" for name, n in modalities.most_common())
        raise RococapError(
            f"No picture of {selection.split} is left by --modality and --concept. Its captioned pictures, by "
            f"modality: {listed}."
        )
    return found


def _is_wanted(picture: queue.Labelled, modality: str, selection: Selection) -> bool:
    if selection.modalities and modality not in selection.modalities:
        return False
    return not selection.concepts or not picture.concepts.isdisjoint(selection.concepts)


def _pictures(database: Database, run: Run, split: str) -> Iterator[queue.Labelled]:
    with transaction(database) as conn:
        queue.counts_of(conn, run, [split])  # raises RunError if the split is not enqueued
    after = 0
    while True:
        with transaction(database) as conn:  # short ones, which do not hold up workers
            page = queue.labelled(conn, run, split, after=after)
        if not page:
            return
        after = page[-1].id
        yield from page


def _generated(database: Database, run: Run, name: str, split: str) -> dict[str, str]:
    """The captions of another run by image id, without reasoning."""
    from rococap.results.snapshot import done_pages, finished_until, short_reads

    with transaction(database) as conn:
        other = queue.find_runs(conn, [run.name, name])[1] if name != run.name else run
        cutoff = finished_until(conn, [other], [split])
    with short_reads(database) as read:
        columns = "j.image_id, i.image_id, c.text"
        pages = done_pages(read, other, split, cutoff, columns, strip_reasoning=True)
        return {image_id: text for page in pages for _, image_id, text in page}


def _no_captions(run: Run, selection: Selection) -> RococapError:
    if selection.targets is not None:
        return RococapError(
            f"Run {selection.targets!r} has captioned nothing of {selection.split} yet: start rococap worker --run "
            f"{selection.targets}"
        )
    return DatasetError(
        f"No picture of {selection.split} in run {run.name!r} has an original caption, so there is nothing to learn. "
        "If a column holds them, register it in another queue: --db URL --columns caption=NAME"
    )


def digest(examples: Sequence[Example]) -> str:
    """SHA-256, in hex, over the ids and captions, which identifies what was learned from."""
    lines = ((example.place.split, example.place.image_id, example.caption) for example in examples)
    found = hashlib.sha256()
    for line in lines:
        found.update(json.dumps(line).encode() + b"\n")
    return found.hexdigest()


# --- Reading ---------------------------------------------------------------------------------------------------


class Skipped:
    """The pictures that could not be read, each listed once, in a file of JSON lines that outlives the process.

    Only the main process writes the file: what the others skip, they tell it in `gather`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.codes: dict[str, str] = {}
        self._untold: list[dict[str, str]] = []
        self._lock = threading.Lock()
        if processes.is_main() and path.exists():
            # A process that was killed while it wrote may have left half a line.
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            self.codes = {entry["image_id"]: entry["code"] for entry in map(json.loads, lines)}
            with replacing(path) as partial:
                partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def add(self, image_id: str, error: PictureError) -> None:
        self._list({"image_id": image_id, "code": error.code, "message": str(error)})

    def gather(self) -> None:
        """Adds what the other processes have skipped. All of them call this together."""
        with self._lock:
            untold, self._untold = self._untold, []
        told = chain.from_iterable(processes.gathered(untold))
        if processes.is_main():
            for entry in told:
                self._list(entry)

    def _list(self, entry: dict[str, str]) -> None:
        with self._lock:
            if entry["image_id"] in self.codes:
                return
            self.codes[entry["image_id"]] = entry["code"]
            if not processes.is_main():
                self._untold.append(entry)
                return
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def counts(self) -> dict[str, int]:
        """The number of skipped pictures by failure code."""
        return dict(sorted(Counter(self.codes.values()).items()))


Prepare = Callable[[int, Image], Any]
"""Makes the model's input of a picture, given its index. Raises PictureError."""


class Pictures:
    """A data set for torch's DataLoader, which reads a batch in one go. A batch that nothing is left of gets the next
    readable picture, so that none is empty.

    `prepare` is called in up to `threads` threads.
    """

    def __init__(
        self, examples: Sequence[Example], root: Path, frame: int, prepare: Prepare, skipped: Skipped, threads: int = 1
    ) -> None:
        self.examples = examples
        self._frame = frame
        self._prepare = prepare
        self.skipped = skipped
        self._reader = PictureReader(root)
        self._pool = ThreadPoolExecutor(threads, "prepare")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Raises DatasetError if a whole shard cannot be read, or no picture at all."""
        if found := self._read(indices):
            return found
        n = len(self.examples)
        for step in range(1, n):
            if found := self._read([(indices[-1] + step) % n]):
                return found
        codes = ", ".join(f"{code} ({n})" for code, n in self.skipped.counts().items())
        raise DatasetError(f"None of the {n} pictures can be read: {codes}. {self.skipped.path} lists them.")

    def _read(self, indices: Sequence[int]) -> list[Any]:
        """What could be read, in the order asked for, whatever order the places are read in."""
        in_place_order = sorted(indices, key=lambda index: _position(self.examples[index].place))
        read = self._reader.read([self.examples[index].place for index in in_place_order])
        data = {index: content for index, (_, content) in zip(in_place_order, read, strict=True)}
        made = self._pool.map(lambda index: self._made(index, data[index]), indices)
        return [one for one in made if one is not None]

    def _made(self, index: int, data: bytes | PictureError) -> Any:
        """The model's input; None for a picture that has to be skipped."""
        try:
            if isinstance(data, PictureError):
                raise data
            return self._prepare(index, open_picture(data, self._frame))
        except PictureError as error:
            self.skipped.add(self.examples[index].place.image_id, error)
            return None

    def close(self) -> None:
        self._pool.shutdown()
        self._reader.close()


def _position(place: Place) -> tuple[str, int, int]:
    return place.shard, place.row_group, place.row_in_group
