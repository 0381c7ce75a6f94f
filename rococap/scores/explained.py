"""Titles, scales and explanations of the scores, as a report shows them. Computes nothing."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Explained:
    """A score for the reader of a report; `top` is the upper end of its axis in plots."""

    title: str
    scale: str
    meaning: str
    top: float = 1.0


_BLEU = "Sequences of up to {} words shared with the originals, over all captions; captions that are too short lose."
EXPLAINED: Final = {
    "bleu_1": Explained(
        "BLEU-1", "0 to 1", "Words shared with the originals, over all captions; captions that are too short lose."
    ),
    **{f"bleu_{n}": Explained(f"BLEU-{n}", "0 to 1", _BLEU.format(n)) for n in (2, 3, 4)},
    "rouge_1": Explained("ROUGE-1", "0 to 1", "F-score of the words shared with the original, averaged over captions."),
    "rouge_l": Explained(
        "ROUGE-L", "0 to 1", "F-score of the longest common subsequence of words, averaged over captions."
    ),
    "rouge_l_coco": Explained(
        "ROUGE-L (COCO)", "0 to 1", "ROUGE-L as the COCO caption evaluation computes it, with more weight on recall."
    ),
    "rouge1_imageclef": Explained(
        "ROUGE-1 (ImageCLEF)", "0 to 1", "ROUGE-1 of texts preprocessed as in ImageCLEFmedical Caption."
    ),
    "meteor_nltk": Explained(
        "METEOR (nltk)", "0 to 1", "Words shared by form, stem or synonym, and how far they are in the same order."
    ),
    "cider_d": Explained(
        "CIDEr-D",
        "0 to 10",
        "Word sequences shared with the original, weighted by their rarity in all originals.",
        10.0,
    ),
    "concept_f1": Explained(
        "Concept F1",
        "0 to 1",
        "Agreement between the concepts that the caption names and the true ones: the modality and, for X-rays, the "
        "body region and direction.",
    ),
    "concept_recall": Explained("Concept recall", "0 to 1", "Share of the true concepts that the caption names."),
    "concept_f1_ref": Explained(
        "Concept F1 of the originals",
        "0 to 1",
        "Concept F1 of the original captions themselves: the level to compare with.",
    ),
    **{
        f"fact_{kind}": Explained(f"Facts: {kind}", "0 to 1", f"F1 of {what}, over captions where either text has one.")
        for kind, what in (
            ("modality", "the modalities that a caption and its original name"),
            ("plane", "planes, projections and standard views"),
            ("region", "regions of the body"),
            ("side", "left and right, with what they are the sides of"),
            ("negation", "findings that are denied"),
            ("measurement", "numbers with units, equal within rounding"),
            ("contrast", "contrast media and their phases"),
            ("sequence", "MRI sequences and weightings"),
        )
    },
    "flagged": Explained(
        "Flagged", "0 to 1", "Share of captions that are empty, repetitive or otherwise flagged: lower is better."
    ),
    "bertscore_f1": Explained("BERTScore F1", "up to 1", "Similarity in meaning, according to a language model."),
    "meteor_1_5": Explained(
        "METEOR 1.5", "0 to 1", "METEOR as its authors' own program computes it, which also matches paraphrases."
    ),
    **{
        f"imageclef_{name}": Explained(f"ImageCLEF 2026: {name}", scale, meaning)
        for name, scale, meaning in (
            (
                "relevance",
                "about 0 to 1",
                "Mean of BERTScore, ROUGE-1, BLEURT and the similarity of picture and caption.",
            ),
            ("factuality", "up to 1", "Mean of AlignScore and the F1 of UMLS concepts."),
            ("overall", "about 0 to 1", "Mean of relevance and factuality, by which the task ranks."),
        )
    },
    "length_ratio": Explained(
        "Length ratio", "around 1", "Words in the captions divided by words in the originals.", 2.0
    ),
}
SUMMARY: Final = ("bleu_4", "rouge_l", "cider_d", "concept_f1")
"""Scores in the summary of each run."""
CARD_SCORES: Final = ("rouge_l", "cider_d", "concept_f1")
"""Scores on the card of each picture."""


def explained(name: str) -> Explained:
    """The explanation of a score; of an unknown one, only its name."""
    return EXPLAINED.get(name, Explained(name, "", ""))
