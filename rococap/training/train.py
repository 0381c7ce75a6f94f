"""Fine-tunes a model on a run's pictures: chooses, trains, continues what was interrupted, writes the result."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from sqlalchemy import Engine as Database
from transformers import EarlyStoppingCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from rococap import __version__, queue
from rococap.engines import Options, Request
from rococap.engines.checkpoint import identity
from rococap.engines.decoding import free_memory, is_out_of_memory
from rococap.engines.hf import TransformersEngine
from rococap.errors import ModelError
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.training import processes, result, targets
from rococap.training.checkpoints import SKIPPED, Checkpoints, check_base, check_plan
from rococap.training.collate import Captions, Collator, Learned, Row, end_of_caption, row
from rococap.training.examples import Example, ModalityOf, Pictures, Selection, Skipped, digest, select
from rococap.training.log import Log, Logging, Report
from rococap.training.settings import EFFECTIVE_BATCH, Settings
from rococap.training.trainer import SaveEvaluated, Stop, Trainer, arguments

log = logging.getLogger(__name__)

OF_RECIPE = (
    *("model", "revision", "trust_remote_code", "load_in", "dtype"),
    *("prompt", "min_pixels", "max_pixels", "frame"),
)
"""Fields of a recipe that matter for training."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MOST_AT_ONCE = 8
"""Pictures that go through the model together, unless the user chose a number or memory runs out."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training did. `steps` are done of `total`; it `is_finished` if the result is written.

    `skipped` counts pictures by failure code; `shortened` and `refused` count captions.
    """

    output: Path
    is_finished: bool
    steps: int
    total: int
    examples: int
    shortened: int
    refused: int
    skipped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked for."""

    database: Database
    run: Run
    recipe: Recipe
    selection: Selection
    settings: Settings
    output: Path


def finetune(job: Job, modality_of: ModalityOf, report: Report) -> Outcome:
    """Trains, or continues the training in the output folder, and writes the result there.

    Of the processes that `processes.joined` connects, all call this, and the main one's outcome is complete.

    Raises RunError and DatasetError if there is nothing to train on, ModelError if the model cannot be trained, and
    RococapError for an output folder that holds something else or cannot be written.
    """
    device = processes.own_device(job.settings.device)
    start = processes.decided(lambda: _start(job, modality_of))
    return start if isinstance(start, Outcome) else _Training(job, device, start, report).run()


@dataclass(frozen=True, slots=True)
class _Start:
    """What a training begins with: everything that decides the weights, by name, and the pictures."""

    plan: dict[str, Any]
    chosen: list[Example]
    evaluated: list[Example]


def _start(job: Job, modality_of: ModalityOf) -> _Start | Outcome:
    """Checks what is asked for and claims the output folder. Returns the outcome if it holds the result already."""
    _check(job)
    chosen = select(job.database, job.run, job.selection, modality_of)
    evaluated = _evaluated(job, modality_of)
    plan = _plan(job, chosen, evaluated)
    check_plan(job.output, plan)
    if (finished := result.read(job.output)) is not None:
        Checkpoints(job.output, job.settings.keep).clear()  # a kill may have come between the result and this
        return Outcome(job.output, True, finished["steps"], finished["steps"], len(chosen), 0, 0, finished["skipped"])
    return _Start(plan, chosen, evaluated)


def _check(job: Job) -> None:
    recipe, settings = job.recipe, job.settings
    if settings.method == "lora" and find_spec("peft") is None:
        raise ModelError("LoRA needs PEFT. Install it: pip install 'rococap[finetune]'")
    if settings.method == "full" and recipe.load_in is not None:
        raise ModelError("Quantised weights cannot be trained: leave --load-in out, or train a LoRA: --method lora")
    if recipe.adapter is not None:
        raise ModelError(
            f"The run captions with the adapter {recipe.adapter}, and a LoRA on top of another would not work without "
            "it. Train from the model itself: name it with --model"
        )


def _evaluated(job: Job, modality_of: ModalityOf) -> list[Example]:
    if job.settings.eval_split is None:
        return []
    selection = replace(job.selection, split=job.settings.eval_split, targets=None)
    return select(job.database, job.run, selection, modality_of)


def _plan(job: Job, chosen: list[Example], evaluated: list[Example]) -> dict[str, Any]:
    recipe = job.recipe
    plan = {name: getattr(recipe, name) for name in OF_RECIPE}
    plan |= {"dataset": job.run.dataset, "dataset_revision": job.run.dataset_revision}
    plan |= {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(job.selection).items()}
    plan |= {"pictures": len(chosen), "pictures_digest": digest(chosen)}
    if evaluated:
        plan |= {"eval_pictures_digest": digest(evaluated)}
    return plan | job.settings.plan(recipe) | {"processes": processes.count()}


class _Training:
    """One training, from loading the model to writing the result."""

    def __init__(self, job: Job, device: torch.device, start: _Start, report: Report) -> None:
        self.job = job
        self.device = device
        self.start = start
        self.settings = job.settings
        self.report = report
        self.checkpoints = Checkpoints(job.output, job.settings.keep)
        self.skipped = Skipped(job.output / SKIPPED)
        self.log = Log(job.output)
        self.stop = Stop()

    def run(self) -> Outcome:
        self._load()
        learned = self.captions.learned(self.start.chosen)
        if not learned.examples:
            error = ModelError(
                f"All {learned.refused} captions are longer than --max-caption-tokens {self.captions.limit}: raise it."
            )
            raise processes.known_to_all(error)
        trainer = self._fit(learned)
        self.skipped.gather()
        done, total = trainer.state.global_step, trainer.state.max_steps
        is_finished = not self.stop.is_agreed or done >= total
        counts = (len(learned.examples), learned.shortened, learned.refused, self.skipped.counts())
        if is_finished and processes.is_main():
            self._finish(trainer, learned)
        return Outcome(self.job.output, is_finished, done, total, *counts)

    # --- setting up ---

    def _load(self) -> None:
        """Loads model and processor by the code that captioning loads them with, in the precision of training."""
        recipe = replace(self.job.recipe, dtype=_weights_dtype(self.job.recipe, self.settings, self.device))
        self.engine = TransformersEngine(recipe, Options(device=str(self.device)))
        model, _ = self.engine.load_plain()
        self.base_revision, self.base_digest = identity(model, recipe.model)
        processes.decided(lambda: check_base(self.job.output, self.base_digest))
        tokenizer = self.engine.processor.tokenizer
        end = end_of_caption(model, self.engine.processor, recipe.model)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        self.captions = Captions(tokenizer, end, self.settings.caption_limit(recipe))
        set_seed(self.settings.seed)  # a new LoRA is random
        self.model = targets.prepared(model, self.settings)
        if self._checkpoints_activations():
            targets.checkpoint_activations(self.model)

    def _pictures(self, learned: Learned) -> Pictures:
        recipe = self.job.recipe
        splits = list(dict.fromkeys(example.place.split for example in learned.examples))
        located = queue.dataset_of(self.job.database, self.job.run, splits)

        def prepare(index: int, picture: Any) -> Row:
            prompt = self.engine.prepare(index, Request([picture])).inputs.tensors
            return row(learned.examples[index].place.image_id, prompt, learned.tokens[index])

        threads = 1 if self.device.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) // 2))
        return Pictures(learned.examples, located.root, recipe.frame, prepare, self.skipped, threads)

    def _trainer(self, pictures: Pictures, evaluated: Pictures | None, size: int, accumulate: int) -> Trainer:
        settings = self.settings
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(self.job.output / "tensorboard"))
        args = arguments(
            self.device,
            output_dir=str(self.checkpoints.staging),
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup,
            seed=settings.seed,
            data_seed=settings.seed,
            bf16=self._autocasts(),
            save_steps=settings.save_every,
            eval_strategy="no" if evaluated is None else "steps",
            eval_steps=None if evaluated is None else settings.eval_every,
            report_to=["tensorboard"] if find_spec("tensorboard") else [],
        )
        callbacks = [Logging(self.log, self.report), self.stop]
        if settings.early_stopping is not None:
            callbacks += [EarlyStoppingCallback(settings.early_stopping), SaveEvaluated()]
        return Trainer(
            self.checkpoints,
            model=self.model,
            args=args,
            train_dataset=pictures,
            eval_dataset=evaluated,
            data_collator=Collator(self.pad),
            callbacks=callbacks,
        )

    def _autocasts(self) -> bool:
        """Whether to compute in bfloat16: where the GPU has it, unless the recipe demands float32."""
        return _has_bfloat16(self.device) and self.job.recipe.dtype != "float32"

    def _checkpoints_activations(self) -> bool:
        chosen = self.settings.checkpointing
        return self.device.type == "cuda" if chosen is None else chosen

    # --- training ---

    def _fit(self, learned: Learned) -> Trainer:
        with ExitStack() as stack:
            pictures = stack.enter_context(closing(self._pictures(learned)))
            of_evaluation = self.captions.learned(self.start.evaluated)
            evaluated = None
            if of_evaluation.examples:
                evaluated = stack.enter_context(closing(self._pictures(of_evaluation)))
            return self._fit_in_memory(pictures, evaluated)

    def _fit_in_memory(self, pictures: Pictures, evaluated: Pictures | None) -> Trainer:
        """Trains with the batch size that was chosen, or with the largest that fits in memory.

        Smaller batches change nothing else, since more of them then make a step. Several processes do not look for one:
        while one of them runs out of memory, the others wait for it in the middle of the step.
        """
        settings = self.settings
        per_step = max(1, EFFECTIVE_BATCH // processes.count())  # of this process
        size = settings.batch_size or min(MOST_AT_ONCE, per_step)
        if settings.batch_size:
            per_step = size * (settings.accumulate or 1)
        while True:
            trainer = self._trainer(pictures, evaluated, size, per_step // size)
            start = self.checkpoints.latest() or 0
            try:
                self._train(trainer)
                return trainer
            except RuntimeError as error:
                if not is_out_of_memory(error) or trainer.state.global_step > start:
                    raise
                if settings.batch_size or size == 1 or processes.count() > 1:
                    raise self._too_large(size) from error
            finally:
                trainer.stop_reading()
            size //= 2
            log.warning("out of memory: continuing with %d pictures at a time, and as many in a step", size)
            self.model.zero_grad()
            free_memory(self.device)

    def _train(self, trainer: Trainer) -> None:
        step = self.checkpoints.latest()
        if processes.is_main():
            self.log.rewind(step or 0)
        resumed = None if step is None else self.checkpoints.path(step)
        if resumed is not None:
            log.info("continuing after step %d", step)
            if self._is_over(state := TrainerState.load_from_json(str(resumed / TRAINER_STATE_NAME))):
                trainer._load_from_checkpoint(str(resumed))
                trainer.state = state
                return
        with _asking_to_stop(self.stop):
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))

    def _is_over(self, state: TrainerState) -> bool:
        """Whether a checkpoint is the last one, from which Trainer would go on for one more step."""
        early = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        counter = early["attributes"]["early_stopping_patience_counter"] if isinstance(early, dict) else 0
        return state.global_step >= state.max_steps or counter >= (self.settings.early_stopping or 1)

    def _too_large(self, size: int) -> ModelError:
        """Names the option that lowers the memory most, of those that are left."""
        advice = (
            "--batch-size 1 --accumulate N for the same pictures in a step"
            if size > 1
            else "--checkpointing"
            if not self._checkpoints_activations()
            else "--method lora"
            if self.settings.method == "full"
            else "--load-in 4bit"
            if self.job.recipe.load_in is None and self.device.type == "cuda"
            else f"--max-pixels {self.job.recipe.max_pixels // 2}"
        )
        return ModelError(f"Out of memory at the first step. What lowers it most now is {advice}.")

    def _finish(self, trainer: Trainer, learned: Learned) -> None:
        """Writes the result: the latest weights or, with early stopping, those that did best in the evaluations."""
        steps, best = trainer.state.global_step, trainer.state.best_global_step
        if self.settings.early_stopping is not None and best and best in self.checkpoints.steps():
            trainer._load_from_checkpoint(str(self.checkpoints.path(best)))
            steps = best
        self.log.draw()
        packages = ["torch", "transformers", "accelerate"] + ["peft"] * (self.settings.method == "lora")
        facts = {
            "dataset": self.job.run.dataset,
            "dataset_revision": self.job.run.dataset_revision,
            "splits": [self.job.selection.split],
            "pictures": len(learned.examples),
            "pictures_digest": digest(learned.examples),
            "base": self.job.recipe.model,
            "base_revision": self.base_revision,
            "base_digest": self.base_digest,
            "plan": self.start.plan,
            "steps": steps,
            "seed": self.settings.seed,
            "skipped": self.skipped.counts(),
            "shortened": learned.shortened,
            "refused": learned.refused,
            "versions": {"rococap": __version__} | {name: version(name) for name in packages},
        }
        result.write(self.job.output, self.model, self.job.recipe, facts)
        self.checkpoints.clear()


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _weights_dtype(recipe: Recipe, settings: Settings, device: torch.device) -> Any:
    """The dtype of the weights: bfloat16 for those that a LoRA leaves alone, where the GPU has it, and else float32.

    Trained weights are float32: in bfloat16, most updates would be rounded away.
    """
    if settings.method == "full" or recipe.dtype == "float32":
        return "float32"
    return "bfloat16" if _has_bfloat16(device) else "float32"


@contextmanager
def _asking_to_stop(stop: Stop) -> Iterator[None]:
    """While the block runs, a signal asks to save and stop after the step under way, and a second one interrupts."""

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_asked:
            raise KeyboardInterrupt
        stop.is_asked = True
        log.info("stopping after this step; a second signal stops at once, back to the last checkpoint")

    try:
        before: dict[signal.Signals, Any] = {one: signal.signal(one, handle) for one in STOP_SIGNALS}
    except ValueError:  # outside the main thread nothing can be set
        yield
        return
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
