"""How far a difference between two models can be told from chance: 95% intervals."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import t

from protoclip.evaluation.clustering import agreement
from protoclip.evaluation.samples import SampleResults

Draws = npt.NDArray[np.float64]
Interval = tuple[float, float]


def t_interval(differences: Sequence[float]) -> Interval:
    """Student's interval of the mean of two or more independent differences."""
    found = np.asarray(differences, dtype=np.float64)
    assert len(found) > 1
    half = t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return float(found.mean() - half), float(found.mean() + half)


def bootstrap_interval(first: Draws, second: Draws) -> Interval:
    """Where the middle 95% of the paired draws' differences lie."""
    low, high = np.quantile(second - first, [0.025, 0.975])
    return float(low), float(high)


def resampled(
    results: SampleResults, metrics: Sequence[str], *, draws: int, seed: int = 0
) -> dict[str, Draws]:
    """Metrics of one model on test sets that are drawn from its own with replacement.

    Draw `i` holds the same samples, by id, for every model with the same ids, metrics and seed, so
    that models can be compared draw by draw. Metrics that are no mean over samples and no agreement
    of clusters are left out.

    Returns:
        `(draws,)` values of each metric.
    """
    values = {name: of for name in metrics if (of := results.values(name)) is not None}
    clustered = [name for name in ("ami", "ari") if f"clustering/{name}" in metrics]
    labels = np.stack([results.columns["class"], results.columns["cluster"]], 1)
    found: dict[str, list[float]] = {}
    for number, ids in enumerate((results.image_ids, results.text_ids)):
        means = [name for name, (of_ids, _) in values.items() if of_ids is ids]
        agreements = clustered if ids is results.image_ids else []
        if not means and not agreements:
            continue
        order = np.argsort(ids, kind="stable")
        table = np.stack([values[name][1] for name in means], 1)[order] if means else None
        generator = np.random.default_rng([seed, number])
        for _ in range(draws):
            rows = generator.integers(len(order), size=len(order))
            drawn = dict(zip(means, table[rows].mean(0), strict=True)) if table is not None else {}
            if agreements:
                raise_on_all_ranks = agreement(*labels[order][rows].T)
                drawn |= {f"clustering/{name}": raise_on_all_ranks[name] for name in agreements}
            for name, value in drawn.items():
                found.setdefault(name, []).append(value)
    return {name: np.asarray(of_draws) for name, of_draws in found.items()}
