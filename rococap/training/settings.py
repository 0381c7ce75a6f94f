"""What a user chooses when fine-tuning, besides the model and the pictures. Does not import torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rococap.recipe import Recipe

Method = Literal["lora", "full"]
LEARNING_RATES: Mapping[Method, float] = {"lora": 1e-4, "full": 1e-5}
EFFECTIVE_BATCH = 16
"""Pictures in a step, unless the user chose the batch size."""
NOT_IN_PLAN = ("save_every", "keep", "checkpointing", "device")
"""Settings that may differ when training continues: they do not affect the weights, or only by rounding."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train. None stands for a default that depends on the other settings or on the machine.

    `target` is language, language+vision, or names of modules joined by commas. `warmup` below 1 is a share of all
    steps, and otherwise a number of steps. `batch_size` counts pictures that go through the model together; a step adds
    up the gradients of `accumulate` such batches. `checkpointing` computes activations a second time instead of keeping
    them. `early_stopping` is the number of evaluations in a row without improvement that ends the training.
    Raises ValueError, naming the option, for values that exclude one another.
    """

    method: Method = "lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target: str = "language"
    epochs: float = 1.0
    max_steps: int | None = None
    lr: float | None = None
    warmup: float = 0.03
    batch_size: int | None = None
    accumulate: int | None = None
    checkpointing: bool | None = None
    max_caption_tokens: int | None = None
    seed: int = 1
    save_every: int = 100
    keep: int = 2
    eval_split: str | None = None
    eval_every: int = 100
    early_stopping: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size is None and self.accumulate is not None:
            raise ValueError("--accumulate goes with a number in --batch-size: with auto, both are chosen together")
        if self.early_stopping is not None and self.eval_split is None:
            raise ValueError("--early-stopping needs pictures to evaluate on: name them with --eval-split")
        if self.method == "full" and self.target not in ("language", "language+vision"):
            raise ValueError("--target takes names of modules only with --method lora")

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else LEARNING_RATES[self.method]

    def caption_limit(self, recipe: Recipe) -> int:
        """The longest caption to learn, in tokens: by default the longest that a run of the recipe could write."""
        return self.max_caption_tokens or recipe.max_new_tokens - 1  # without the token that ends it

    def plan(self, recipe: Recipe) -> dict[str, Any]:
        """The settings that decide the weights, by name, with defaults filled in."""
        chosen = {name: value for name, value in asdict(self).items() if name not in NOT_IN_PLAN}
        if self.method == "full":
            chosen = {name: value for name, value in chosen.items() if name not in ("rank", "alpha", "dropout")}
        if self.eval_split is None:
            del chosen["eval_every"]
        return chosen | {"lr": self.learning_rate, "max_caption_tokens": self.caption_limit(recipe)}
