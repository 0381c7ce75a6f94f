"""Makes a Qwen2-VL of 105 million parameters with random weights, to measure the cost of a larger model: its captions
are meaningless.
"""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from rococap.demo import MODEL

VOCABULARY = 32_768


def write_105m(folder: Path) -> Path:
    """Writes a larger model with the processor and tokenizer of the demo model. As in Qwen2-VL-7B, the vision tower has
    a twelfth of the parameters. Returns `folder`.
    """
    shutil.copytree(MODEL, folder)
    (folder / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(MODEL)
    text = {"vocab_size": VOCABULARY, "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 13}
    text |= {"num_attention_heads": 10, "num_key_value_heads": 2, "initializer_range": 0.02}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    vision = {"depth": 8, "embed_dim": 256, "hidden_size": 640, "num_heads": 4, "initializer_range": 0.02}
    vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": 1e4}
    text = config.text_config.to_dict() | text
    del text["layer_types"]
    config = type(config)(
        **{k: v for k, v in config.to_dict().items() if k not in ("text_config", "vision_config", "dtype")},
        text_config=text,
        vision_config=config.vision_config.to_dict() | vision,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def n_parameters(folder: Path) -> int:
    return sum(p.numel() for p in Qwen2VLForConditionalGeneration.from_pretrained(folder).parameters())
