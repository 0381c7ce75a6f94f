"""A model's chat template: the prompt that it makes from a picture and a question, and the token that ends an answer.

transformers reads it from a Jinja file, chat_template.json, processor_config.json or tokenizer_config.json. Loads
nothing: the processor is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rococap.engines import Message, files
from rococap.errors import ModelError, PictureError

OF_PROCESSOR = ("chat_template.json", "chat_template.jinja")
"""In the order of precedence in transformers."""
ADVICE = "Copy the chat template of the model that it was trained from, or name another with --model."
PARTS_AS_TEXT = ("'type': 'image'", '"type": "image"')
"""What a template that prints the list of a message's parts, as repr or as JSON, leaves in the prompt."""
OF_A_PICTURE = ("image_token", "boi_token")
"""If a processor has both, a template may use either."""
ANSWER = "an answer"


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template. `called` is its name in messages."""

    processor: Any
    called: str
    text: str

    def render(self, messages: Sequence[Message], *, asks: bool) -> str:
        """Renders messages, with the beginning of an answer if it `asks`. Raises ModelError if the template fails."""
        try:
            return str(
                self.processor.apply_chat_template(
                    list(messages), chat_template=self.text, tokenize=False, add_generation_prompt=asks
                )
            )
        except Exception as error:  # a template is foreign code: its expressions may raise anything
            raise ModelError(f"{self.called} cannot take a picture and a prompt: {_reason(error)}. {ADVICE}") from error


def chat_prompt(processor: Any, prompt: str, name: str) -> str:
    """Returns the prompt for one picture. `name` is the model's.

    Raises ModelError, naming the template, if it drops the picture or the prompt, and for a prompt that contains a
    picture's token.
    """
    files.refuse_placeholders(prompt, _tokens(processor, files.PLACEHOLDERS), name)
    template = _template(processor, name)
    text = template.render([question(prompt)], asks=True)
    if any(parts in text for parts in PARTS_AS_TEXT):
        raise ModelError(f"{template.called} renders the picture as text. {ADVICE}")
    pictures = _tokens(processor, OF_A_PICTURE)
    if pictures and not any(token in text for token in pictures):
        raise ModelError(f"{template.called} leaves the picture out. {ADVICE}")
    if not _holds(text, prompt):
        raise ModelError(f"{template.called} leaves the prompt out. {ADVICE}")
    return text


def messages_prompt(processor: Any, messages: Sequence[Message], name: str) -> str:
    """Returns the prompt for the messages of a Request, with the beginning of an answer. `name` is the model's.

    Raises PictureError if the template cannot take them or drops a picture, a question or an instruction, and for a
    text that contains a picture's token.
    """
    template, placeholders = _template(processor, name), _tokens(processor, files.PLACEHOLDERS)
    try:
        for _, text in _texts(messages):
            files.refuse_placeholders(text, placeholders, name)
        prompt = template.render(messages, asks=True)
    except ModelError as error:
        cause = error.__cause__
        reason = f"{template.called} cannot take these messages: {_reason(cause)}." if cause else str(error)
        raise PictureError("unprocessable", reason) from error
    if lack := _lack(prompt, messages, _tokens(processor, OF_A_PICTURE)):
        raise PictureError("unprocessable", f"{template.called} {lack}.")
    return prompt


def _texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """The role and text of every part that is a text."""
    parts = ((message["role"], part) for message in messages for part in message["content"])
    return [(role, part["text"]) for role, part in parts if part["type"] == "text"]


def _lack(prompt: str, messages: Sequence[Message], picture_tokens: set[str]) -> str:
    """What the template dropped from the messages; "" if it dropped nothing."""
    n_pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
    n_places = sum(prompt.count(token) for token in picture_tokens)
    if picture_tokens and n_places < n_pictures:
        return f"has places for {n_places} of the {n_pictures} pictures in these messages"
    # Some templates rewrite earlier answers on purpose, for example without their reasoning.
    lost = next((text for role, text in _texts(messages) if role != "assistant" and not _holds(prompt, text)), None)
    return "" if lost is None else f"leaves a part of these messages out: {lost[:60]!r}"


def turn_end(processor: Any, name: str) -> int | None:
    """Returns the token that the template puts after an answer, even if that begins the next question.

    None if there is no such token, or if the template cannot take an answer.
    """
    for content, more in product(([{"type": "text", "text": ANSWER}], ANSWER), ([], [question("another")])):
        try:
            messages = [question("a question"), {"role": "assistant", "content": content}, *more]
            text = _template(processor, name).render(messages, asks=False)
        except ModelError:
            continue
        _, answer, rest = text.rpartition(ANSWER)
        if answer and (end := _first_special(processor.tokenizer, rest)) is not None:
            return end
    return None


def question(prompt: str) -> Message:
    """The message in which captioning asks the prompt about a picture."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}


def _holds(text: str, part: str) -> bool:
    """Whether a text contains a part. White space is not compared: some templates strip it."""
    return " ".join(part.split()) in " ".join(text.split())


def _reason(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')}"


def _first_special(tokenizer: Any, text: str) -> int | None:
    """The first special token in a text. Tokens added in training count, although their files do not mark them so."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    special |= set(tokenizer.all_special_ids)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((id for id in ids if id in special), None)


def _template(processor: Any, name: str) -> Template:
    found = processor.chat_template or processor.tokenizer.chat_template
    if not found:
        raise ModelError(f"{name} has no chat template, so it does not follow prompts. Name an instruct model.")
    called = f"The chat template of {name}" + (f" ({place})" if (place := _place(processor, Path(name))) else "")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if not isinstance(found, dict):
        return Template(processor, called, found)
    if "default" not in found and len(found) > 1:
        raise ModelError(
            f"{name} has several chat templates, none of which is its default: {', '.join(sorted(found))}. Copy the "
            "one that takes pictures to chat_template.jinja beside its config.json."
        )
    chosen = "default" if "default" in found else next(iter(found))
    return Template(processor, f"{called}, {chosen!r}", found[chosen])


def _place(processor: Any, folder: Path) -> str:
    """The file that the template is in; "" for a model on the hub."""
    if not folder.is_dir():
        return ""
    if not processor.chat_template:
        return "tokenizer_config.json"
    config = folder / "processor_config.json"
    if config.is_file() and files.read(config).get("chat_template"):
        return config.name
    return next((file for file in OF_PROCESSOR if (folder / file).is_file()), "")


def _tokens(processor: Any, names: Sequence[str]) -> set[str]:
    """The tokens that the processor and its tokenizer have under these names."""
    owners = (processor, processor.tokenizer)
    return {text for owner in owners for name in names if (text := files.text_of(getattr(owner, name, None))).strip()}
