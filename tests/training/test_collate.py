"""What is learned, for every family of models: the caption and its end, after the very prompt of captioning."""

import pytest
import torch
from families import FAMILIES, PLACEHOLDERS
from PIL import Image
from training_steps import plain

from rococap.data import Place
from rococap.engines import Request
from rococap.training.collate import IGNORED, Captions, Collator, end_of_caption, loss, row
from rococap.training.examples import Example

CAPTIONS = ("A chest X-ray.", "CT of the abdomen without contrast, in an axial plane.", "MRI.")
SIZES = ((90, 60), (200, 40), (56, 56))


def examples(*captions: str) -> list[Example]:
    return [Example(Place("s.parquet", "train", 0, n, f"id_{n}"), text) for n, text in enumerate(captions)]


def pictures() -> list[Image.Image]:
    gradient = Image.linear_gradient("L").convert("RGB")
    return [gradient.resize(size) for size in SIZES]


class Family:
    """A small model of a family, and rows that it would be trained on."""

    def __init__(self, folder) -> None:
        self.engine, self.model = plain(folder)
        self.tokenizer = self.engine.processor.tokenizer
        self.end = end_of_caption(self.model, self.engine.processor, str(folder))
        self.learned = Captions(self.tokenizer, self.end, 100).learned(examples(*CAPTIONS))
        self.prompts = [self.engine.prepare(0, Request([picture])).inputs.tensors for picture in pictures()]
        self.rows = [row(str(n), *parts) for n, parts in enumerate(zip(self.prompts, self.learned.tokens, strict=True))]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    made = Family(FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model"))
    made.name = request.param
    return made


def test_the_caption_and_its_end_are_learned_and_nothing_else(family):
    batch = Collator(family.tokenizer.pad_token_id)(family.rows)
    for n, (ids, labels, mask) in enumerate(
        zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ):
        learned, prompt = family.learned.tokens[n], family.prompts[n]["input_ids"][0]
        assert int((labels != IGNORED).sum()) == len(learned)
        assert labels[-len(learned) :].tolist() == ids[-len(learned) :].tolist() == learned
        assert learned[-1] == family.end
        assert family.tokenizer.decode(learned[:-1]) == CAPTIONS[n]
        assert ids[mask == 1].tolist() == [*prompt.tolist(), *learned]


def test_no_token_of_a_picture_is_learned_or_cut(family):
    tokens = [family.tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS[family.name]]
    batch = Collator(family.tokenizer.pad_token_id)(family.rows)
    of_pictures = torch.isin(batch["input_ids"], torch.tensor(tokens))
    assert (batch["labels"][of_pictures] == IGNORED).all()
    before = [int(torch.isin(prompt["input_ids"], torch.tensor(tokens)).sum()) for prompt in family.prompts]
    assert of_pictures.sum(dim=1).tolist() == before
    assert min(before) > 0


def test_the_loss_of_a_batch_is_that_of_its_rows_by_the_models_own_account(family):
    """One by one, without padding, and with the loss of transformers."""
    family.model.train()
    batch = Collator(family.tokenizer.pad_token_id)(family.rows)
    del batch["image_ids"]
    n = int((batch["labels"] != IGNORED).sum())
    with torch.no_grad():
        ours = loss(family.model(**batch | {"labels": None}), batch["labels"], n)
        alone = [family.model(**one.tensors, use_cache=False).loss * one.n_learned for one in family.rows]
    assert float(ours) == pytest.approx(float(sum(alone)) / n, rel=1e-3)


# --- Captions --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return plain()[0].processor.tokenizer


def test_a_long_caption_ends_with_the_last_sentence_that_fits_and_is_counted(tokenizer):
    text = "A chest X-ray. The heart is large. There is an effusion on the left side."
    first_two = "A chest X-ray. The heart is large."
    limit = len(tokenizer(first_two)["input_ids"]) + 1
    learned = Captions(tokenizer, 1, limit).learned(examples(text, "A chest X-ray."))
    assert [tokenizer.decode(tokens[:-1]) for tokens in learned.tokens] == [first_two, "A chest X-ray."]
    assert (learned.shortened, learned.refused) == (1, 0)


def test_a_caption_without_a_short_sentence_is_refused_and_counted(tokenizer):
    learned = Captions(tokenizer, 1, 3).learned(examples("The heart is so large that no sentence fits.", "CT."))
    assert [example.place.image_id for example in learned.examples] == ["id_1"]
    assert (learned.shortened, learned.refused) == (0, 1)


def test_a_caption_that_holds_a_special_token_is_refused(tokenizer):
    learned = Captions(tokenizer, 1, 50).learned(examples("A CT.<|im_end|> And more."))
    assert (learned.examples, learned.refused) == ([], 1)
