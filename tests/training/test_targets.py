"""Which weights are trained, and that gradients reach them."""

from functools import partial

import pytest
import torch
from families import FAMILIES
from PIL import Image
from training_steps import plain

from rococap.engines import Request
from rococap.errors import ModelError
from rococap.training import targets
from rococap.training.collate import Collator, loss, row
from rococap.training.settings import Settings


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return plain(FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model"))[1]


@pytest.fixture
def demo():
    return plain()


def parts(model, names):
    """Whether each module belongs to the language model."""
    language = {id(module) for module in model.get_decoder().modules()}
    return {id(model.get_submodule(name)) in language for name in names}


def test_a_lora_is_put_on_the_language_models_layers_by_default(model):
    names = targets.modules(model, "language")
    assert parts(model, names) == {True}
    kinds = {name.rpartition(".")[2] for name in names}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= kinds


def test_on_request_it_is_put_on_the_vision_tower_and_what_joins_the_two(model):
    language, both = (targets.modules(model, target) for target in ("language", "language+vision"))
    vision = set(both) - set(language)
    assert set(language) < set(both)
    assert parts(model, vision) == {False}
    assert not any(model.get_submodule(name) is model.get_output_embeddings() for name in both)


def test_modules_are_chosen_by_the_end_of_their_names(demo):
    names = targets.modules(demo[1], "q_proj, mlp.down_proj")
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "down_proj"}
    assert len(names) == 6


def test_a_head_that_shares_its_weights_with_the_embeddings_is_refused_with_the_reason(demo):
    for name in ("lm_head", "q_proj,embed_tokens"):
        with pytest.raises(ModelError, match=r"shares its weights with the model's .* would be lost when it is saved"):
            targets.modules(demo[1], name)


def test_a_name_that_no_layer_has_is_refused_with_those_that_exist(demo):
    with pytest.raises(ModelError, match=r"no linear layer 'qproj'.* down_proj, .*q_proj"):
        targets.modules(demo[1], "q_proj,qproj")


def test_full_tuning_leaves_the_vision_tower_alone_unless_it_is_named(demo):
    model = targets.prepared(demo[1], Settings(method="full"))
    frozen = {name.split(".")[1] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"visual"}
    model = targets.prepared(demo[1], Settings(method="full", target="language+vision"))
    assert all(weight.requires_grad for weight in model.parameters())


def gradients(settings, *, checkpointing):
    """The gradients of one batch of the demonstration model, by the name of the weight."""
    engine, model = plain()
    torch.manual_seed(0)
    model = targets.prepared(model, settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)  # with zeros, as they begin, lora_A would have no gradients
    if checkpointing:
        targets.checkpoint_activations(model)
    model.train()
    batch = batch_of(engine)
    loss(model(**batch | {"labels": None}), batch["labels"], 3).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def batch_of(engine):
    prompt = engine.prepare(0, Request([Image.linear_gradient("L").convert("RGB").resize((90, 60))])).inputs.tensors
    batch = Collator(0)([row("one", prompt, [10, 11, 12])])
    del batch["image_ids"]
    return batch


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_reach_the_vision_tower_under_checkpointing_as_without(method):
    of = partial(gradients, Settings(method=method, target="language+vision", dropout=0.0))
    plainly, checkpointed = of(checkpointing=False), of(checkpointing=True)
    assert sum("visual" in name for name in checkpointed) > 20
    assert [name for name, grad in checkpointed.items() if grad is None or not grad.any()] == []
    for name, grad in checkpointed.items():
        torch.testing.assert_close(grad, plainly[name], msg=name)


def test_a_frozen_vision_tower_has_no_backward_pass_under_checkpointing(demo):
    engine, base = demo
    model = targets.prepared(base, Settings())
    targets.checkpoint_activations(model)
    seen = []
    base.model.visual.register_forward_hook(lambda module, inputs, output: seen.append(output[0].requires_grad))
    batch = batch_of(engine)
    assert model.train()(**batch | {"labels": None}).logits.requires_grad
    assert seen == [False]
