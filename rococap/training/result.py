"""Writes the result of a training: a folder that captions like any other model or adapter, and says what made it."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoProcessor

from rococap.data import HUB_ID
from rococap.engines import Options
from rococap.engines.files import last_part
from rococap.engines.hf import TransformersEngine
from rococap.errors import RococapError
from rococap.files import cannot_write, fsync, read_json, write_json
from rococap.recipe import Recipe
from rococap.results.manifest import MODEL_CARD, SCORES_BEGIN, SCORES_END, TRAINING


def read(folder: Path) -> dict[str, Any] | None:
    """What a finished training wrote about itself; None if there is none in the folder."""
    return read_json(folder / TRAINING)


def write(folder: Path, model: Any, recipe: Recipe, facts: dict[str, Any]) -> None:
    """Writes the trained weights, the processor with its chat template, the model card and the marker.

    They appear file by file, the marker last: until then, training continues from its last checkpoint. Raises
    RococapError if they cannot be written.
    """
    partial = folder / ".result.part"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _save(model, partial)
        # As published: the one that training used has the recipe's bounds, which every run sets for itself.
        processor = AutoProcessor.from_pretrained(
            recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
        )
        processor.save_pretrained(partial)
        (partial / MODEL_CARD).write_text(_card(facts), encoding="utf-8")
        for path in sorted(partial.rglob("*")):
            fsync(path)
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)
        partial.rmdir()
        write_json(folder / TRAINING, facts)
    except (OSError, SafetensorError) as error:
        reason = error if isinstance(error, OSError) else OSError(str(error))
        raise cannot_write(folder, reason) from error


def _save(model: Any, folder: Path) -> None:
    vars(model.config).pop("use_cache", None)  # which Trainer turned off
    model.save_pretrained(folder)


def merge(adapter: Path, output: Path) -> None:
    """Writes a whole model in float32: the base of a finished LoRA, with the LoRA added to its weights.

    Raises RococapError if there is no such LoRA, or if the output folder is not empty, and ModelError if the base is
    not available.
    """
    facts = read(adapter) if adapter.is_dir() else None
    if facts is None or facts["plan"]["method"] != "lora" or facts.get("merged"):
        raise RococapError(f"{adapter} holds no LoRA of a finished training: name the --output of one.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RococapError(f"{output} exists and is not empty: choose another folder with --output.")
    plan = {name: facts["plan"][name] for name in ("model", "revision", "trust_remote_code", "prompt")}
    recipe = Recipe(**plan, adapter=str(adapter), dtype="float32")
    model, _ = TransformersEngine(recipe, Options(device="cpu")).load_plain()
    output.mkdir(parents=True, exist_ok=True)
    write(output, model, recipe, facts | {"merged": True})


def _card(facts: dict[str, Any]) -> str:
    """A model card for the hub. A folder is named by its last part only: paths are nobody else's business."""
    plan, base = facts["plan"], facts["base"]
    is_lora = plan["method"] == "lora" and not facts.get("merged")
    shown_base = base if HUB_ID.fullmatch(base) else last_part(base)
    dataset = facts["dataset"] if HUB_ID.fullmatch(facts["dataset"]) else last_part(facts["dataset"])
    head = {
        "license": "cc-by-nc-sa-4.0",
        **({"base_model": base} if HUB_ID.fullmatch(base) else {}),
        **({"datasets": [facts["dataset"]]} if HUB_ID.fullmatch(facts["dataset"]) else {}),
        **({"library_name": "peft"} if is_lora else {"library_name": "transformers"}),
        "pipeline_tag": "image-text-to-text",
        "tags": ["radiology", "image-captioning"],
    }
    front = "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items())
    what = "A LoRA for" if is_lora else "A LoRA merged into" if facts.get("merged") else "All weights of"
    rows = "\n".join(f"| {name} | {plan[name]} |" for name in sorted(plan) if name not in ("model", "dataset"))
    captions = "the original captions" if plan["targets"] is None else f"the captions of run {plan['targets']}"
    return f"""---
{front}
---

# {shown_base}, fine-tuned on {dataset}

{what} {shown_base}, trained with rococap {facts["versions"]["rococap"]} on {facts["pictures"]:,} pictures of
{", ".join(facts["splits"])} of {dataset} and {captions}, in {facts["steps"]:,} steps.

**Not for clinical use.** It writes text that looks like a radiologist's and may be wrong.

The captions of ROCOv2 are licensed CC BY-NC-SA 4.0, and so is what was learned from them. The licence of the base model
applies as well.

## Scores

{SCORES_BEGIN}

Not evaluated yet: `rococap evaluate --run RUN --split test --card DIR` writes them here. It was trained on
{", ".join(facts["splits"])}, so evaluate another split.

{SCORES_END}

## Recipe

| setting | value |
| --- | --- |
{rows}

`{TRAINING}` holds the same, the versions of the libraries, and digests of the base model and of the pictures.
"""
