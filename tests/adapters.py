"""Adapters for the demonstration model, as peft writes them."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from rococap.demo import MODEL


def write_adapter(folder: Path, **config: object) -> Path:
    """A LoRA with weights large enough to change what the demonstration model says."""
    base = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(20)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def beside(adapter: Path, folder: Path) -> Path:
    """The demonstration model in a folder where an adapter lies too."""
    model = Path(shutil.copytree(MODEL, folder))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, model / name)
    return model
