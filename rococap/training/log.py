"""What a training reports while it runs: a line of JSON for each step, a plot of the loss, and progress to a caller."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rococap.files import replacing

LOG = "log.jsonl"
PLOT = "loss.png"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is. `seconds` counts from the start of this process's training; `left_sec` is an estimate."""

    step: int
    steps: int
    loss: float
    seconds: float
    steps_per_sec: float
    left_sec: float


Report = Callable[[Progress], None]


class Log:
    """The log in the output folder: {"step", "loss", "lr", "seconds"} a line, or {"step", "eval_loss", "seconds"}."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        self.plot = folder / PLOT

    def entries(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        # A process that was killed while it wrote may have left half a line.
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n")[:-1]]

    def rewind(self, step: int) -> None:
        """Drops what was logged after a step, which is done again from its checkpoint."""
        kept = [entry for entry in self.entries() if entry["step"] <= step]
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def add(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def draw(self) -> None:
        """Draws the loss over the steps."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, style, label in (("loss", "-", "training"), ("eval_loss", "o-", "evaluation")):
            points = [(entry["step"], entry[name]) for entry in self.entries() if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set(xlabel="step", ylabel="loss (mean over the tokens of captions)")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        figure.savefig(self.plot, dpi=120)


class Logging(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Passes on what `Trainer` logs."""

    def __init__(self, log: Log, report: Report) -> None:
        self.log = log
        self.report = report
        self.started = time.monotonic()
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        seconds = time.monotonic() - self.started
        entry: dict[str, Any] = {"step": state.global_step}
        if "loss" in logs:
            self.log.add(entry | {"loss": logs["loss"], "lr": logs["learning_rate"], "seconds": round(seconds, 3)})
            rate = (state.global_step - self.first) / max(seconds, 1e-9)
            left = (state.max_steps - state.global_step) / rate
            self.report(Progress(state.global_step, state.max_steps, logs["loss"], seconds, rate, left))
        elif "eval_loss" in logs:
            self.log.add(entry | {"eval_loss": logs["eval_loss"], "seconds": round(seconds, 3)})
