"""A real engine without a model: its caption is what it measured in the picture, so that a swapped row is noticed.

Run as a script it is a worker process: `python small_engine.py URL JSON`, the JSON being the engine's and the worker's
settings.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rococap import db
from rococap.engines import Completion, EngineInfo, Failure, Options, Prepared, Source, gather
from rococap.errors import PictureError
from rococap.recipe import Recipe
from rococap.worker import Settings, work

INFO = EngineInfo("small", {"rococap": "0"}, "tests/small", "", "none", "cpu", "small")


def caption_of(number: int) -> str:
    """What the engine says of `samples.picture(number)`."""
    return f"{28 + number % 7} by {28 + number % 5}, grey {number % 256}"


@dataclass
class SmallEngine:
    """Takes `steps` steps of `step_sec` a batch; the greys in the other fields make trouble."""

    batch_size: int = 4
    steps: int = 1
    step_sec: float = 0.0
    breaks_on: tuple[int, ...] = ()
    unprepared: tuple[int, ...] = ()
    transient: tuple[int, ...] = ()
    hangs: bool = False
    info = INFO

    def load(self) -> None:
        pass

    def close(self) -> None:
        pass

    def prepare(self, job_id: int, picture: Image.Image) -> Prepared:
        grey = int(np.asarray(picture)[0, 0, 0])
        if grey in self.unprepared:
            raise PictureError("unprocessable", "The small engine cannot take this picture.")
        return Prepared(job_id, (picture.width, picture.height, grey), 10)

    def run(self, source: Source) -> Iterator[Completion]:
        while batch := gather(source, self.batch_size):
            if any(picture.inputs[2] in self.breaks_on for picture in batch):
                raise RuntimeError("the small engine broke")
            lost = set()
            for _ in range(self.steps):
                time.sleep(3600 if self.hangs else self.step_sec)
                lost = set(source.step())
                if all(picture.job_id in lost for picture in batch):
                    break
            for picture in batch:
                if picture.job_id not in lost:
                    yield self._completion(picture)

    def _completion(self, picture: Prepared) -> Completion:
        width, height, grey = picture.inputs
        if grey in self.transient:
            return Completion(picture.job_id, failure=Failure("busy", "Come back later.", transient=True))
        return Completion(picture.job_id, f"{width} by {height}, grey {grey}", processing_ms=1.0, new_tokens=3)


def main() -> None:
    url, options = sys.argv[1], json.loads(sys.argv[2])

    def load(recipe: Recipe, _: Options) -> SmallEngine:
        return SmallEngine(**options.get("engine", {}))

    outcome = work(db.connect(url), Settings(**options.get("settings", {})), load=load)
    print(
        json.dumps({"done": outcome.done, "failed": outcome.failed, "lost": outcome.lost, "drained": outcome.drained})
    )


if __name__ == "__main__":
    main()
