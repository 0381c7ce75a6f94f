"""transformers' Trainer with our loss and checkpoints, which reads ahead and stops at a loss that is not finite.

The optimizer, the schedule, mixed precision and several processes are its own.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from rococap.errors import ModelError
from rococap.training.ahead import Ahead
from rococap.training.checkpoints import Checkpoints
from rococap.training.collate import loss
from rococap.training.processes import gathered, known_to_all

WEIGHTS = "trained.safetensors"


class Trainer(transformers.Trainer):  # type: ignore[misc]  # transformers ships no types
    def __init__(self, checkpoints: Checkpoints, **options: Any) -> None:
        super().__init__(compute_loss_func=loss, **options)
        self.remove_callback(transformers.PrinterCallback)
        self.checkpoints = checkpoints
        self._ahead: Ahead | None = None
        self._ids: list[str] = []  # of this process's pictures in the step under way
        self._overflowing: list[str] = []  # those whose loss is not finite

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        ids = inputs.pop("image_ids")
        step_loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._ids += ids
        if not math.isfinite(float(step_loss)):
            self._overflowing += ids
        return step_loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Called once for each step, before anything is learned from it."""
        norm = super()._clip_grad_norm(model)
        self._check_finite(float(norm))
        self._ids.clear()
        return norm

    def _check_finite(self, norm: float) -> None:
        """The norm is that of the gradients of all processes, but each knows its own loss only."""
        reports = gathered((self._overflowing, self._ids))
        overflowing = [id for ids, _ in reports for id in ids]
        if not overflowing and math.isfinite(norm):
            return
        what, ids = ("loss", overflowing) if overflowing else ("gradient", [id for _, ids in reports for id in ids])
        error = ModelError(
            f"The {what} of step {self.state.global_step + 1} is not finite; its pictures are {', '.join(ids)}. "
            "Nothing was learned from them. Start again in another folder with a lower --lr, or leave them out."
        )
        raise known_to_all(error)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        inputs.pop("image_ids")
        return super().prediction_step(model, inputs, *args, **options)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        if self._ahead is None or self._ahead.source is not epoch_iterator:
            self.stop_reading()
            self._ahead = Ahead(epoch_iterator)
        return super().get_batch_samples(self._ahead, num_batches, device)

    def stop_reading(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer makes the folder of a checkpoint, named by its step."""
        return str(self.checkpoints.staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, is_main = self.state.global_step, self.is_world_process_zero()
        writing: AbstractContextManager[Path | None] = self.checkpoints.writing(step) if is_main else nullcontext()
        with writing as staging:
            self.train_dataset.skipped.gather()
            self.accelerator.wait_for_everyone()  # until what was staged before is gone
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # until each process has staged its random state
            if staging is not None:
                _lift(staging)
        if is_main:
            self.checkpoints.prune({self.state.best_global_step})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves the trained weights only, under the model's own names.

        save_pretrained may use names of an earlier release, which the loading code of Trainer would then ignore.
        """
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.detach().contiguous() for name, weight in self._trained().items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved, trained = load_file(Path(resume_from_checkpoint) / WEIGHTS), self._trained()
        assert saved.keys() == trained.keys(), "another training's checkpoint"
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(saved[name])

    def _trained(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}


def _lift(staging: Path) -> None:
    """Moves the files that Trainer wrote to a folder in the staging folder into that itself."""
    (inner,) = staging.iterdir()
    for path in inner.iterdir():
        path.rename(staging / path.name)
    inner.rmdir()


class Stop(TrainerCallback):  # type: ignore[misc]
    """Saves and stops all processes after the step under way, once `is_asked` is set in any of them."""

    def __init__(self) -> None:
        self.is_asked = False
        self.is_agreed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.is_agreed = any(gathered(self.is_asked))
        if self.is_agreed:
            control.should_save = control.should_training_stop = True
        return control


class SaveEvaluated(TrainerCallback):  # type: ignore[misc]
    """Saves whatever was evaluated, so that the best of it can become the result."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_save = True
        return control


def arguments(device: torch.device, **settings: Any) -> TrainingArguments:
    """What is the same for every training, and the given settings."""
    args = TrainingArguments(
        use_cpu=device.type == "cpu",
        **settings,
        optim="adamw_torch_fused",
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it replaces such a loss by a mean in the log, and goes on
        save_strategy="steps",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,  # `prepare` pins
        metric_for_best_model="loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        ddp_find_unused_parameters=False,
    )
    args._n_gpu = min(1, args.n_gpu)  # otherwise Trainer copies the model to every GPU it sees, in one process
    if device.type == "cuda":
        args._setup_devices = device  # a process on its own would always use the first GPU
        torch.cuda.set_device(device)
    return args
