"""Scores against published values, identities and floors on real captions, and what must hold for any text."""

import csv
import json
import math
import os
import random
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED

from rococap.results import formats
from rococap.scores import metrics

CAPTIONS = SHARED / "captions"
PUBLISHED = json.loads((Path(__file__).parent / "metrics_published.json").read_text())
needs_captions = pytest.mark.skipif(not CAPTIONS.exists(), reason="needs the real captions of ../shared")

SPACES = ["\r", "\v", "\f", "\u2028", "\u2029", "\x85", "\x1c", "\t", "\n", "\r\n", "\x00", "\ufeff"]


def corpus_bleu(hypotheses, references, order):
    counts = [metrics.bleu_statistics(one, several) for one, several in zip(hypotheses, references, strict=True)]
    return metrics.bleu(np.sum(counts, axis=0))[order - 1]


def published(name):
    example = PUBLISHED[name]
    hypotheses, references = example["hyp"], example["refs"]
    if isinstance(hypotheses, str):
        hypotheses, references = [hypotheses], [references]
    return (
        [text.split() for text in hypotheses],
        [[text.split() for text in several] for several in references],
        example["expected"],
    )


def real_captions(file="roco_v1_2000.csv"):
    with (CAPTIONS / file).open(encoding="utf-8", newline="") as lines:
        return [row["caption"] for row in csv.DictReader(lines)]


@pytest.fixture(scope="module")
def meteor():
    wordnet = metrics.open_wordnet()
    if wordnet is None:
        pytest.skip(f"needs WordNet: {metrics.WORDNET_COMMAND}")
    return metrics.meteor(wordnet)


# --- Published values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nlg_eval_readme_example", "nlg_eval_single"])
def test_bleu_rouge_l_and_cider_d_are_those_that_nlg_eval_publishes(name):
    hypotheses, references, expected = published(name)
    for order in (1, 2, 3):
        assert corpus_bleu(hypotheses, references, order) == pytest.approx(expected[f"bleu_{order}"], abs=5e-6)
    pairs = zip(hypotheses, references, strict=True)
    assert np.mean([metrics.rouge_l_coco(*pair) for pair in pairs]) == pytest.approx(expected["rouge_l_coco"], abs=5e-6)
    assert metrics.cider_d(hypotheses, references).mean() == pytest.approx(expected["cider_d"], abs=5e-6)


def test_bleu_4_is_nlg_evals_but_where_nothing_matches_and_coco_adds_a_little():
    hypotheses, references, expected = published("nlg_eval_readme_example")
    assert corpus_bleu(hypotheses, references, 4) == pytest.approx(expected["bleu_4"], abs=5e-6)

    from sacrebleu.metrics.bleu import BLEU

    (hypothesis,), (several,), expected = published("nlg_eval_single")
    counts = metrics.bleu_statistics(hypothesis, several)
    assert metrics.bleu(np.array(counts))[3] == 0
    with_a_little = BLEU.compute_bleu(counts[:4], counts[4:8], *counts[8:], smooth_method="floor", smooth_value=1e-15)
    assert with_a_little.score / 100 == pytest.approx(expected["bleu_4"], abs=5e-6)


def test_bleu_1_and_cider_d_are_those_that_aac_metrics_publishes():
    hypotheses, references, expected = published("aac_metrics_readme")
    assert corpus_bleu(hypotheses, references, 1) == pytest.approx(expected["bleu_1"], abs=5e-5)
    scores = metrics.cider_d(hypotheses, references)
    assert scores == pytest.approx(expected["cider_d_per"], abs=5e-5)
    assert scores.mean() == pytest.approx(expected["cider_d"], abs=5e-5)


def test_meteor_is_that_of_nltks_documentation(meteor):
    hypothesis = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert meteor(hypothesis.split(), reference.split()) == pytest.approx(
        PUBLISHED["nltk_meteor_docs"]["expected"], abs=5e-5
    )


def test_meteor_with_its_words_looked_up_once_is_nltks_own(meteor):
    from nltk.translate.meteor_score import single_meteor_score

    wordnet = metrics.open_wordnet()
    rng = random.Random(6)
    words = "the scan skim lesion wound mass tumour tumor large big liver livers images picture movie".split()  # noqa: SIM905
    for _ in range(200):
        one, other = (rng.choices(words, k=rng.randint(1, 9)) for _ in range(2))
        assert meteor(one, other) == single_meteor_score(other, one, wordnet=wordnet)


