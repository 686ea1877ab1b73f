"""95% intervals of the difference between two models: over seeds, or over test samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, xlogy
from scipy.stats import t

from protoclip.evaluation.samples import MEANS, SampleResults

Draws = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]
Interval = tuple[float, float]


def t_interval(differences: Sequence[float]) -> Interval:
    """Student's t interval of the mean of two or more independent differences."""
    found = np.asarray(differences, dtype=np.float64)
    half = t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return float(found.mean() - half), float(found.mean() + half)


def bootstrap_interval(first: Draws, second: Draws) -> Interval:
    """The middle 95% of the differences of paired draws."""
    low, high = np.quantile(second - first, [0.025, 0.975])
    return float(low), float(high)


def resampled(results: SampleResults, *, draws: int, seed: int = 0) -> dict[str, Draws]:
    """Metrics of one model on test sets drawn from its own with replacement, `(draws,)` each.

    Draw `i` holds the same samples, by id, for every model with the same ids and seed, so that two
    models can be compared draw by draw. Metrics that are neither a mean over samples nor AMI or ARI
    are left out.
    """
    found: dict[str, Draws] = {}
    for number, columns in enumerate((results.images, results.texts)):
        metrics = [metric for metric in MEANS if results.rows(metric) is columns]
        values = np.stack([results.values(metric) for metric in metrics], 1)
        order = np.argsort(columns["sample_id"], kind="stable")
        generator = np.random.default_rng([seed, number])
        rows = [order[generator.integers(len(order), size=len(order))] for _ in range(draws)]
        means = np.stack([values[drawn].mean(0) for drawn in rows], 1)
        found |= dict(zip(metrics, means, strict=True))
        if columns is results.images:
            found |= agreement(columns["class"], columns["cluster"], rows)
    return found


def agreement(classes: Ints, clusters: Ints, draws: Sequence[Ints]) -> dict[str, Draws]:
    """AMI and ARI on each draw's rows: scikit-learn's but for rounding, at a thirtieth of the time.

    Nearly all of scikit-learn's time goes into the mutual information expected by chance, a sum
    over pairs of a class size and a cluster size. Draws share most sizes, so each pair is computed
    once.
    """
    classes, clusters = (np.unique(of, return_inverse=True)[1] for of in (classes, clusters))
    shape, n = (int(classes.max()) + 1, int(clusters.max()) + 1), len(draws[0])
    cells = classes * shape[1] + clusters
    sizes, entropies, pairs = [], [], []
    for rows in draws:
        table = np.bincount(cells[rows], minlength=shape[0] * shape[1]).reshape(shape)
        counts = (table.sum(1), table.sum(0), table)
        sizes.append(counts[:2])
        entropies.append([np.log(n) - xlogy(of, of).sum() / n for of in counts])
        pairs.append([(of * (of - 1)).sum() / (n * (n - 1)) for of in counts])

    def adjusted(found: Draws, by_chance: Draws, best: Draws) -> Draws:
        trivial = best == by_chance  # both partitions have a single part
        return np.where(
            trivial, 1.0, (found - by_chance) / np.where(trivial, 1.0, best - by_chance)
        )

    first, second, joint = np.transpose(entropies)
    by_chance = expected_information(n, *(np.stack(of) for of in zip(*sizes, strict=True)))
    found = {"clustering/ami": adjusted(first + second - joint, by_chance, (first + second) / 2)}
    first, second, joint = np.transpose(pairs)
    return {**found, "clustering/ari": adjusted(joint, first * second, (first + second) / 2)}


def expected_information(n: int, class_sizes: Ints, cluster_sizes: Ints) -> Draws:
    """Mutual information of random partitions of these sizes (Vinh et al. 2010, equation 24)."""
    # A negative index finds infinity: an impossible overlap `k` has no chance.
    log_factorial = np.append(gammaln(np.arange(n + 1) + 1.0), np.full(n + 1, np.inf))
    firsts, first_of = np.unique(class_sizes, return_inverse=True)
    seconds, second_of = np.unique(cluster_sizes, return_inverse=True)
    terms = np.zeros((len(firsts), len(seconds)))
    for row, a in enumerate(firsts):
        k, b = np.arange(1, min(a, seconds.max()) + 1)[:, None], seconds
        ways = log_factorial[a] + log_factorial[n - a] + log_factorial[b] + log_factorial[n - b]
        left = sum(log_factorial[of] for of in (k, a - k, b - k, n - a - b + k))
        chance = np.exp(ways - log_factorial[n] - left)
        terms[row] = (chance * k / n * np.log(n * k / (a * np.maximum(b, 1)))).sum(0)
    parts = zip(
        first_of.reshape(class_sizes.shape), second_of.reshape(cluster_sizes.shape), strict=True
    )
    return np.array([terms[np.ix_(*pair)].sum() for pair in parts])
