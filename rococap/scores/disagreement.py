"""Finds pictures on which runs state different facts: the ones that a person should look at first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final

from rococap.scores import facts

KINDS: Final = ("side", "negation", "modality")
"""The kinds of facts that runs are compared in."""
DISAGREEMENT: Final = "disagreement"
"""The name under which `compare` stores the weight of a picture with the captions that it compared."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A fact in which two runs differ: what each says, None if it states nothing in place of the other's fact."""

    kind: str
    runs: tuple[str, str]
    says: tuple[str | None, str | None]

    @property
    def is_opposite(self) -> bool:
        return None not in self.says


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A picture on which runs differ: `opposite` facts contradict each other, `other` ones one run alone states."""

    image_id: str
    split: str
    opposite: int
    other: int
    differences: Sequence[Difference]

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller for pictures that are worse: by opposite facts, then by the others."""
        return -self.opposite, -self.other


@dataclass(slots=True)
class Disagreements:
    """Pictures that at least two runs captioned: how many were compared, how many could not be since captions are not
    in English, on how many the runs differ, and on how many in opposite facts. Once `done`, `worst` holds the `limit`
    worst, the worst first, those that are equally bad in the order in which they were added.
    """

    limit: int
    compared: int = 0
    not_read: int = 0
    differing: int = 0
    opposite: int = 0
    worst: list[Disagreement] = field(default_factory=list)

    def add(self, split: str, image_id: str, texts: Mapping[str, str]) -> float | None:
        """Compares the runs' captions of a picture, run -> text. Returns its `weight`, None if it is not compared."""
        if len(texts) < 2:
            return None
        differences = between(texts)
        if differences is None:
            self.not_read += 1
            return None
        self.compared += 1
        if differences:
            self._keep(split, image_id, differences)
        return weight(differences)

    def _keep(self, split: str, image_id: str, differences: Sequence[Difference]) -> None:
        self.differing += 1
        n_opposite = sum(one.is_opposite for one in differences)
        self.opposite += bool(n_opposite)
        self.worst.append(Disagreement(image_id, split, n_opposite, len(differences) - n_opposite, differences))
        if len(self.worst) > 2 * self.limit + _SLACK:
            self._cut()

    def done(self) -> "Disagreements":
        self._cut()
        return self

    def _cut(self) -> None:
        self.worst = sorted(self.worst, key=lambda one: one.rank)[: self.limit]


_SLACK: Final = 100
"""Pictures that are kept beyond the limit before the list is sorted and cut again."""


def weight(differences: Sequence[Difference]) -> float:
    """Larger for pictures that are worse: 1 for each opposite fact, and 0.001 for each that one run alone states."""
    return sum(1 if one.is_opposite else 0.001 for one in differences)


def between(texts: Mapping[str, str]) -> list[Difference] | None:
    """In what the captions of one picture differ, run -> text; None if fewer than two of them are in English."""
    read = {run: found for run, text in texts.items() if (found := facts.facts_of(text)) is not None}
    if len(read) < 2:
        return None
    return [
        difference
        for first, second in combinations(read, 2)
        if texts[first] != texts[second]
        for difference in _between((first, second), read[first], read[second])
    ]


def _between(runs: tuple[str, str], first: facts.Facts, second: facts.Facts) -> list[Difference]:
    found = facts.agreements(second, first)
    return [
        Difference(kind, runs, says)
        for kind in KINDS
        for says in (
            *found[kind].opposite,
            *((one, None) for one in found[kind].missed),
            *((None, one) for one in found[kind].invented),
        )
    ]