# --- Real captions ---------------------------------------------------------------------------------------------


@needs_captions
def test_an_unrelated_caption_scores_at_the_floor():
    texts = real_captions()
    words = [metrics.tokens(text) for text in texts]
    others = words[1000:] + words[:1000]
    references = [[reference] for reference in words]
    assert corpus_bleu(others, references, 1) == pytest.approx(0.097, abs=0.02)
    assert metrics.cider_d(others, references).mean() == pytest.approx(0.014, abs=0.01)
    rouges = [metrics.rouge(*pair)["rouge_1"] for pair in zip(texts[1000:], texts[:1000], strict=True)]
    assert np.mean(rouges) == pytest.approx(0.085, abs=0.01)


@needs_captions
def test_a_caption_scores_itself_at_the_maximum():
    texts = real_captions()[:500]
    words = [metrics.tokens(text) for text in texts]
    assert [corpus_bleu(words, [[one] for one in words], order) for order in (1, 2, 3, 4)] == pytest.approx([1] * 4)
    assert {metrics.rouge_l_coco(one, [one]) for one in words} == {1}
    assert {metrics.rouge1_imageclef(text, text) for text in texts} == {1}
    assert {score for text in texts for score in metrics.rouge(text, text).values()} == {1}


@needs_captions
def test_identity_is_less_than_10_in_cider_d_since_short_captions_have_no_n_grams_of_four():
    words = [metrics.tokens(text) for text in real_captions()]
    scores = metrics.cider_d(words, [[one] for one in words])
    assert scores == pytest.approx([10 * min(4, len(one)) / 4 for one in words])
    assert scores.mean() == pytest.approx(9.885, abs=0.02)


# --- Tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CT (axial): a [large] mass, e.g. 3.5 cm.", "ct -lrb- axial -rrb- a -lsb- large -rsb- mass e.g. 3.5 cm"),
        ("A 45-year-old man's X-ray/CT: L4/L5.", "a 45-year-old man 's x-ray/ct l4/l5"),
        ("It isn't “well” – see Fig. 2; we cannot.", "it is n't well see fig. 2 we can not"),
        ("Dr. Smith’s 1.5T scanner, 50% of <5 mm", "dr. smith 's 1.5 t scanner 50 % of < 5 mm"),
        ("", ""),
        (" . , - -- ... ! ", ""),
    ],
)  # fmt: skip
def test_tokens_are_those_of_the_penn_treebank(text, expected):
    assert metrics.tokens(text) == expected.split()


@pytest.mark.parametrize("space", SPACES, ids=ascii)
def test_no_space_or_control_character_makes_a_line_or_a_word_of_its_own(space):
    text = f"{space}A CT{space}of the{space}{space}liver.{space}"
    assert formats.fold(text) == "A CT of the liver."
    assert metrics.tokens(text) == ["a", "ct", "of", "the", "liver"]
    assert len(formats.fold(text).splitlines()) == 1


def test_imageclef_text_is_lower_case_with_numbers_as_a_word_and_no_punctuation():
    assert metrics.imageclef_text("A 45-year-old, T1: 3.5×2 cm (L4/5)!") == (
        "a numberyearold tnumber numbernumber×number cm lnumbernumber"
    )


# --- What holds for any text -----------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from([*"a.,(", "ct", "scan", "of", "the", "liver", "lesion"]), max_size=12)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_changes_no_score(pairs, rng):
    order = list(range(len(pairs)))
    rng.shuffle(order)
    hypotheses, references = zip(*pairs, strict=True)
    shuffled = [hypotheses[at] for at in order], [[references[at]] for at in order]
    plain = hypotheses, [[reference] for reference in references]
    assert metrics.cider_d(*shuffled) == pytest.approx(metrics.cider_d(*plain)[order], abs=1e-9)
    assert [corpus_bleu(*shuffled, n) for n in (1, 4)] == [corpus_bleu(*plain, n) for n in (1, 4)]


