"""Scores a caption against its reference. Text in, numbers out: knows nothing of the database, runs or pictures.

Each score has the scale of its paper: 0 to 1, for CIDEr-D 0 to 10. Variants of a score that give different numbers have
different names: `rouge_l` is that of rouge-score, `rouge_l_coco` that of the COCO caption evaluation, and `meteor_nltk`
is not METEOR 1.5.
"""

import re
import string
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rococap.results.formats import fold

Tokens = Sequence[str]
Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

ORDERS = 4
"""Length of the longest n-grams in BLEU and CIDEr-D."""
WORDNET_COMMAND = "apt-get install wordnet-base wordnet-sense-index, or: python -m nltk.downloader wordnet omw-1.4"


_TOKEN = re.compile(
    r"""
      (?!cannot\b)[^\W\d_]+(?=[\s;)]|$)                      # most words; the rest matches them too, but more slowly
    | https?://\S+[\w/]
    | (?:[^\W\d_]\.){2,}                                    # e.g. u.s.
    | (?:dr|mr|mrs|ms|st|vs|no|al|figs?)\.(?=\ )
    | \w+?(?=n't\b) | n't\b | can(?=not\b) | '(?:s|re|ve|ll|d|m)\b
    | \d+[.,]\d+(?=(?:cm|hu|t)\b)                           # 1.5 t
    | (?<!\S)-\d+(?:[.,]\d+)*\b | \d+:\d+
    | \w+(?:[-/.,_@&\u2010]+\w+|'(?!(?:s|re|ve|ll|d|m|t)\b)\w+)*
    | [^\s'`.?!,:;"“”‘„–—…-]                                # any other character except punctuation
    """,
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokens(text: str) -> list[str]:
    """Lower-case Penn Treebank tokens without punctuation, as in the COCO caption evaluation (Chen et al., 2015,
    arXiv:1504.00325), which keeps brackets as `-lrb-` and the like.

    docs/scores.md reports how often they equal those of the Stanford tokeniser that the COCO evaluation uses.
    """
    return [_BRACKETS.get(word, word) for word in _TOKEN.findall(fold(text).lower().replace("’", "'"))]


# --- One caption -----------------------------------------------------------------------------------------------


def bleu_statistics(hypothesis: Tokens, references: Sequence[Tokens]) -> list[int]:
    """Ten counts, whose sums over captions are those of the corpus: matching n-grams for n = 1 to 4, all n-grams of the
    hypothesis for n = 1 to 4, the length of the hypothesis and that of the closest reference.
    """
    scored = _bleu().corpus_score([" ".join(hypothesis)], [[" ".join(reference)] for reference in references])
    return [*scored.counts, *scored.totals, scored.sys_len, scored.ref_len]


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    # force: suppresses the warning that the text looks tokenised, which it is.
    return BLEU(tokenize="none", smooth_method="none", force=True)


def bleu(statistics: npt.NDArray[Any]) -> Vector:
    """BLEU-1 to 4 of corpora (Papineni et al., 2002), 0 to 1 without smoothing, from sums of `bleu_statistics`:
    shape (..., 10) -> (..., 4).
    """
    matches, n_grams = statistics[..., :ORDERS], statistics[..., ORDERS : 2 * ORDERS]
    ours, theirs = statistics[..., 2 * ORDERS], statistics[..., 2 * ORDERS + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.cumsum(np.log(matches / n_grams), axis=-1) / np.arange(1, ORDERS + 1)
        brevity = np.minimum(0, 1 - theirs / ours)
        scores: Vector = np.nan_to_num(np.exp(precision + brevity[..., None]))
    return scores


def rouge(hypothesis: str, reference: str) -> dict[str, float]:
    """F1 of ROUGE-1 and ROUGE-L (Lin, 2004), 0 to 1, computed by rouge-score without stemming."""
    scores = _rouge("rouge1", "rougeL").score(reference, hypothesis)
    return {"rouge_1": scores["rouge1"].fmeasure, "rouge_l": scores["rougeL"].fmeasure}


@cache
def _rouge(*kinds: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(kinds), use_stemmer=False)


_DIGITS = re.compile(r"\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def imageclef_text(text: str) -> str:
    """The text as ImageCLEFmedical Caption preprocesses it for scoring: in lower case, with the word `number` for each
    run of digits, without ASCII punctuation.
    """
    return _DIGITS.sub("number", text.lower()).translate(_PUNCTUATION)


def rouge1_imageclef(hypothesis: str, reference: str) -> float:
    """F1 of ROUGE-1, 0 to 1, as ImageCLEFmedical Caption computes it; 1 if both texts are empty."""
    if not hypothesis and not reference:
        return 1.0
    scored = _rouge("rouge1").score(imageclef_text(reference), imageclef_text(hypothesis))
    return float(scored["rouge1"].fmeasure)


def rouge_l_coco(hypothesis: Tokens, references: Sequence[Tokens], beta: float = 1.2) -> float:
    """ROUGE-L (Lin, 2004), 0 to 1, as the COCO caption evaluation computes it: from the best precision and the best
    recall over the references, with recall weighted by `beta`.
    """
    common = [_longest_common_subsequence(hypothesis, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(hypothesis)
    recall = max(n / len(reference) for n, reference in zip(common, references, strict=True) if n)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common_subsequence(one: Tokens, other: Tokens) -> int:
    """The length of the longest common subsequence, by the algorithm of Hyyrö (2004), Bit-Parallel LCS-length
    Computation Revisited, with one bit per token.
    """
    places: dict[str, int] = {}
    for at, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << at
    every = (1 << len(one)) - 1
    bits = every
    for token in other:
        matches = bits & places.get(token, 0)
        bits = (bits + matches | bits - matches) & every
    return len(one) - bits.bit_count()


# --- METEOR ----------------------------------------------------------------------------------------------------


def meteor(wordnet: Any) -> Callable[[Tokens, Tokens], float]:
    """A function that computes nltk's METEOR (Banerjee and Lavie, 2005), 0 to 1, of a hypothesis and a reference.

    It caches stems and synonyms, so that each word is looked up only once.
    """
    from nltk.translate.meteor_score import single_meteor_score

    stemmer, words = _Stems(), _Synonyms(wordnet)

    def score(hypothesis: Tokens, reference: Tokens) -> float:
        return float(single_meteor_score(reference, hypothesis, stemmer=stemmer, wordnet=words))

    return score


class _Stems:
    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = lru_cache(maxsize=100_000)(PorterStemmer().stem)


class _Synonyms:
    """The part of WordNet's interface that METEOR uses, with a cache: all lemmas of a word are in a single synset."""

    def __init__(self, wordnet: Any) -> None:
        self._wordnet = wordnet
        self.synsets = lru_cache(maxsize=100_000)(self._look_up)

    def _look_up(self, word: str) -> list["_Lemmas"]:
        names = {lemma.name() for synset in self._wordnet.synsets(word) for lemma in synset.lemmas()}
        return [_Lemmas([_Lemma(name) for name in names])]


class _Lemma(str):
    __slots__ = ()

    def name(self) -> str:
        return self


class _Lemmas:
    def __init__(self, lemmas: list[_Lemma]) -> None:
        self._lemmas = lemmas

    def lemmas(self) -> list[_Lemma]:
        return self._lemmas


@cache
def open_wordnet(folder: Path = Path("/usr/share/wordnet")) -> Any:
    """WordNet 3.0 as installed by Debian, else by nltk's downloader, else None."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> Any:
            """Opens a file of WordNet. Debian omits `lexnames`, the names of the 45 lexicographer files, which the
            reader requires but no score uses: it is made up.
            """
            if file == "lexnames" and not (folder / file).exists():
                return StringIO("".join(f"{at:02}\tunknown\t0\n" for at in range(45)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Does nothing: the original maps synsets to WordNets of other languages, which it seeks in nltk's data."""

    if all((folder / f"data.{kind}").exists() for kind in ("noun", "verb", "adj", "adv")):
        nltk.data.path.append(str(folder))  # nltk reads only files under these paths
        return Reader(str(folder), omw_reader=False)  # with None, it warns that other languages are not available
    try:
        nltk.corpus.wordnet.ensure_loaded()
    except LookupError:
        return None
    return nltk.corpus.wordnet


# --- With extras -----------------------------------------------------------------------------------------------

BERT = "microsoft/deberta-xlarge-mnli"


def bertscore(
    pairs: Sequence[tuple[str, str]], references: Sequence[str], model: str = BERT, n_layers: int | None = None
) -> Iterator[float]:
    """F1 of BERTScore (Zhang et al., 2020, arXiv:1904.09675), up to 1, for each (hypothesis, reference).

    The settings are those of ImageCLEFmedical Caption: texts as in `imageclef_text`, words weighted by their inverse
    document frequency in all `references`, no rescaling. The score is 0 if one text is empty, and 1 if both are.

    Raises ImportError if the package bert-score is not installed, OSError if the model cannot be loaded.
    """
    from bert_score import BERTScorer

    texts = [(imageclef_text(one), imageclef_text(other)) for one, other in pairs]
    idf_texts = [text for text in map(imageclef_text, references) if text.strip()]
    scorer = BERTScorer(model_type=model, num_layers=n_layers, idf=True, idf_sents=idf_texts)
    for start in range(0, len(texts), scorer.batch_size):
        batch = texts[start : start + scorer.batch_size]
        # With transformers 5, bert-score fails on an empty text.
        full = [pair for pair in batch if pair[0].strip() and pair[1].strip()]
        scores = iter(scorer.score(*map(list, zip(*full, strict=True)))[2].tolist() if full else ())
        for one, other in batch:
            yield next(scores) if one.strip() and other.strip() else float(not one and not other)


def meteor_1_5_statistics(pairs: Iterable[tuple[Tokens, Tokens]]) -> Iterator[list[float]]:
    """The 23 statistics of METEOR 1.5 for each (hypothesis, reference); their sums over captions are those of the
    corpus.

    Raises ImportError if the package pycocoevalcap, which contains METEOR's program, is not installed; OSError if there
    is no Java or the program ends early.
    """
    jar = files("pycocoevalcap") / "meteor" / "meteor-1.5.jar"
    command = ["java", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, encoding="utf-8", bufsize=1
    ) as java:
        assert java.stdin is not None
        assert java.stdout is not None
        for hypothesis, reference in pairs:
            java.stdin.write(f"SCORE ||| {' '.join(reference)} ||| {' '.join(hypothesis)}\n")
            counts = java.stdout.readline().split()
            if not counts:
                raise OSError("METEOR's program ended")
            yield _without_single_chunk([float(count) for count in counts])
        java.stdin.close()


def _without_single_chunk(counts: list[float]) -> list[float]:
    """The statistics with 0 chunks for a hypothesis that equals its reference: METEOR's program does the same for a
    single caption, and here it holds in corpus sums too.
    """
    ours, theirs = counts[:2]
    chunks, *matches = counts[20:]
    return [*counts[:20], 0, *matches] if (chunks, matches) == (1, [ours, theirs]) else counts


def meteor_1_5(statistics: npt.NDArray[Any]) -> Vector:
    """METEOR 1.5 (Denkowski and Lavie, 2014), 0 to 1, with its weights for English, from sums of
    `meteor_1_5_statistics`: shape (..., 23) -> (..., 1).
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    ours, theirs, our_function_words, their_function_words = np.moveaxis(statistics[..., :4], -1, 0)
    matches = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 4)  # by stage: content and function words
    chunks, our_matches, their_matches = np.moveaxis(statistics[..., 20:], -1, 0)
    exact_stem_synonym_paraphrase = np.array([1, 0.6, 0.8, 0.6])
    weighted = (delta * matches[..., :2] + (1 - delta) * matches[..., 2:]) * exact_stem_synonym_paraphrase[:, None]
    our_weight, their_weight = np.moveaxis(weighted.sum(axis=-2), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = our_weight / (delta * (ours - our_function_words) + (1 - delta) * our_function_words)
        recall = their_weight / (delta * (theirs - their_function_words) + (1 - delta) * their_function_words)
        mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
        fragmentation = 2 * chunks / (our_matches + their_matches)
        score: Vector = mean * (1 - gamma * fragmentation**beta)
    return np.nan_to_num(score)[..., None]


# --- CIDEr-D ---------------------------------------------------------------------------------------------------


def cider_d(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0) -> Vector:
    """CIDEr-D of each hypothesis, 0 to 10 (Vedantam, Zitnick and Parikh, 2015, arXiv:1411.5726, section 5), as the COCO
    caption evaluation computes it: document frequencies are taken from the references given here, with the references
    of one picture as one document, and the length penalty of width `sigma` compares lengths in bigrams.
    """
    n, owner = len(hypotheses), np.repeat(np.arange(len(references)), [len(several) for several in references])
    texts = [*hypotheses, *(reference for several in references for reference in several)]
    n_bigrams = np.array([max(0, len(text) - 1) for text in texts], dtype=np.float64)
    penalty = np.exp(-((n_bigrams[:n][owner] - n_bigrams[n:]) ** 2) / (2 * sigma**2))
    similarity = np.zeros(len(owner))
    for text, gram in _n_grams(texts):
        similarity += _cosine(text, gram, owner, n)
    of_picture = np.bincount(owner, similarity * penalty, minlength=n)
    return 10 * of_picture / ORDERS / np.maximum(1, np.bincount(owner, minlength=n))


def _n_grams(texts: Sequence[Tokens]) -> Iterator[tuple[Integers, Integers]]:
    """For n = 1 to 4, two arrays with one entry per n-gram, in order: the index of its text, and a number that is the
    same for equal n-grams.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    text = np.repeat(np.arange(len(texts)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(text))
    numbers = {word: n for n, word in enumerate(dict.fromkeys(chain.from_iterable(texts)))}
    words = np.fromiter(map(numbers.__getitem__, chain.from_iterable(texts)), dtype=np.int64, count=len(text))
    gram = words
    for order in range(1, ORDERS + 1):
        starts = np.flatnonzero(left >= order)
        if order > 1:
            keys = gram[starts] * len(numbers) + words[starts + order - 1]
            gram = np.full(len(words), -1)
            gram[starts] = np.unique(keys, return_inverse=True)[1]
        yield text[starts], gram[starts]


def _cosine(text: Integers, gram: Integers, owner: Integers, n: int) -> Vector:
    """The cosine of each reference with its hypothesis, whose weights are clipped to those of the reference.

    `text` and `gram` are arrays from `_n_grams`; `owner` is the hypothesis of each reference, `n` their number.
    """
    n_grams = int(gram.max(initial=-1)) + 1
    if not n_grams:
        return np.zeros(len(owner))
    codes, counts = np.unique(text * n_grams + gram, return_counts=True)
    text, gram = codes // n_grams, codes % n_grams
    first = int(np.searchsorted(text, n))  # from here on, texts are references
    picture, reference = owner[text[first:] - n], text[first:] - n
    wanted = picture * n_grams + gram[first:]  # the code of the same n-gram in the picture's hypothesis
    in_order = np.sort(wanted)  # np.unique takes ten times as long on nearly sorted values
    frequency = np.bincount(in_order[np.diff(in_order, prepend=-1) > 0] % n_grams, minlength=n_grams)
    weights = counts * (np.log(n) - np.log(np.maximum(1, frequency)))[gram]
    norms = np.sqrt(np.bincount(text, weights**2, minlength=n + len(owner)))
    at = np.minimum(np.searchsorted(codes[:first], wanted), max(0, first - 1))
    is_shared = codes[at] == wanted
    theirs, ours = weights[first:][is_shared], weights[at[is_shared]]
    products = np.bincount(reference[is_shared], np.minimum(ours, theirs) * theirs, minlength=len(owner))
    both = norms[:n][owner] * norms[n:]
    cosines: Vector = np.divide(products, both, out=np.zeros(len(owner)), where=both > 0)
    return cosines
