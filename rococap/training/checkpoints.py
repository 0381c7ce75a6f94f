"""The checkpoints of a training: written aside, synced and renamed, so that each exists whole or not at all."""

import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rococap.errors import RococapError
from rococap.files import fsync, read_json, write_json
from rococap.results.manifest import TRAINING

FOLDER = "checkpoints"
PLAN = "training.json"
"""What is trained, on what and how: a folder belongs to one training."""
BASE = "base_digest"
SKIPPED = "skipped.jsonl"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints in an output folder. `staging` is where one is written, and may hold a torn one."""

    output: Path
    keep: int

    @property
    def folder(self) -> Path:
        return self.output / FOLDER

    @property
    def staging(self) -> Path:
        return self.folder / ".part"

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        names = [] if not self.folder.is_dir() else [path.name for path in self.folder.iterdir()]
        return sorted(int(found[1]) for found in map(_NAME.fullmatch, names) if found)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yields a folder; when the block ends, it becomes the step's checkpoint.

        Raises RococapError, leaving earlier checkpoints as they are, if it cannot be written.
        """
        try:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
            yield self.staging
            self.publish(step)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            if not _is_of_a_file(error):
                raise
            shutil.rmtree(self.staging, ignore_errors=True)
            raise self._not_written(step, error) from error

    def publish(self, step: int) -> None:
        """Makes what was staged the checkpoint of a step, unless that exists already."""
        _sync(self.staging)
        if self.path(step).exists():
            shutil.rmtree(self.staging)
            return
        self.staging.rename(self.path(step))
        fsync(self.folder)

    def prune(self, protected: Collection[int] = ()) -> None:
        """Removes all but the newest `keep`, and those of the steps that are `protected`."""
        for step in self.steps()[: -self.keep]:
            if step not in protected:
                self._remove(step)

    def clear(self) -> None:
        """Removes all of them, once the result replaces them."""
        for step in self.steps():
            self._remove(step)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, step: int) -> None:
        # Renamed first: if the process is killed meanwhile, what is left must not look like a checkpoint.
        gone = self.folder / f".old-{step}"
        with suppress(OSError):
            shutil.rmtree(gone, ignore_errors=True)
            self.path(step).rename(gone)
            shutil.rmtree(gone)

    def _not_written(self, step: int, error: Exception) -> RococapError:
        last = self.latest()
        kept = "there is no earlier one" if last is None else f"the one of step {last} is whole"
        reason = str(error).strip().splitlines()[0].rstrip(".")
        return RococapError(
            f"The checkpoint of step {step} cannot be written to {self.folder} ({reason}); {kept}. Free some space, "
            "then run the same command again to continue."
        )


def _is_of_a_file(error: Exception) -> bool:
    """Whether an error is about writing a file, as opposed to the model: torch raises RuntimeError for both."""
    return not isinstance(error, RuntimeError) or "file" in str(error).lower() or "writ" in str(error).lower()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


# --- The plan --------------------------------------------------------------------------------------------------


def check_plan(output: Path, plan: dict[str, Any]) -> None:
    """Records what is trained in the output folder, or compares it with what is recorded.

    Raises RococapError if the folder holds something else, or another training, naming what differs.
    """
    existing = read_json(output / PLAN) if output.is_dir() else None
    if existing is None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise RococapError(f"{output} exists and holds no training: choose another folder with --output.")
        write_json(output / PLAN, plan)
        return
    names = [name for name in {**existing, **plan} if name != BASE]
    differing = [name for name in names if existing.get(name) != plan.get(name)]
    if differing and Checkpoints(output, 1).latest() is None and not (output / TRAINING).exists():
        # Nothing was learned yet, for example for lack of memory, which other options may remedy.
        (output / SKIPPED).unlink(missing_ok=True)
        write_json(output / PLAN, plan)
    elif differing:
        listed = "; ".join(f"{name}: {existing.get(name)!r}, not {plan.get(name)!r}" for name in differing)
        raise RococapError(
            f"{output} holds another training ({listed}). Continue that one with its own options, or choose another "
            "folder with --output."
        )


def check_base(output: Path, digest: str) -> None:
    """Records which weights are trained, known only once they are loaded, or compares them with those recorded.

    Raises RococapError if they are others, for example because a branch on the hub has moved on.
    """
    existing = read_json(output / PLAN) or {}
    recorded = existing.setdefault(BASE, digest)
    if recorded != digest:
        raise RococapError(
            f"{output} holds a training of other weights under the same name ({BASE}: {recorded}, now {digest}). "
            "Restore them, or choose another folder with --output."
        )
    write_json(output / PLAN, existing)
