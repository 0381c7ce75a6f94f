"""Chooses which weights of a model are trained: by parts of the model, or by names of modules."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from rococap.engines.weights import language_layers
from rococap.errors import ModelError
from rococap.training.settings import Settings


def prepared(model: Any, settings: Settings) -> Any:
    """Returns the model with the weights to train enabled, or with a new LoRA on them, and all others frozen.

    Raises ModelError for modules that do not exist or cannot be trained.
    """
    if settings.method == "full":
        _enable(model, with_vision=settings.target == "language+vision")
        return model
    from peft import LoraConfig, get_peft_model

    names = modules(model, settings.target)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names)
    return get_peft_model(model, config)


def checkpoint_activations(model: Any) -> None:
    """Makes the model compute its activations a second time in the backward pass, instead of keeping them.

    transformers also makes the outputs of all embeddings require gradients, which only its older kind of checkpoints
    needs. A frozen vision tower would then keep its activations as well, and have a backward pass.
    """
    # The second name is that of transformers before 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


def modules(model: Any, target: str) -> list[str]:
    """The full names of the linear layers that a LoRA is put on."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    if target == "language":
        language = language_layers(model)
        return [name for name, module in linear.items() if module in language]
    if target == "language+vision":
        return [name for name, module in linear.items() if module is not head]
    return _named(model, linear, target)


def _named(model: Any, linear: dict[str, nn.Linear], target: str) -> list[str]:
    wanted = [part.strip() for part in target.split(",") if part.strip()]
    for part in wanted:
        _refuse_tied(model, part)
        if not _matching(linear, part):
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise ModelError(
                f"--target: the model has no linear layer {part!r}. Name the end of some layers' names, such as "
                f"{', '.join(kinds)}, or language, or language+vision."
            )
    return [name for name in linear if any(_matching([name], part) for part in wanted)]


def _matching(names: Iterable[str], part: str) -> list[str]:
    return [name for name in names if name == part or name.endswith(f".{part}")]


def _refuse_tied(model: Any, part: str) -> None:
    """Raises ModelError for a head that shares its weights with the embeddings.

    PEFT trains one of the two and, with only a warning, saves neither: loaded again, the model says something else.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embeddings is None or head.weight is not embeddings.weight:
        return
    tied = [name for name, module in model.named_modules() if module in (head, embeddings)]
    if _matching(tied, part):
        raise ModelError(
            f"--target: {part} shares its weights with the model's {' and '.join(tied)}, so a LoRA on it would be lost "
            "when it is saved. Leave it out, or train all weights: --method full"
        )


def _enable(model: Any, *, with_vision: bool) -> None:
    head = model.get_output_embeddings()
    language = _ids([model.get_decoder(), *([] if head is None else [head])])
    for parameter in model.parameters():
        parameter.requires_grad_(with_vision or id(parameter) in language)


def _ids(parts: Sequence[nn.Module]) -> set[int]:
    return {id(parameter) for part in parts for parameter in part.parameters()}
