"""Requests: messages with pictures, limits of their own, and tokens that are told as they come."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from engine_steps import (
    PHANTOMS,
    Pictures,
    Requests,
    answers,
    captions,
    memory_for,
    message,
    mixed_pictures,
    stock_answers,
    text,
    texts,
)
from PIL import Image

from rococap.demo import MODEL
from rococap.engines import Message, Options, Request
from rococap.engines.hf import SHRINK, TransformersEngine
from rococap.errors import PictureError
from rococap.recipe import Recipe

RECIPE = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
IMAGE = {"type": "image"}


def user(*parts: Any) -> Message:
    return message("user", *parts)


CAPTION = [user(IMAGE, text(RECIPE.prompt))]
TALK: list[Message] = [
    {"role": "system", "content": [text("You are a radiologist.")]},
    user(text("Compare this"), IMAGE, text("with this"), IMAGE),
    {"role": "assistant", "content": [text("Both show a lung.")]},
    user(text("And this?"), IMAGE),
]


@pytest.fixture(scope="module", params=["continuous", "static"])
def engine(request) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(RECIPE, Options(device="cpu", batch_size=16, decode=request.param))
    engine.load()
    yield engine
    engine.close()


# --- messages --------------------------------------------------------------------------------------------------


def test_the_recipes_prompt_as_messages_is_answered_as_captioning_is_letter_by_letter(engine):
    images = mixed_pictures()
    whole = captions(engine, images, 5)
    asked = answers(engine, [Request([image], CAPTION if n % 3 else None) for n, image in enumerate(images)], 5)
    assert texts(asked) == texts(whole)
    assert [(c.prompt_tokens, c.new_tokens) for c in asked] == [(c.prompt_tokens, c.new_tokens) for c in whole]


def test_several_pictures_in_a_request_are_answered_as_by_the_stock_classes(engine):
    images = mixed_pictures()
    requests = [Request(images[n : n + 3], TALK, max_new_tokens=24) for n in range(0, 9, 3)]
    requests += [Request(images[n : n + 2], [user(IMAGE, text("or"), IMAGE)], max_new_tokens=24) for n in range(4)]
    said = texts(answers(engine, requests, 5))
    assert said == stock_answers(MODEL, engine, requests)
    assert len(set(said)) > 4


def test_a_system_message_and_several_turns_are_in_the_prompt_as_the_template_renders_them(engine):
    tensors = engine.prepare(1, Request(mixed_pictures()[:3], TALK)).inputs.tensors
    prompt = engine.processor.tokenizer.decode(tensors["input_ids"][0])
    assert re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", prompt) == (
        "<|im_start|>system\nYou are a radiologist.<|im_end|>\n"
        "<|im_start|>user\nCompare this<|vision_start|><|image_pad|><|vision_end|>with this"
        "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nBoth show a lung.<|im_end|>\n"
        "<|im_start|>user\nAnd this?<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    n_tokens = tensors["image_grid_thw"].prod(dim=1) // 4
    assert prompt.count("<|image_pad|>") == n_tokens.sum()
    assert len(set(n_tokens.tolist())) == 3, "pictures of one size could be swapped unnoticed"


BLANK = Image.new("RGB", (56, 56))
FORMS = {
    "no pictures": (
        lambda: Request([], [user(text("Hello?"))]),
        "pictures: there are 0, and the messages have places for 0",
    ),
    "two to caption": (lambda: Request([BLANK] * 2), "pictures: there are 2, and the messages have places for 1"),
    "too many": (lambda: Request([BLANK] * 4, TALK), "pictures: there are 4, and the messages have places for 3"),
    "too few": (lambda: Request([BLANK] * 2, TALK), "pictures: there are 2, and the messages have places for 3"),
    "no limit": (lambda: Request([BLANK], max_new_tokens=0), "max_new_tokens must be at least 1, not 0"),
    "no message": (
        lambda: Request([BLANK], [*CAPTION, "Hello?"]),
        "messages[1] must have a role and, as its content, a list of parts",
    ),
    "no role": (
        lambda: Request([BLANK], [{"content": [IMAGE]}]),
        "messages[0] must have a role and, as its content, a list of parts",
    ),
    "no parts": (
        lambda: Request([BLANK], [{"role": "system", "content": "Be brief."}, *CAPTION]),
        "messages[0] must have a role and, as its content, a list of parts",
    ),
    "a film": (
        lambda: Request([BLANK], [user(IMAGE, {"type": "video"})]),
        "messages[0] has a part that is neither an image nor a text",
    ),
    "no text": (
        lambda: Request([BLANK], [user(IMAGE, {"type": "text", "text": None})]),
        "messages[0] has a part that is neither an image nor a text",
    ),
    "half a letter": (lambda: Request([BLANK], [user(IMAGE, text("\ud83d"))]), "messages[0] is not valid Unicode"),
}


@pytest.mark.parametrize("what", FORMS)
def test_a_request_of_another_form_is_refused_with_the_message_that_is_at_fault(what):
    make, message = FORMS[what]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def error_of(engine: TransformersEngine, request: Request) -> str:
    with pytest.raises(PictureError) as caught:
        engine.prepare(1, request)
    assert caught.value.code == "unprocessable"
    return str(caught.value)


GOOD = (MODEL / "chat_template.jinja").read_text()
TEMPLATES = {
    "one picture": (
        GOOD.replace("part['type'] == 'image'", "part['type'] == 'image' and loop.first and message == messages[0]"),
        Request([BLANK] * 2, [user(IMAGE, text("or"), IMAGE)]),
        "has places for 1 of the 2 pictures in these messages.",
    ),
    "no system": (
        GOOD.replace("for message in messages", "for message in messages if message['role'] != 'system'"),
        Request([BLANK] * 3, TALK),
        "leaves a part of these messages out: 'You are a radiologist.'.",
    ),
    "refuses": (
        "{%- if messages | length > 1 %}{{ raise_exception('One question only.') }}{% endif %}" + GOOD,
        Request([BLANK] * 3, TALK),
        "cannot take these messages: TemplateError: One question only.",
    ),
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_what_a_template_cannot_render_or_drops_is_refused(engine, monkeypatch, what):
    template, request, fault = TEMPLATES[what]
    monkeypatch.setattr(engine.processor, "chat_template", template)
    engine.prepare(1, Request([BLANK], CAPTION))
    assert error_of(engine, request) == f"The chat template of {MODEL} (chat_template.jinja) {fault}"


def test_a_template_may_rewrite_an_earlier_answer(engine, monkeypatch):
    thinks = GOOD.replace("{{ part['text'] }}", "{{ part['text'].split('</think>')[-1] }}")
    monkeypatch.setattr(engine.processor, "chat_template", thinks)
    answer: Message = {"role": "assistant", "content": [text("<think>Hm.</think>A lung.")]}
    tensors = engine.prepare(1, Request([BLANK], [*CAPTION, answer, user(text("Sure?"))])).inputs.tensors
    assert "assistant\nA lung.<|im_end|>" in engine.processor.tokenizer.decode(tensors["input_ids"][0])


def test_a_text_that_holds_a_token_for_a_picture_is_refused(engine):
    assert error_of(engine, Request([BLANK], [user(IMAGE, text("Is <|image_pad|> one?"))])) == (
        f"prompt contains <|image_pad|>, which {MODEL} would take for one more picture. Leave it out: the chat "
        "template inserts the picture by itself."
    )


def test_pictures_that_the_processor_rejects_are_refused_together(engine):
    strip = Image.new("RGB", (1, 400))
    both = error_of(engine, Request([BLANK, strip], [user(IMAGE, IMAGE)]))
    assert both.startswith("The model's processor rejects these 2 pictures: ")
    assert error_of(engine, Request([strip])).startswith("The model's processor rejects this picture: ")


# --- limits ----------------------------------------------------------------------------------------------------


def test_a_requests_own_limit_holds_and_changes_no_neighbour(engine):
    images = mixed_pictures()
    whole = captions(engine, images, 1)
    limits = [None, 3, None, 1, 64, 7, None, 2, 10, None, 5, None]
    asked = [Request([image], max_new_tokens=limit) for image, limit in zip(images, limits, strict=True)]
    for full, cut, limit in zip(whole, answers(engine, asked, 5), limits, strict=True):
        assert full.finish_reason == "stop"
        if limit is None or limit >= full.new_tokens:
            assert (cut.text, cut.finish_reason, cut.new_tokens) == (full.text, "stop", full.new_tokens)
        else:
            assert (cut.finish_reason, cut.new_tokens) == ("length", limit)
            assert full.text.startswith(cut.text)
            assert len(cut.text) < len(full.text)
    assert sum(limit is not None and limit < full.new_tokens for full, limit in zip(whole, limits, strict=True)) == 6


def test_decoding_ends_with_the_largest_limit(engine):
    engine.decoder.limit = 16
    source = Requests(engine, [Request([image], max_new_tokens=2 + n) for n, image in enumerate(mixed_pictures()[:4])])
    assert [completion.new_tokens for completion in engine.run(source)] == [2, 3, 4, 5]
    assert source.steps == 5


def test_a_limit_above_the_recipes_is_refused(engine):
    assert error_of(engine, Request([BLANK], max_new_tokens=65)) == (
        "max_new_tokens must be at most 64, as in the recipe, not 65."
    )


def test_pictures_too_large_together_are_all_reduced_and_their_messages_and_limit_stay(engine):
    sizes = [(224, 448), (300, 200), (448, 448)]
    images = [phantom.image.convert("RGB").resize(size) for phantom, size in zip(PHANTOMS, sizes, strict=False)]
    sizes = [(round(SHRINK * width), round(SHRINK * height)) for width, height in sizes]
    smaller = [image.resize(size, Image.Resampling.LANCZOS) for image, size in zip(images, sizes, strict=True)]
    (expected,) = answers(engine, [Request(smaller, TALK, 5)])
    with memory_for(engine, tokens=expected.prompt_tokens):
        (answer,) = answers(engine, [Request(images, TALK, 5)])
    assert (answer.flags, answer.prompt_tokens) == ("fewer_pixels", expected.prompt_tokens)
    assert (answer.text, answer.finish_reason, answer.new_tokens) == (expected.text, "length", 5)


# --- tokens ----------------------------------------------------------------------------------------------------


class Listening(Requests):
    """A Source that is told tokens; `told` are those at each position, by job, and `calls` (step, job, start)."""

    def __init__(self, engine: TransformersEngine, requests: Sequence[Request]) -> None:
        super().__init__(engine, requests)
        self.told: dict[int, dict[int, int]] = {}
        self.calls: list[tuple[int, int, int]] = []

    def tokens(self, job_id: int, start: int, ids: Sequence[int]) -> None:
        self.calls.append((self.steps, job_id, start))
        for position, token in enumerate(ids, start):
            assert self.told.setdefault(job_id, {}).setdefault(position, token) == token, "it was another before"

    def all_of(self, job_id: int) -> list[int]:
        told = self.told.get(job_id, {})
        assert list(told) == list(range(len(told)))
        return list(told.values())


def asked_for_tokens() -> list[Request]:
    images = mixed_pictures()
    captioned = [Request([image], max_new_tokens=[None, 4, 1][n % 3]) for n, image in enumerate(images)]
    return [*captioned, Request(images[:3], TALK), Request(images[3:6], TALK, 9)]


def test_the_tokens_told_of_every_row_are_those_of_its_completion_and_come_before_it(engine):
    engine.decoder.limit = 5
    source = Listening(engine, asked_for_tokens())
    done = 0
    for completion in engine.run(source):
        told = source.all_of(completion.job_id)
        assert engine.processor.tokenizer.decode(told, skip_special_tokens=True) == completion.text
        assert len(told) == completion.new_tokens - (completion.finish_reason == "stop")
        done += 1
    assert done == len(asked_for_tokens())


def test_a_row_is_told_one_token_a_step_and_none_twice(engine):
    engine.decoder.limit = 5
    source = Listening(engine, asked_for_tokens())
    list(engine.run(source))
    for job_id in source.told:
        steps = [at for at, told, _ in source.calls if told == job_id]
        assert steps == sorted(set(steps))
        assert [start for _, told, start in source.calls if told == job_id] == list(range(len(steps)))


def test_a_row_that_begins_again_is_told_from_its_first_token_again(engine):
    requests = asked_for_tokens()
    expected = texts(answers(engine, requests, 1))
    engine.decoder.limit = 8
    source = Listening(engine, requests)
    step = source.step
    with ExitStack() as later:

        def fills_up(rows: int) -> set[int]:
            if source.steps == 10:
                later.enter_context(memory_for(engine, rows=2))
            return step(rows)

        source.step = fills_up
        completions = sorted(engine.run(source), key=lambda completion: completion.job_id)
    assert texts(completions) == expected
    starts = [start for _, job_id, start in source.calls if job_id == 0]
    n = completions[0].new_tokens - 1
    assert starts[-n:] == list(range(n))
    assert len(starts) > n
    for completion in completions:
        told = engine.processor.tokenizer.decode(source.all_of(completion.job_id), skip_special_tokens=True)
        assert told == completion.text


def test_an_abandoned_row_is_told_no_more_tokens(engine):
    engine.decoder.limit = 16
    source = Listening(engine, [Request([image]) for image in mixed_pictures()[:4]])
    step = source.step

    def loses(rows: int) -> set[int]:
        source.lost = {1} if source.steps >= 3 else set()
        return step(rows)

    source.step = loses
    assert sorted(completion.job_id for completion in engine.run(source)) == [0, 2, 3]
    assert len(source.told[1]) == 4


def test_a_source_that_does_not_listen_costs_nothing(engine, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("nobody listens")

    monkeypatch.setattr(f"rococap.engines.{engine.options.decode}.tell", refuse)
    assert all(completion.text for completion in engine.run(Pictures(engine, mixed_pictures()[:2])))
    with pytest.raises(AssertionError, match="nobody listens"):
        list(engine.run(Listening(engine, [Request([BLANK])])))
