"""One training by rococap or by TRL, in this process, which imports nothing that only the other one needs:

python bench/trainings.py ours|peer CASE
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

from report import memory_mb
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer

from rococap.recipe import Recipe
from rococap.training.settings import LEARNING_RATES, Method, Settings

LANGUAGE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What a user of PEFT names, and what `--target language` finds, in a Qwen2-VL."""
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0}
"""No dropout: its random numbers fall on other tokens where the padding is on the other side."""
SEED = 1


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
        return Recipe(model=self.model, max_new_tokens=256, dtype="float32")

    @property
    def n(self) -> int:
        return self.batch * self.steps


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
    from rococap import db, queue
    from rococap.data.datasets import locate
    from rococap.queue.enqueue import enqueue
    from rococap.scores.concepts import modality
    from rococap.training.examples import Selection
    from rococap.training.train import Job, finetune

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
    from transformers import AutoProcessor
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


if __name__ == "__main__":
    print(json.dumps(asdict(train_here(sys.argv[1], Case(**json.loads(sys.argv[2]))))))
