"""Two ways of captioning a data set on a Ray cluster, each as a program of its own: what `rococap launch ray` does, and
Ray Data as its documentation says for batch inference.

python bench/ray_ways.py rococap|ray_data TASK, where TASK is JSON. Modules are imported where they are needed, so that
neither program pays for those of the other.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

BENCH = str(Path(__file__).resolve().parent)
if __name__ == "__main__":
    sys.path.pop(0)  # Ray would put it first in its processes, where queue.py would hide the standard library's

N_WORKERS = 2
BLOCK = 128
"""Pictures in a file of the data set, and in a block of Ray Data."""
MEAN, LONGEST = 33, 128
"""Forced lengths of captions in tokens."""


@dataclass(frozen=True, slots=True)
class Task:
    """`n` pictures in `root`, a multiple of BLOCK, whose captions go to `target`: the URL of a queue, or a folder for
    Parquet files.

    `log` gets a line for each group of pictures that a model begins to caption: the time, and their numbers from 1.
    """

    address: str
    root: str
    n: int
    is_uneven: bool
    target: str
    log: str
    batch: int | None = None
    lease_ttl: float = 120.0

    def recipe(self) -> Any:
        from rococap import demo

        return replace(demo.recipe(), max_new_tokens=LONGEST) if self.is_uneven else demo.recipe()

    def lengths(self) -> list[int] | None:
        lengths: list[int] = ways().uneven_lengths(self.n, MEAN, LONGEST)
        return lengths if self.is_uneven else None

    def note(self, numbers: Sequence[int]) -> None:
        line = " ".join(map(str, (time.time(), *numbers)))
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{line}\n".encode())  # at once, since this process may be killed
        os.close(file)


def ways() -> Any:
    if BENCH not in sys.path:
        sys.path.append(BENCH)
    import ways

    return ways


# --- rococap ---------------------------------------------------------------------------------------------------


def rococap(task: Task) -> None:
    """`rococap launch ray --cpus 2`, but its workers note what they begin and may have forced lengths."""
    from rococap import db
    from rococap.launch import ray
    from rococap.worker.settings import Settings

    member = [sys.executable, __file__, "member", json.dumps(asdict(task))]
    ended = ray.work(
        db.connect(task.target),
        task.target,
        Settings.of(batch_size=task.batch, lease_ttl=task.lease_ttl, self_check=False),
        "cpu",
        N_WORKERS,
        task.address,
        lambda settings: [*member, settings.to_json()],
        echo=lambda line: print(line, file=sys.stderr),
    )
    assert not ended.errors, ended.errors


def be_member(task: Task, settings: str) -> None:
    """The process of one worker."""
    from rococap import db
    from rococap.engines.hf import TransformersEngine
    from rococap.worker import children, process, supervisor
    from rococap.worker.settings import Settings

    class Noted:
        """A source that notes which pictures the engine takes."""

        def __init__(self, source: Any) -> None:
            self.source, self.step = source, source.step

        def take(self, limit: int, wait: float | None) -> list[Any]:
            taken: list[Any] = self.source.take(limit, wait)
            if taken:
                task.note([picture.job_id for picture in taken])
            return taken

    class NotedEngine(TransformersEngine):
        def load(self) -> None:
            super().load()
            if (lengths := task.lengths()) is not None:
                ways().force(self, lengths)

        def run(self, source: Any) -> Iterator[Any]:
            return super().run(Noted(source))

    children.leave_with_parent()
    database, report = db.connect(os.environ["ROCOCAP_DB"]), supervisor.report_outcome
    report(process.work(database, Settings.from_json(settings), report, NotedEngine))


# --- Ray Data --------------------------------------------------------------------------------------------------


class Captioner:
    """Captions batches of pictures with transformers, left-padded."""

    def __init__(self, task: Task) -> None:
        self.task, self.lengths = task, task.lengths()
        self.model = ways().stock(task.recipe())
        ends = self.model.model.generation_config.eos_token_id
        self.ends = [ends] if isinstance(ends, int) else ends

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        numbers = [int(image_id.rpartition("_")[2]) for image_id in batch["image_id"]]
        self.task.note(numbers)
        pictures = [Image.open(BytesIO(image["bytes"])).convert("RGB") for image in batch["image"]]
        processor, prompts = self.model.processor, [self.model.prompt] * len(pictures)
        inputs = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
        if self.lengths is None:
            tokens = self.model.generate(inputs, None)
        else:
            lengths = [self.lengths[number - 1] for number in numbers]
            rows = self.model.generate(inputs, lengths).tolist()
            tokens = [self._caption(row[:length]) for row, length in zip(rows, lengths, strict=True)]
        return {"image_id": batch["image_id"], "caption": processor.batch_decode(tokens, skip_special_tokens=True)}

    def _caption(self, tokens: list[int]) -> list[int]:
        """What rococap stores of a caption that was forced to go on after its end."""
        return tokens[: next((place for place, token in enumerate(tokens) if token in self.ends), None)]


def ray_data(task: Task) -> None:
    import ray

    ray.init(task.address, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    pictures = ray.data.read_parquet(f"{task.root}/data").select_columns(["image", "image_id"])
    # Else it joins files of so few bytes into one block, which one of the actors gets.
    pictures = pictures.repartition(target_num_rows_per_block=BLOCK)
    captions = pictures.map_batches(
        Captioner,
        fn_constructor_args=(task,),
        compute=ray.data.ActorPoolStrategy(size=N_WORKERS),
        batch_size=task.batch,
        num_gpus=1,  # in Ray's books only
        num_cpus=0,  # else the actors would keep the only two slots, and reading and writing would wait for ever
    )
    captions.write_parquet(task.target)


if __name__ == "__main__":
    role, task, *more = sys.argv[1:]
    {"rococap": rococap, "member": be_member, "ray_data": ray_data}[role](Task(**json.loads(task)), *more)
