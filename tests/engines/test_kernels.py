"""Fewer kernels for the same captions, with every family and with what must stay as it is."""

import logging
from pathlib import Path

import engine_steps
import pytest
import torch
from engine_steps import captions, mixed_pictures, texts
from families import FAMILIES
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForImageTextToText

from rococap.demo import MODEL
from rococap.engines import kernels
from rococap.engines.kernels import _Part, compile_vision, reduce_kernels

CPU = torch.device("cpu")


def model_at(folder: Path) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_projections_of_one_input_become_one_product(family, tmp_path):
    model = model_at(FAMILIES[family](tmp_path))
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "gate_proj"))]
    assert names
    before = sum(parameter.numel() for parameter in model.parameters())
    reduce_kernels(model, CPU)
    modules = dict(model.named_modules())
    assert {type(modules[name]) for name in names} == {_Part}
    assert sum(parameter.numel() for parameter in model.parameters()) == before


def test_a_part_of_a_product_belongs_to_the_input_it_is_asked_for():
    layer = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer, name, nn.Linear(8, 4))
    expected = {name: getattr(layer, name) for name in ("q_proj", "k_proj", "v_proj")}
    kernels._merge(layer, ("q_proj", "k_proj", "v_proj"))
    first, second = torch.randn(3, 8), torch.randn(3, 8)
    with torch.inference_mode():
        for name, rows in (("q_proj", first), ("k_proj", second), ("v_proj", first), ("k_proj", first)):
            assert torch.allclose(getattr(layer, name)(rows), expected[name](rows), atol=1e-5)


def test_layers_that_are_not_plain_stay_as_they_are():
    class Adapted(nn.Linear):
        """As PEFT's and bitsandbytes' layers are: a class of their own."""

    layer = nn.Module()
    layer.q_proj, layer.k_proj, layer.v_proj = nn.Linear(8, 4), Adapted(8, 4), nn.Linear(8, 4)
    layer.gate_proj, layer.up_proj = nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
    reduce_kernels(layer, CPU)
    assert type(layer.q_proj) is nn.Linear
    assert type(layer.gate_proj) is nn.Linear


def test_only_norms_that_are_plain_are_fused(tmp_path):
    gemma = model_at(FAMILIES["gemma3"](tmp_path))
    reduce_kernels(gemma, CPU)
    norms = [module for module in gemma.modules() if type(module).__name__ == "Gemma3RMSNorm"]
    assert norms
    assert not any("forward" in vars(norm) for norm in norms), "Gemma's multiplies by one plus the weight"
    model = model_at(MODEL)
    reduce_kernels(model, CPU)
    norms = [module for module in model.modules() if type(module).__name__ == "Qwen2VLRMSNorm"]
    assert all("forward" in vars(norm) for norm in norms)


def test_norms_of_another_form_stay_as_they_are():
    class UnscaledRMSNorm(nn.Module):
        eps = 1e-6

        def forward(self, rows):
            return rows

    class GatedRMSNorm(nn.RMSNorm):
        def forward(self, rows, gate):
            return super().forward(rows) * gate

    model = nn.ModuleList([UnscaledRMSNorm(), GatedRMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)])
    reduce_kernels(model, CPU)
    assert not any("forward" in vars(norm) for norm in model)


def test_projections_of_several_types_stay_as_they_are():
    layer = nn.Module()
    layer.gate_proj, layer.up_proj = nn.Linear(8, 4), nn.Linear(8, 4, dtype=torch.bfloat16)
    reduce_kernels(layer, CPU)
    assert type(layer.gate_proj) is nn.Linear


def test_captions_with_fewer_kernels_are_those_of_the_model_as_it_comes(monkeypatch):
    images = mixed_pictures()
    ours = engine_steps.loaded()
    monkeypatch.setattr("rococap.engines.hf.reduce_kernels", lambda model, device: None)
    theirs = engine_steps.loaded()
    assert not any(isinstance(module, _Part) for module in theirs.loaded.model.modules())
    assert texts(captions(ours, images)) == texts(captions(theirs, images))


@pytest.mark.slow
def test_captions_with_a_compiled_vision_tower_are_those_without(monkeypatch):
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    plain = modeling_qwen2_vl.apply_rotary_pos_emb_vision
    monkeypatch.setattr(modeling_qwen2_vl, "apply_rotary_pos_emb_vision", plain)  # undone at the end
    engine = engine_steps.loaded()
    expected = texts(captions(engine, mixed_pictures()))
    assert compile_vision(engine.loaded.model)
    assert modeling_qwen2_vl.apply_rotary_pos_emb_vision is not plain
    compiled = counters["stats"]["unique_graphs"]
    assert texts(captions(engine, mixed_pictures())) == expected
    assert counters["stats"]["unique_graphs"] == compiled, "pictures waited for another compilation"


def test_a_vision_tower_that_cannot_be_compiled_stays_as_it_is_and_the_log_says_so(monkeypatch, caplog):
    def no_compiler(function: object, dynamic: bool) -> object:
        def refuse(*args: object) -> None:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nDetails")

        return refuse

    monkeypatch.setattr(torch, "compile", no_compiler)
    engine = engine_steps.loaded()
    with caplog.at_level(logging.WARNING):
        assert not compile_vision(engine.loaded.model)
    assert caplog.messages == [
        "the vision tower is not compiled, so that reading pictures is slower: "
        "Failed to find C compiler. Please specify via CC environment variable."
    ]
    assert all(completion.text for completion in captions(engine, mixed_pictures()[:2]))
