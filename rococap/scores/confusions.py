"""Counts what captions state in place of what their originals state: left became right, a CT became an MRI."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rococap.progress import Progress
from rococap.scores import facts
from rococap.scores.evaluate import Scored

KINDS: Final = tuple(kind for kind in facts.KINDS if kind != "measurement")
"""The kinds of facts that have names to confuse; a measurement has a value."""
_TOP: Final = 12


@dataclass(frozen=True, slots=True)
class Confusion:
    """For each run, how often captions state `said` in place of `original`, of how many `original` in the originals."""

    kind: str
    original: str
    said: str
    counts: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Confused:
    """The most frequent confusions in pictures of a modality, the most frequent first; `more` were left out."""

    modality: str
    confusions: list[Confusion]
    more: int


def confusions(scored: Sequence[Scored], progress: Progress) -> list[Confused]:
    """The confusions of several runs by modality; those with more captions first, those without confusions left out."""
    counted = [_count(one, progress) for one in scored]
    n_captions: Counter[str] = Counter()
    for one in scored:
        n_captions.update(one.modalities)
    return [found for modality, _ in n_captions.most_common() if (found := _confused(modality, counted)).confusions]


Confusions = Counter[tuple[str, str, str, str]]
"""(modality, kind, original, said) -> how often."""
Originals = Counter[tuple[str, str, str]]
"""(modality, kind, original) -> how often."""


def _count(scored: Scored, progress: Progress) -> tuple[Confusions, Originals]:
    confused: Confusions = Counter()
    stated: Originals = Counter()
    pairs = list(zip(scored.pairs, scored.modalities, strict=True))
    for n, (pair, modality) in enumerate(pairs):
        if n % 500 == 0:
            progress(f"{scored.run.name}, {scored.split}: reading facts", n, len(pairs))
        caption, reference = facts.facts_of(pair.text), facts.facts_of(pair.reference)
        if caption is None or reference is None or not pair.reference.strip():
            continue
        found = facts.agreements(caption, reference)
        for kind in KINDS:
            one = found[kind]
            confused.update(
                (modality, kind, _name(kind, original), _name(kind, said)) for original, said in one.opposite
            )
            originals = [*one.agreeing, *one.missed, *(original for original, _ in one.opposite)]
            if kind == "negation":  # of affirmed findings, an Agreement holds only those that the caption denies
                originals = [*(f"no {name}" for name in reference.denied), *reference.affirmed]
            stated.update((modality, kind, _name(kind, name)) for name in originals)
    return confused, stated


def _name(kind: str, fact: str) -> str:
    """A side without what it is the side of."""
    return fact.split()[0] if kind == "side" else fact


def _confused(modality: str, counted: Sequence[tuple[Confusions, Originals]]) -> Confused:
    total: Confusions = Counter()
    for confused, _ in counted:
        total.update({key: n for key, n in confused.items() if key[0] == modality})
    ranked = sorted(total, key=lambda key: (-total[key], key))
    found = [
        Confusion(
            *(kind, original, said),
            [(confused[key], stated[modality, kind, original]) for confused, stated in counted],
        )
        for key in ranked[:_TOP]
        for _, kind, original, said in [key]
    ]
    return Confused(modality, found, len(ranked) - len(found))
