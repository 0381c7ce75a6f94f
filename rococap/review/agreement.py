"""The statistics of reader studies, by well-known libraries: agreement of readers beyond chance, and 95% intervals.

Answers in, numbers out: knows neither studies nor the database. A coefficient is None where it is not defined: with
fewer than two readers, or if every answer is the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations
from statistics import fmean
from typing import Any

from rococap.errors import RococapError

Codings = Sequence[Mapping[str, int]]
"""For each item, the category that each reader chose, by reader. Readers may have left out items."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of `readers` on `n_items` items that at least two of them coded.

    `cohen` is Cohen's kappa of each two readers, and `cohen_mean` the mean of these; `fleiss` is Fleiss' kappa over the
    items that every reader coded; `krippendorff` is Krippendorff's alpha over all items. If the categories are
    ordered, Cohen's kappa is weighted quadratically, and alpha uses the interval distance.
    """

    readers: tuple[str, ...]
    n_items: int
    cohen: Mapping[str, float | None]
    cohen_mean: float | None
    fleiss: float | None
    krippendorff: float | None


def agreement(codings: Codings, n_categories: int, *, ordered: bool = False) -> Agreement:
    """The agreement on categories 0 to `n_categories` - 1. Raises RococapError if a library is not installed."""
    readers = tuple(sorted({reader for coded in codings for reader in coded}))
    cohen = {f"{a}, {b}": cohen_kappa(codings, a, b, n_categories, ordered) for a, b in combinations(readers, 2)}
    known = [kappa for kappa in cohen.values() if kappa is not None]
    return Agreement(
        readers,
        sum(len(coded) > 1 for coded in codings),
        cohen,
        fmean(known) if known else None,
        fleiss_kappa([coded for coded in codings if len(coded) == len(readers)], n_categories),
        krippendorff_alpha(codings, ordered),
    )


def cohen_kappa(codings: Codings, a: str, b: str, n_categories: int, ordered: bool = False) -> float | None:
    """Cohen's kappa (1960) of two readers over the items that both coded, weighted quadratically (1968) if `ordered`.

    None if they used only one category.
    """
    both = [(coded[a], coded[b]) for coded in codings if a in coded and b in coded]
    if len({category for pair in both for category in pair}) < 2:
        return None
    metrics = _import("sklearn.metrics")
    ours, theirs = zip(*both, strict=True)
    weights = "quadratic" if ordered else None
    return float(metrics.cohen_kappa_score(ours, theirs, labels=range(n_categories), weights=weights))


def fleiss_kappa(codings: Codings, n_categories: int) -> float | None:
    """Fleiss' kappa (1971) of items that all readers coded."""
    if not codings or len(codings[0]) < 2 or len({one for coded in codings for one in coded.values()}) < 2:
        return None
    rater = _import("statsmodels.stats.inter_rater")
    counts = [[list(coded.values()).count(category) for category in range(n_categories)] for coded in codings]
    return float(rater.fleiss_kappa(counts, method="fleiss"))


def krippendorff_alpha(codings: Codings, ordered: bool = False) -> float | None:
    """Krippendorff's alpha over the items that at least two readers coded: nominal, or interval if `ordered`."""
    data = [
        (reader, item, category)
        for item, coded in enumerate(codings)
        if len(coded) > 1
        for reader, category in coded.items()
    ]
    if len({category for _, _, category in data}) < 2:
        return None
    from nltk.metrics.agreement import AnnotationTask
    from nltk.metrics.distance import binary_distance, interval_distance

    return float(AnnotationTask(data, interval_distance if ordered else binary_distance).alpha())


def share_interval(of_pictures: Sequence[float]) -> tuple[float, float] | None:
    """Wilson's 95% interval (1927) of a share that is the mean of the shares of pictures; None without pictures.

    Pictures are counted and not readings, since readers of the same picture are not independent: the interval is right
    if they always agree, and wider than needed if they do not.
    """
    if not of_pictures:
        return None
    proportion = _import("statsmodels.stats.proportion")
    low, high = proportion.proportion_confint(sum(of_pictures), len(of_pictures), method="wilson")
    return float(low), float(high)


def mean_interval(of_pictures: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95% interval of the mean of pictures; None for fewer than two."""
    if len(of_pictures) < 2:
        return None
    weights = _import("statsmodels.stats.weightstats")
    low, high = weights.DescrStatsW(of_pictures).tconfint_mean()
    return float(low), float(high)


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise RococapError(
            f"Statistics of studies need scikit-learn and statsmodels ({error}): pip install 'rococap[studies]'"
        ) from error
