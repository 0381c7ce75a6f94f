"""Measures fine-tuning: rococap against TRL's SFTTrainer, with the same weights, pictures, batches and steps.

Each training runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import pyarrow as pa
import pyarrow.parquet as pq
import small_models
import ways
from report import Line, alternate, memory_mb, ratio_line, show, value_line
from transformers import AutoProcessor, TrainerCallback
from transformers import trainer as transformers_trainer

from rococap import db, queue
from rococap.data.datasets import locate
from rococap.demo import MODEL
from rococap.demo.phantoms import write_dataset
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe
from rococap.scores.concepts import modality
from rococap.training.examples import Selection
from rococap.training.settings import LEARNING_RATES, Method, Settings
from rococap.training.train import Job, finetune

CASES: dict[str, tuple[str, Path | None, Method]] = {
    "demo": ("demo, LoRA", MODEL, "lora"),
    "lora": ("106 M, LoRA", None, "lora"),
    "full": ("106 M, all weights", None, "full"),
}
LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What a user of PEFT names, and what `--target language` finds, in a Qwen2-VL."""
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0}
"""No dropout: its random numbers fall on other tokens where the padding is on the other side."""
SEED = 1
MEAN, LONGEST = 33, 128
"""Length of the longer captions in tokens, distributed as in ROCOv2."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model, a data set, and `steps` of `batch` pictures. The whole model is trained if the method is full."""

    name: str
    model: str
    root: str
    method: Method
    batch: int
    steps: int

    @property
    def recipe(self) -> Recipe:
        return Recipe(model=self.model, max_new_tokens=2 * LONGEST, dtype="float32")

    @property
    def n(self) -> int:
        return self.batch * self.steps


# --- One training, in a process of its own ---------------------------------------------------------------------


@dataclass
class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """What a training took: the seconds until its last step ended, and those in which the model worked, from the first
    forward pass of each step until its weights were updated.
    """

    seconds: float = 0.0
    working: float = 0.0
    losses: list[float] = field(default_factory=list)
    _began: float = 0.0
    _step_began: float = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.working += now - self._step_began
        self.seconds = now - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train_ours(case: Case, folder: Path) -> None:
    database = db.connect(f"sqlite:///{folder / 'queue.db'}")
    enqueue(database, locate(case.root, ["train"]), ["train"], run="default", recipe=case.recipe)
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "default")
    settings = Settings(
        method=case.method,
        target="language" if case.method == "lora" else "language+vision",
        **LORA,
        max_steps=case.steps,
        batch_size=case.batch,
        seed=SEED,
        device="cpu",
    )
    finetune(Job(database, run, case.recipe, Selection("train"), settings, folder / "tuned"), modality, lambda _: None)


def train_peer(case: Case, folder: Path) -> None:
    """As a user of TRL would, with text that holds the same tokens, and TRL's own collator and mask."""
    from datasets import Image, load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    recipe = case.recipe
    processor = AutoProcessor.from_pretrained(case.model)
    processor.image_processor.size = {"shortest_edge": recipe.min_pixels, "longest_edge": recipe.max_pixels}
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": recipe.prompt}]}]
    prompt = processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)

    def as_pair(caption: str) -> dict[str, str]:
        return {"prompt": prompt, "completion": f"{caption}<|im_end|>"}

    shards = [str(path) for path in sorted(Path(case.root, "data").glob("*.parquet"))]
    data = load_dataset("parquet", data_files=shards, split="train", cache_dir=str(folder / "cache"))
    data = data.map(as_pair, input_columns=["caption"], remove_columns="caption").cast_column("image", Image())
    args = SFTConfig(
        output_dir=str(folder / "tuned"),
        max_steps=case.steps,
        per_device_train_batch_size=case.batch,
        learning_rate=LEARNING_RATES[case.method],
        lr_scheduler_type="cosine",
        warmup_steps=Settings().warmup,
        seed=SEED,
        data_seed=SEED,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        max_length=None,
        disable_tqdm=True,
    )
    lora = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules=LANGUAGE)
    trainer = SFTTrainer(
        case.model,
        args,
        train_dataset=data,
        processing_class=processor,
        peft_config=lora if case.method == "lora" else None,
    )
    trainer.train()
    trainer.save_model()


TRAIN = {"ours": train_ours, "peer": train_peer}


@dataclass(frozen=True, slots=True)
class Trained:
    """Seconds of a training, the share of them in which the model worked, the loss of each step, and peak memory."""

    seconds: float
    busy: float
    losses: list[float]
    peak_mb: float


