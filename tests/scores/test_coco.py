"""Our scores against the COCO caption evaluation's own, which needs its package and Java: make test-coco."""

import csv
import shutil

import numpy as np
import pytest
from places import SHARED

from rococap.results import formats
from rococap.scores import metrics

pytest.importorskip("pycocoevalcap")
CAPTIONS = SHARED / "captions"
pytestmark = [
    pytest.mark.skipif(not CAPTIONS.exists(), reason="needs the real captions of ../shared"),
    pytest.mark.skipif(shutil.which("java") is None, reason="needs Java"),
]


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """2,000 real captions, each with itself, with half of another's words, or with another."""
    with (CAPTIONS / "roco_v1_2000.csv").open(encoding="utf-8", newline="") as lines:
        texts = [formats.fold(row["caption"]) for row in csv.DictReader(lines)]
    rng = np.random.default_rng(6)
    made = []
    for at, text in enumerate(texts):
        ours, others = text.split(), texts[(at + 7) % len(texts)].split()
        kept = rng.random()
        made.append((" ".join(word if rng.random() < kept else str(rng.choice(others)) for word in ours), text))
    return made


@pytest.fixture(scope="module")
def stanford(pairs) -> list[tuple[list[str], list[str]]]:
    """The pairs' tokens by coco's tokeniser."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    sides = [
        PTBTokenizer().tokenize({at: [{"caption": text}] for at, text in enumerate(side)})
        for side in zip(*pairs, strict=True)
    ]
    assert [len(side) for side in sides] == [2000, 2000]
    return [tuple(side[at][0].split() for side in sides) for at in range(len(pairs))]


@pytest.fixture(scope="module")
def coco(stanford) -> tuple[dict, dict]:
    return (
        {at: [" ".join(reference)] for at, (_, reference) in enumerate(stanford)},
        {at: [" ".join(hypothesis)] for at, (hypothesis, _) in enumerate(stanford)},
    )


def test_tokens_are_nearly_always_stanfords(pairs, stanford):
    ours = [metrics.tokens(reference) for _, reference in pairs]
    theirs = [reference for _, reference in stanford]
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    print(f"captions with the same tokens: {same} of {len(ours)}")
    assert same > 0.97 * len(ours)


def test_bleu_is_cocos(stanford, coco):
    from pycocoevalcap.bleu.bleu import Bleu

    expected, _ = Bleu(4).compute_score(*coco, verbose=0)
    counts = [metrics.bleu_statistics(hypothesis, [reference]) for hypothesis, reference in stanford]
    assert metrics.bleu(np.sum(counts, axis=0)) == pytest.approx(expected, abs=1e-8)


def test_rouge_l_is_cocos(stanford, coco):
    from pycocoevalcap.rouge.rouge import Rouge

    expected, each = Rouge().compute_score(*coco)
    ours = [metrics.rouge_l_coco(hypothesis, [reference]) for hypothesis, reference in stanford]
    assert ours == pytest.approx(each, abs=1e-12)
    assert np.mean(ours) == pytest.approx(expected)


def test_cider_d_is_cocos(stanford, coco):
    from pycocoevalcap.cider.cider import Cider

    expected, each = Cider().compute_score(*coco)
    hypotheses, references = zip(*stanford, strict=True)
    ours = metrics.cider_d(hypotheses, [[reference] for reference in references])
    assert ours == pytest.approx(each, abs=1e-9)
    assert ours.mean() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")  # its own
def test_meteor_1_5_is_cocos(stanford, coco):
    from pycocoevalcap.meteor.meteor import Meteor

    references, hypotheses = ({at: side[at] for at in range(300)} for side in coco)
    expected, each = Meteor().compute_score(references, hypotheses)
    counts = np.array(list(metrics.meteor_1_5_statistics(stanford[:300])))
    assert metrics.meteor_1_5(counts)[:, 0] == pytest.approx(each, abs=1e-9)
    assert metrics.meteor_1_5(counts.sum(axis=0))[0] == pytest.approx(expected, abs=1e-9)


def test_scores_by_our_tokens_are_cocos_to_a_thousandth(pairs, stanford):
    hypotheses, references = ([metrics.tokens(text) for text in side] for side in zip(*pairs, strict=True))
    counts = [metrics.bleu_statistics(*pair) for pair in zip(hypotheses, [[one] for one in references], strict=True)]
    by_stanford = [metrics.bleu_statistics(hypothesis, [reference]) for hypothesis, reference in stanford]
    ours, theirs = (metrics.bleu(np.sum(one, axis=0)) for one in (counts, by_stanford))
    print("BLEU by our tokens and by Stanford's:", ours, theirs)
    assert ours == pytest.approx(theirs, abs=1e-3)
