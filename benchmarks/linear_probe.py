"""Is the package's own linear probe worth its lines, or does scikit-learn's solver do?

`protoclip.evaluation.linear_probe` against `LogisticRegression` (L-BFGS) on the same objective, at
the same L2 strengths, each fit starting from the one before; the strength is chosen on validation.
Also scikit-learn on standardised columns, which is another objective with strengths of its own. On
the emoji image features of a run, and on made-up rows in a narrow cone far from the origin, whose
columns' scales fall by a factor of a thousand.

    python benchmarks/linear_probe.py [--run FOLDER] [--rows 20000] [--width 512] [--classes 100]
        [--repeats 1] [--out FILE]
"""

import argparse
import datetime
import os
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import sklearn
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from protoclip.config import Config
from protoclip.evaluation import datasets, suite
from protoclip.evaluation.linear_probe import REGULARISATIONS, fit_linear_probes
from protoclip.models import loading

STRENGTHS = REGULARISATIONS[::3]
MAX_ITERATIONS = 400  # of scikit-learn a strength
# Strengths for rows whose columns have variance 1.
STANDARDISED = [100 * strength for strength in STRENGTHS]

Rows = tuple[Tensor, Tensor]  # features and labels
Splits = dict[str, Rows]
Fit = tuple[Tensor, Tensor]  # weights and bias of all classes
Found = tuple[list[float], list[float], float]  # losses, validation accuracies, test accuracy


def emoji(run: Path | None) -> Splits:
    """Image features and subgroups of the emoji; of new weights where no run is given."""
    data = datasets.emoji()
    if run is None:
        model = loading.model(Config().model, seed=0).eval()
        transform, tokenizer = (
            loading.evaluation_transform(model),
            loading.tokenizer(Config().model),
        )
    else:
        model, transform, tokenizer = loading.load(run)
    features = suite.extract(
        model, transform, tokenizer, data, split="test", report=lambda *_: None
    )
    return {split: (features.images[split], data.labels(split)) for split in datasets.SPLITS}


def made(rows: int, width: int, classes: int) -> Splits:
    """Unit rows around a direction of each class, in a narrow cone."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    spectrum = torch.logspace(0, -3, width)
    found = {}
    for split, count in {"train": rows, "validation": rows // 5, "test": rows // 5}.items():
        labels = torch.randint(classes, (count,), generator=generator)
        noise = 4 * torch.randn(count, width, generator=generator)
        found[split] = (F.normalize((centres[labels] + noise) * spectrum + 3, dim=1), labels)
    return found


def summary(fits: list[Fit], splits: Splits) -> Found:
    """Of the fitted weights and biases, from strong to weak."""
    losses, accuracies = [], {"validation": [], "test": []}
    for (weights, bias), strength in zip(fits, STRENGTHS, strict=True):
        features, labels = splits["train"]
        logits = features.double() @ weights.T + bias
        penalty = strength / 2 * weights.square().sum()
        losses.append(float(F.cross_entropy(logits, labels) + penalty))
        for split in accuracies:
            features, labels = splits[split]
            answers = (features.double() @ weights.T + bias).argmax(dim=1)
            accuracies[split].append(float((answers == labels).double().mean()))
    validation = accuracies["validation"]
    return losses, validation, accuracies["test"][validation.index(max(validation))]


def whole(classes: Tensor, weights: Tensor, bias: Tensor, num_classes: int) -> Fit:
    """A fit over all classes; those that no training row has are never answered."""
    every = torch.zeros(num_classes, weights.shape[1], dtype=torch.float64)
    biases = torch.full((num_classes,), -1e9, dtype=torch.float64)
    every[classes], biases[classes] = weights, bias
    return every, biases


def ours(splits: Splits, num_classes: int) -> list[Fit]:
    probes = fit_linear_probes(*splits["train"], STRENGTHS)
    return [whole(probe.classes, probe.weights, probe.bias, num_classes) for probe in probes]


def scikit_learn(
    splits: Splits, num_classes: int, *, tolerance: float, standardised: bool = False
) -> list[Fit]:
    features, labels = splits["train"]
    rows = features.double()
    centre, scale = torch.zeros_like(rows[0]), torch.ones_like(rows[0])
    if standardised:
        centre, scale = rows.mean(dim=0), rows.std(dim=0)
    rows = ((rows - centre) / scale).numpy()
    model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=tolerance, warm_start=True)
    fits = []
    for strength in STANDARDISED if standardised else STRENGTHS:
        model.set_params(C=1 / (strength * len(rows)))
        model.fit(rows, labels.numpy())
        weights = torch.from_numpy(model.coef_).double() / scale
        bias = torch.from_numpy(model.intercept_).double() - weights @ centre
        fits.append(whole(torch.from_numpy(model.classes_), weights, bias, num_classes))
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    sets = {
        "emoji": lambda: emoji(arguments.run),
        "made up": lambda: made(arguments.rows, arguments.width, arguments.classes),
    }
    lines = [
        "# Linear probe: the package's solver and scikit-learn's",
        "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}; {os.uname().machine} CPU, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, scikit-learn "
        f"{sklearn.__version__}; {len(STRENGTHS)} strengths, {STRENGTHS[0]:.0e} to "
        f"{STRENGTHS[-1]:.0e}, of scikit-learn at most {MAX_ITERATIONS} iterations each. Seconds "
        f"for all: median of {arguments.repeats}. Excess: the most by which a strength's objective "
        "is above the least that any solver reached.",
        "",
        "| rows | solver | seconds | to the package's | excess | best validation | test |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, load in sets.items():
        splits = load()
        num_classes = int(max(labels.max() for _, labels in splits.values())) + 1
        solvers = {
            "the package's": ours,
            "scikit-learn, tol 1e-4": partial(scikit_learn, tolerance=1e-4),
            "scikit-learn, tol 1e-6": partial(scikit_learn, tolerance=1e-6),
            "scikit-learn, standardised": partial(scikit_learn, tolerance=1e-4, standardised=True),
        }
        seconds: dict[str, list[float]] = {solver: [] for solver in solvers}
        found: dict[str, Found] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for _ in range(arguments.repeats):
                for solver, fit in solvers.items():
                    began = time.perf_counter()
                    fits = fit(splits, num_classes)
                    seconds[solver].append(time.perf_counter() - began)
                    found[solver] = summary(fits, splits)
                    print(name, solver, seconds[solver][-1], found[solver], file=sys.stderr)
        least = [min(losses) for losses in zip(*(of[0] for of in found.values()), strict=True)]
        base = statistics.median(seconds["the package's"])
        shape = " x ".join(f"{size:,}" for size in splits["train"][0].shape)
        classes = len(splits["train"][1].unique())
        for solver, (losses, validation, test) in found.items():
            excess = max(loss - low for loss, low in zip(losses, least, strict=True))
            median = statistics.median(seconds[solver])
            lines.append(
                f"| {name}, {shape}, {classes} classes | {solver} | {median:.1f} | "
                f"{median / base:.2f} | {excess:.1e} | {100 * max(validation):.1f} | "
                f"{100 * test:.1f} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
