"""The score by which ImageCLEFmedical Caption 2026 ranks captions, from its parts.

As in the task's own evaluator (github.com/taubsity/clef-caption-evaluation-2026, caption_prediction/evaluator.py,
commit 74d6b64 of 2026-02-10): relevance is the mean of BERTScore, ROUGE-1, BLEURT and 2.5 times the cosine of picture
and caption by MedImageInsight, at least 0; factuality is the mean of the F1 of UMLS concepts and AlignScore; overall is
the mean of the two.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from rococap.scores.metrics import Vector

OURS: Final = ("bertscore_f1", "rouge1_imageclef")
SIMILARITY: Final = "medimageinsight"
SIMILARITY_WEIGHT: Final = 2.5
RELEVANCE: Final = "imageclef_relevance"
FACTUALITY: Final = "imageclef_factuality"
OVERALL: Final = "imageclef_overall"
_RELEVANT: Final = (*OURS, SIMILARITY, "bleurt")
_FACTUAL: Final = ("umls_f1", "alignscore")
PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    RELEVANCE: _RELEVANT,
    FACTUALITY: _FACTUAL,
    OVERALL: (*_RELEVANT, *_FACTUAL),
}
"""Each score, with the parts that it is computed from. Those that are not OURS are plug-ins of these names."""


def combine(values: Mapping[str, Vector]) -> dict[str, Vector]:
    """The scores of PARTS whose parts are all among the values, for each caption; NaN where a part is undefined."""
    scaled = {**values}
    if SIMILARITY in values:
        scaled[SIMILARITY] = SIMILARITY_WEIGHT * np.maximum(values[SIMILARITY], 0)
    found: dict[str, Vector] = {
        name: np.mean([scaled[part] for part in PARTS[name]], axis=0)
        for name in (RELEVANCE, FACTUALITY)
        if not missing(name, values)
    }
    if len(found) == 2:
        found[OVERALL] = (found[RELEVANCE] + found[FACTUALITY]) / 2
    return found


def missing(name: str, values: Mapping[str, Vector]) -> list[str]:
    """The parts of this score that are not among the values."""
    return [part for part in PARTS[name] if part not in values]


def why_not(parts: list[str]) -> str:
    """Why a score without these parts is not computed, and what to do about it."""
    ours = [f"--also {part}" for part in parts if part in OURS]
    theirs = [part for part in parts if part not in OURS]
    plugins = [f"plug-ins named {' and '.join(theirs)} (--also or --also-command NAME=…)"] if theirs else []
    return (
        f"It lacks {', '.join(parts)}, for all captions or for some. Add {' and '.join([*ours, *plugins])}; if one is "
        "there, it must score every caption that has an original."
    )
