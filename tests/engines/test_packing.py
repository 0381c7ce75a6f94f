"""Large linear layers with packed weights: the same products, and the same captions."""

import pytest
import torch
from engine_steps import captions, mixed_pictures, stock_answers, texts
from families import qwen2_vl
from torch import nn
from torch.nn.functional import linear

from rococap.engines import Options, Request, packing
from rococap.engines.hf import TransformersEngine
from rococap.recipe import Recipe


def is_packed(layer: nn.Module) -> bool:
    return layer.forward.__qualname__.startswith("_pack")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (16, 1), (7, 40)])
def test_a_packed_layer_multiplies_as_before(shape, bias):
    layer = nn.Linear(700, 640, bias=bias)
    packing.pack(layer)
    assert is_packed(layer)
    rows = torch.randn(*shape, 700)
    with torch.inference_mode():
        assert torch.allclose(layer(rows), linear(rows, layer.weight, layer.bias), atol=1e-4)


def test_small_layers_other_types_and_what_does_not_fit_stay_as_they_are(monkeypatch):
    large, half = nn.Linear(700, 640), nn.Linear(700, 640, dtype=torch.bfloat16)
    model = nn.ModuleList([nn.Linear(128, 384), half, large])
    with monkeypatch.context() as changed:
        changed.setattr(packing, "_available", lambda: 2 * large.weight.nbytes - 1)
        packing.pack(model)
    assert [is_packed(layer) for layer in model] == [False, False, False]
    packing.pack(model)
    assert [is_packed(layer) for layer in model] == [False, False, True]


def test_an_engine_with_packed_layers_says_what_the_stock_model_says(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LARGE", 1)
    folder = qwen2_vl(tmp_path)
    engine = TransformersEngine(
        Recipe(model=str(folder), dtype="float32", max_new_tokens=24), Options(device="cpu", batch_size=5)
    )
    engine.load()
    assert is_packed(engine.loaded.model.lm_head)
    images = mixed_pictures()[:6]
    assert texts(captions(engine, images)) == stock_answers(folder, engine, [Request([image]) for image in images])