def train_here(who: str, case: Case) -> Trained:
    watch = Stopwatch()
    transformers_trainer.DEFAULT_CALLBACKS.append(watch)  # both trainers are transformers' underneath
    with tempfile.TemporaryDirectory(prefix=f"bench_{who}_") as folder:
        TRAIN[who](case, Path(folder))
    assert len(watch.losses) == case.steps
    return Trained(watch.seconds, watch.working / watch.seconds, watch.losses, memory_mb("VmHWM"))


def train(who: str, case: Case) -> Trained:
    command = [sys.executable, __file__, "--train", who, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name}, {who}: {done.stderr}")
    return Trained(**json.loads(done.stdout.splitlines()[-1]))


# --- The comparison --------------------------------------------------------------------------------------------


def main() -> None:
    options = _options()
    if options.train:
        who, case = options.train
        return print(json.dumps(asdict(train_here(who, Case(**json.loads(case))))))
    lines: list[Line] = []
    began, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench_finetune_") as folder:
        try:
            for part in options.only:
                lines += compare(case_of(part, Path(folder), options), options.rounds)
                print(f"{part}: measured after {time.perf_counter() - began:.0f} s", file=sys.stderr)
        finally:  # also after an error: the results so far are worth having
            show(lines, f"load {load:.1f} before; {options.rounds} rounds of {options.steps} steps")
    return print("Missed: " + ("; ".join(line.what for line in lines if line.missed) or "none"))


def case_of(part: str, folder: Path, options: argparse.Namespace) -> Case:
    """The cases share one data set, in which captions are as long as ROCOv2's."""
    n, root, large = options.batch_size * options.steps, folder / "uneven", folder / "model_106m"
    if not root.exists():
        write_dataset(root, {"train": n})
        lengthen_captions(root, ways.uneven_lengths(n, MEAN, LONGEST))
    if part != "demo" and not large.exists():
        small_models.write_105m(large)
    name, model, method = CASES[part]
    return Case(name, str(model or large), str(root), method, options.batch_size, options.steps)


def lengthen_captions(root: Path, lengths: Sequence[int]) -> None:
    """Makes the captions of a data set this long, in tokens of the demo model, by repeating and cutting them."""
    tokenizer = AutoProcessor.from_pretrained(MODEL).tokenizer
    left = iter(lengths)
    for path in sorted((root / "data").glob("*.parquet")):
        table = pq.read_table(path)
        column = table.schema.get_field_index("caption")
        made = [
            tokenizer.decode(tokenizer(" ".join([caption] * length))["input_ids"][:length]).strip()
            for caption, length in zip(table["caption"].to_pylist(), islice(left, len(table)), strict=True)
        ]
        pq.write_table(table.set_column(column, "caption", pa.array(made)), path, row_group_size=100)


def compare(case: Case, n_rounds: int) -> list[Line]:
    rounds = alternate(n_rounds, lambda: train("peer", case), lambda: train("ours", case))
    peers, ours = zip(*rounds, strict=True)

    def ratio(what: str, figure: Callable[[Trained], float], unit: str, target: str) -> Line:
        return ratio_line(f"{case.name}: {what}", [*map(figure, peers)], [*map(figure, ours)], unit, target)

    apart = max(abs(mine - its) / its for its, mine in zip(peers[0].losses, ours[0].losses, strict=True))
    losses = f"loss of each of {case.steps} steps, from {ours[0].losses[0]:.3f} to {ours[0].losses[-1]:.3f}"
    busy = [one.busy for one in ours]
    return [
        ratio("training", lambda one: case.n / one.seconds, "pictures/s", ">= 1.0"),
        ratio("peak memory", lambda one: one.peak_mb, "MB", "<= 1.0"),
        Line(f"{case.name}: {losses}, apart at most", "", f"{apart:.0e} of it", (apart,), "<= 0.001"),
        value_line(f"{case.name}: share of the time in which the model works", busy, "", ">= 0.9"),
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--only",
        type=lambda text: text.split(","),
        default=[*CASES],
        help=f"parts to measure, separated by commas: {','.join(CASES)}",
    )
    add("--rounds", type=int, default=3, help="rounds, in each of which both take a turn")
    add("--batch-size", type=int, default=8, help="pictures at a time")
    add("--steps", type=int, default=16, help="steps of a training")
    add("--train", nargs=2, metavar=("WHO", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.only) - set(CASES):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    main()