@settings(max_examples=60, deadline=None)
@given(WORDS.filter(bool), WORDS)
def test_a_perfect_caption_scores_the_maximum_and_an_empty_one_the_minimum(reference, other):
    others = [[reference], [["another"]]]
    best, given_other, empty = (metrics.cider_d([one, ["another"]], others)[0] for one in (reference, other, []))
    assert empty == 0 <= given_other <= best + 1e-9
    assert metrics.rouge_l_coco([], [reference]) == 0 <= metrics.rouge_l_coco(other, [reference]) <= 1
    assert metrics.rouge_l_coco(reference, [reference]) == pytest.approx(1)
    assert corpus_bleu([reference], [[reference]], 1) == pytest.approx(1)
    assert corpus_bleu([[]], [[reference]], 1) == 0
    text = " ".join([*reference, "x"])
    assert set(metrics.rouge(text, text).values()) == {1}
    assert set(metrics.rouge("", text).values()) == {0}
    assert (metrics.rouge1_imageclef(text, text), metrics.rouge1_imageclef("", text)) == (1, 0)


def plain_cider_d(hypotheses, references):
    """As the paper writes it down, one n-gram after the other."""

    def counts(words, n):
        return Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))

    scores = []
    for hypothesis, several in zip(hypotheses, references, strict=True):
        total = 0.0
        for reference, n in product(several, (1, 2, 3, 4)):
            ours, theirs = counts(hypothesis, n), counts(reference, n)
            idf = {
                gram: math.log(len(references))
                - math.log(max(1, sum(any(gram in counts(one, n) for one in others) for others in references)))
                for gram in ours | theirs
            }
            weights, other_weights = ({gram: k * idf[gram] for gram, k in of.items()} for of in (ours, theirs))
            dot = sum(min(weights.get(gram, 0), other) * other for gram, other in other_weights.items())
            norm = math.hypot(*weights.values()) * math.hypot(*other_weights.values())
            difference = max(0, len(hypothesis) - 1) - max(0, len(reference) - 1)
            total += dot / norm * math.exp(-(difference**2) / 72) if norm else 0
        scores.append(10 * total / 4 / len(several))
    return scores


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_cider_d_is_that_of_the_paper(pairs):
    hypotheses, references = zip(*pairs, strict=True)
    expected = plain_cider_d(hypotheses, references)
    assert metrics.cider_d(hypotheses, references) == pytest.approx(expected, abs=1e-9)


def test_a_word_again_and_again_earns_no_more_than_once():
    references = [[["ct", "liver"]], [["mri", "brain"]], [["ct", "lung"]]]
    once, thrice = (metrics.cider_d([words, [], []], references)[0] for words in (["liver"], ["liver"] * 3))
    assert 0 < thrice < once


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_bleu_from_sums_is_sacrebleus_of_the_corpus(pairs):
    from sacrebleu.metrics.bleu import BLEU

    hypotheses, references = ([" ".join(words) for words in side] for side in zip(*pairs, strict=True))
    for order in (1, 2, 3, 4):
        scorer = BLEU(tokenize="none", smooth_method="none", force=True, max_ngram_order=order)
        expected = scorer.corpus_score(hypotheses, [references]).score / 100
        ours = corpus_bleu(*zip(*((one, [other]) for one, other in pairs), strict=True), order)
        assert ours == pytest.approx(expected, abs=1e-12)


def test_empty_against_empty_is_1_for_imageclef_only():
    assert metrics.rouge1_imageclef("", "") == 1
    assert metrics.rouge_l_coco([], [[]]) == 0
    assert metrics.cider_d([[]], [[[]]]) == pytest.approx([0])
    assert len(metrics.cider_d([], [])) == 0


@settings(max_examples=60, deadline=None)
@given(WORDS, WORDS)
def test_the_longest_common_subsequence_is_that_of_the_table(one, other):
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    assert metrics._longest_common_subsequence(one, other) == table[-1][-1]


@settings(max_examples=30, deadline=None)
@given(WORDS.filter(lambda words: len(words) > 1), st.randoms(use_true_random=False))
def test_meteor_ranks_the_reference_itself_first(meteor, reference, rng):
    shuffled = reference.copy()
    rng.shuffle(shuffled)
    assert meteor([], reference) == 0 <= meteor(shuffled, reference) <= meteor(reference, reference)


