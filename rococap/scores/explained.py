"""What each score means, in the words of a report."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Explained:
    title: str
    scale: str
    says: str
    top: float = 1.0


_BLEU = "Runs of up to {} words in common with the original, over all captions; shorter captions than originals cost."
EXPLAINED: Final = {
    "bleu_1": Explained("BLEU-1", "0 to 1", "Words in common with the original, over all captions; short ones cost."),
    **{f"bleu_{n}": Explained(f"BLEU-{n}", "0 to 1", _BLEU.format(n)) for n in (2, 3, 4)},
    "rouge_1": Explained("ROUGE-1", "0 to 1", "F of the words in common with the original, mean of captions."),
    "rouge_l": Explained("ROUGE-L", "0 to 1", "F of the longest sequence of words in common, mean of captions."),
    "rouge_l_coco": Explained(
        "ROUGE-L (COCO)", "0 to 1", "The same as the COCO caption evaluation has it, where recall weighs more."
    ),
    "rouge1_imageclef": Explained(
        "ROUGE-1 (ImageCLEF)", "0 to 1", "ROUGE-1 of texts prepared as ImageCLEFmedical Caption does it."
    ),
    "meteor_nltk": Explained(
        "METEOR (nltk)", "0 to 1", "Words in common by form, stem or synonym, and whether they stand in order."
    ),
    "cider_d": Explained(
        "CIDEr-D", "0 to 10", "Runs of words in common, weighted by how rare they are in all originals.", 10.0
    ),
    "concept_f1": Explained(
        "Concept F1", "0 to 1", "Modality, and of X-rays region and direction: what the caption names and what is true."
    ),
    "concept_recall": Explained("Concept recall", "0 to 1", "The part of the true concepts that the caption names."),
    "concept_f1_ref": Explained(
        "Concept F1 of the originals",
        "0 to 1",
        "The same of the original captions themselves: what to compare it with.",
    ),
    "flagged": Explained(
        "Flagged", "0 to 1", "Share of captions that say nothing or are otherwise odd: lower is better."
    ),
    "bertscore_f1": Explained("BERTScore F1", "up to 1", "Words of like meaning, by a language model."),
    "meteor_1_5": Explained("METEOR 1.5", "0 to 1", "As METEOR, by its own program, which also knows paraphrases."),
    "length_ratio": Explained("Length ratio", "around 1", "Words of the captions by words of the originals.", 2.0),
}
SUMMARY: Final = ("bleu_4", "rouge_l", "cider_d", "concept_f1")
OF_A_CARD: Final = ("rouge_l", "cider_d", "concept_f1")


def explained(name: str) -> Explained:
    return EXPLAINED.get(name, Explained(name, "", ""))
