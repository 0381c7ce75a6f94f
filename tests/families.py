"""A small model of every family, with the architecture and the file formats of the one on the hub.

The weights are random, but large enough that the captions depend on the picture.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GenerationConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from rococap.demo import MODEL

CHAT = """\
{%- for message in messages -%}
{{ START }}{{ message['role'] }}
{% for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ IMAGE }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{{ END }}
{% endfor -%}
{%- if add_generation_prompt -%}{{ START }}assistant
{% endif -%}
"""
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SIDE = 56
"""Side of a tile in pixels, for families that cut pictures into tiles; a tile is (56 / 14 / 2)² = 4 visual tokens."""


def _tokenizer(end: str = "<|im_end|>", **names: str) -> Any:
    """The demo model's byte-level BPE with the named special tokens of a family."""
    return AutoTokenizer.from_pretrained(MODEL, extra_special_tokens=names, eos_token=end)


def _chat(image: str, start: str = "<|im_start|>", end: str = "<|im_end|>") -> str:
    template = CHAT
    for name, token in {"START": start, "IMAGE": image, "END": end}.items():
        template = template.replace("{{ " + name + " }}", token)
    return template


def _save(folder: Path, processor: Any, model_class: type, config: Any) -> Path:
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # Gemma's are initialised to zero, which would hide the picture
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _text(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return TEXT | ids | {"vocab_size": len(tokenizer), "initializer_range": 0.3} | changes


def _token(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


QWEN_VISION = {"depth": 2, "num_heads": 4, "mlp_ratio": 4, "initializer_range": 0.3}
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    return {
        "image_token_id": _token(tokenizer, "<|image_pad|>"),
        "video_token_id": _token(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _token(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _token(tokenizer, "<|vision_end|>"),
    }


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen2_vl(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = Qwen2VLConfig(
        text_config=_text(tokenizer, rope_parameters=MROPE),
        vision_config=QWEN_VISION | {"embed_dim": 64, "hidden_size": 64},
        **_qwen_ids(tokenizer),
    )
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=_chat(QWEN_IMAGE)
    )
    return _save(folder, processor, Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    vision = {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config=_text(tokenizer, rope_parameters=MROPE),
        vision_config=QWEN_VISION | vision | {"window_size": 56},
        **_qwen_ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=_chat(QWEN_IMAGE)
    )
    return _save(folder, processor, Qwen2_5_VLForConditionalGeneration, config)


def qwen3_vl(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    vision = {"hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 128, "deepstack_visual_indexes": [0, 1]}
    config = Qwen3VLConfig(
        text_config=_text(tokenizer, rope_parameters=MROPE | {"mrope_interleaved": True}),
        vision_config=QWEN_VISION | vision | {"patch_size": 16, "num_position_embeddings": 256},
        **_qwen_ids(tokenizer),
    )
    images = Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=_chat(QWEN_IMAGE))
    return _save(folder, processor, Qwen3VLForConditionalGeneration, config)


def smolvlm(folder: Path) -> Path:
    classes = (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor, SmolVLMImageProcessor)
    return _tiles(folder, classes, SmolVLMVideoProcessor)


def idefics3(folder: Path) -> Path:
    classes = (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, Idefics3ImageProcessor)
    return _tiles(folder, classes)


def _tiles(folder: Path, classes: tuple[Any, ...], *video: Any) -> Path:
    config_class, model_class, processor_class, image_class = classes
    end = "<end_of_utterance>"
    grid = {f"row_{row}_col_{column}": f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)}
    tokenizer = _tokenizer(
        end,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token=end,
        **grid,
    )
    config = config_class(
        text_config=_text(tokenizer) | {"model_type": "llama"},
        vision_config=SIGLIP | {"image_size": SIDE},
        image_token_id=_token(tokenizer, "<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    size = {"max_image_size": {"longest_edge": SIDE}, "size": {"longest_edge": 4 * SIDE}}
    processor = processor_class(
        image_class(do_image_splitting=True, **size),
        tokenizer,
        *(one(**size) for one in video),
        image_seq_len=4,
        chat_template=_chat("<image>", end=end),
    )
    return _save(folder, processor, model_class, config)


SIGLIP = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
    "initializer_range": 0.3,
}


def internvl(folder: Path) -> Path:
    tokenizer = _tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    side = {"height": SIDE, "width": SIDE}
    config = InternVLConfig(
        text_config=_text(tokenizer) | {"model_type": "qwen2"},
        vision_config=SIGLIP | {"image_size": [SIDE, SIDE], "patch_size": [14, 14], "layer_scale_init_value": 1.0},
        image_token_id=_token(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=12),
        tokenizer,
        InternVLVideoProcessor(size=side),
        image_seq_length=4,
        chat_template=_chat("<IMG_CONTEXT>\n"),
    )
    return _save(folder, processor, InternVLForConditionalGeneration, config)


def gemma3(folder: Path) -> Path:
    tokenizer = _tokenizer(
        "<end_of_turn>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
        start_token="<start_of_turn>",
        end_token="<end_of_turn>",
    )
    config = Gemma3Config(
        text_config=_text(tokenizer, sliding_window=32, query_pre_attn_scalar=16),
        vision_config=SIGLIP | {"image_size": SIDE, "vision_use_head": False},
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        boi_token_index=_token(tokenizer, "<start_of_image>"),
        eoi_token_index=_token(tokenizer, "<end_of_image>"),
        image_token_id=_token(tokenizer, "<image_soft_token>"),
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        chat_template=_chat("<start_of_image>", "<start_of_turn>", "<end_of_turn>"),
        image_seq_length=4,
    )
    return _save(folder, processor, Gemma3ForConditionalGeneration, config)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    build.__name__: build for build in (qwen2_vl, qwen2_5_vl, qwen3_vl, smolvlm, internvl, gemma3)
}


def as_published_in_2024(folder: Path) -> Path:
    """The demo model in the file layout in which Qwen published Qwen2-VL: a flat config with the older names."""
    folder.mkdir()
    config, processor, tokenizer = (
        json.loads((MODEL / name).read_text())
        for name in ("config.json", "processor_config.json", "tokenizer_config.json")
    )
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope, layers = text.pop("rope_parameters"), text.pop("layer_types")
    older = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    older |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.41.2", "num_hidden_layers": len(layers)}
    _write(folder / "config.json", text | config | older | {"vision_config": vision, "model_type": "qwen2_vl"})
    images = processor["image_processor"]
    del images["size"]
    images |= {"min_pixels": 3_136, "max_pixels": 12_845_056, "processor_class": "Qwen2VLProcessor"}
    _write(folder / "preprocessor_config.json", images)
    _write(folder / "chat_template.json", {"chat_template": (MODEL / "chat_template.jinja").read_text()})
    sampling = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05}
    ends = {"bos_token_id": text["pad_token_id"], "eos_token_id": [text["eos_token_id"], text["pad_token_id"]]}
    _write(folder / "generation_config.json", sampling | ends | {"pad_token_id": text["pad_token_id"]})
    _write_tokenizer(folder, tokenizer)
    _write_shards(folder)
    return folder


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2))


def _write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    whole = json.loads((MODEL / "tokenizer.json").read_text())
    added = [token["content"] for token in whole["added_tokens"]]
    vocabulary = {token: i for token, i in whole["model"]["vocab"].items() if token not in added}
    _write(folder / "vocab.json", vocabulary)
    merges = "\n".join(" ".join(pair) for pair in whole["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    older = {"additional_special_tokens": config.pop("extra_special_tokens"), "tokenizer_class": "Qwen2Tokenizer"}
    del config["backend"], config["processor_class"]
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    older["added_tokens_decoder"] = {
        str(token["id"]): {name: token[name] for name in names} for token in whole["added_tokens"]
    }
    _write(folder / "tokenizer_config.json", config | older)


def _write_shards(folder: Path, n: int = 2) -> None:
    weights = load_file(MODEL / "model.safetensors")
    names = {name: f"model-{1 + i % n:05}-of-{n:05}.safetensors" for i, name in enumerate(sorted(weights))}
    for shard in sorted(set(names.values())):
        save_file({name: weights[name] for name in names if names[name] == shard}, folder / shard, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in weights.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": names})


PLACEHOLDERS = {
    "qwen2_vl": ("<|image_pad|>", "<|video_pad|>"),
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>"),
    "qwen3_vl": ("<|image_pad|>", "<|video_pad|>"),
    "smolvlm": ("<image>",),
    "internvl": ("<IMG_CONTEXT>",),
    "gemma3": ("<image_soft_token>", "<start_of_image>"),
}
"""The tokens of a prompt that a model takes for a picture."""