# --- With extras -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deberta(tmp_path_factory) -> Path:
    """A small real model of BERTScore's architecture, with a byte-level vocabulary."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import DebertaConfig, DebertaModel

    folder = tmp_path_factory.mktemp("deberta")
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["a ct of the liver"], trainers.BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "DebertaTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = DebertaConfig(vocab_size=300, relative_attention=True, pos_att_type=["c2p", "p2c"], **size)
    DebertaModel(config).save_pretrained(folder)
    return folder


def test_bertscore_is_bert_scores_own_with_idf_over_the_references(deberta):
    pytest.importorskip("bert_score")
    from bert_score import BERTScorer

    references = ["A CT of the liver.", "MRI of the brain, 3 lesions.", "", "X-ray", ""]
    hypotheses = ["A CT of the liver.", "An MRI with 2 lesions.", "CT", "", ""]
    pairs = list(zip(hypotheses, references, strict=True))
    found = list(metrics.bertscore(pairs, references, str(deberta), n_layers=2))
    prepared = [metrics.imageclef_text(text) for text in references]
    scorer = BERTScorer(model_type=str(deberta), num_layers=2, idf=True, idf_sents=[text for text in prepared if text])
    one = scorer.score([metrics.imageclef_text(hypotheses[1])], [prepared[1]])[2].item()
    assert found == pytest.approx([1, one, 0, 0, 1], abs=1e-6)
    assert 0 < one < 1
    assert list(metrics.bertscore(pairs[1:2], references, str(deberta), n_layers=2)) == pytest.approx([one], abs=1e-6)
    without_idf = BERTScorer(model_type=str(deberta), num_layers=2)
    assert without_idf.score([metrics.imageclef_text(hypotheses[1])], [prepared[1]])[2].item() != pytest.approx(one)


def test_meteor_1_5_of_counts_is_that_of_its_program():
    # What meteor-1.5.jar counts in nlg-eval's example, and what it makes of that.
    counts = np.zeros((2, 23))
    counts[0, [0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 22]] = [10, 7, 4, 4, 1, 1, 2, 2, 2, 3, 3]
    counts[1, [0, 1, 2, 3, 4, 5, 6, 7, 18, 19, 20, 21, 22]] = [10, 13, 6, 7, 4, 4, 4, 4, 2, 1, 2, 10, 9]
    assert metrics.meteor_1_5(counts)[:, 0] == pytest.approx([0.1556568826170604, 0.39012536521249613])
    expected = PUBLISHED["nlg_eval_readme_example"]["expected"]["meteor_1_5"]
    assert metrics.meteor_1_5(counts.sum(axis=0))[0] == pytest.approx(expected, abs=5e-6)
    assert metrics.meteor_1_5(np.zeros(23))[0] == 0


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Makes `java` a shell script, and its program a file beside it."""

    def make(script):
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(metrics, "files", lambda package: tmp_path / package)

    return make


def test_meteor_1_5s_program_is_asked_a_pair_a_line(java, tmp_path):
    counts = " ".join(map(str, range(23)))
    java(f'while read -r line; do echo "$line" >> {tmp_path}/asked; echo "{counts}"; done')
    found = list(metrics.meteor_1_5_statistics([(["a", "ct"], ["the", "ct"]), ([], ["x"])]))
    assert found == [[float(n) for n in range(23)]] * 2
    assert (tmp_path / "asked").read_text() == "SCORE ||| the ct ||| a ct\nSCORE ||| x ||| \n".replace(
        "||| \n", "|||\n"
    )


def test_a_program_that_ends_early_is_an_error_and_no_score(java):
    java("exit 0")
    with pytest.raises(OSError, match=r"METEOR's program ended|Broken pipe"):
        list(metrics.meteor_1_5_statistics([(["a"], ["a"])] * 3))


def test_without_wordnet_there_is_none(tmp_path, monkeypatch):
    import nltk

    class Absent:
        def ensure_loaded(self):
            raise LookupError

    monkeypatch.setattr(nltk.corpus, "wordnet", Absent())
    assert metrics.open_wordnet(tmp_path) is None
