"""Is the package's own linear probe worth its lines, or does scikit-learn's solver do?

`protoclip.evaluation.linear_probe` against `LogisticRegression` (L-BFGS) on the same objective, at
the same L2 strengths, each fit starting from the one before. On the emoji image features of a run
(or of new weights), and on made-up rows in a narrow cone far from the origin, whose columns' scales
fall by a factor of a thousand.

    python benchmarks/linear_probe.py [--run FOLDER] [--rows 20000] [--width 512] [--classes 100]
"""

import argparse
import time
import warnings
from pathlib import Path

import sklearn
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from protoclip.config import Config
from protoclip.evaluation import datasets
from protoclip.evaluation.features import Encoder
from protoclip.evaluation.linear_probe import REGULARISATIONS, fit_linear_probes
from protoclip.evaluation.task_features import task_features
from protoclip.models import loading

STRENGTHS = REGULARISATIONS[::3]
MAX_ITERATIONS = 400  # of scikit-learn a strength
Fit = tuple[Tensor, Tensor]  # weights and bias of all classes


def emoji(run: Path | None) -> tuple[Tensor, Tensor]:
    """Image features and subgroups of the emoji."""
    data = datasets.emoji()
    if run is None:
        model, config = loading.model(Config().model, seed=0), Config().model
        loaded = model, loading.evaluation_transform(model), loading.tokenizer(config)
    else:
        loaded = loading.load(run)
    encoder = Encoder(model=loaded[0], transform=loaded[1], tokenizer=loaded[2])
    part = task_features(encoder, data, ["linear_probe"], split="test").parts["train"]
    return part.unit, torch.unique(part.labels, return_inverse=True)[1]


def made_up(rows: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Unit rows around a direction of each class, in a narrow cone."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.arange(rows) % classes
    noise = 4 * torch.randn(rows, width, generator=generator)
    return F.normalize((centres[labels] + noise) * torch.logspace(0, -3, width) + 3, dim=1), labels


def ours(features: Tensor, labels: Tensor) -> list[Fit]:
    probes = fit_linear_probes(features, labels, STRENGTHS)
    return [(probe.weights, probe.bias) for probe in probes]


def scikit_learn(features: Tensor, labels: Tensor, *, tolerance: float) -> list[Fit]:
    model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=tolerance, warm_start=True)
    fits = []
    for strength in STRENGTHS:
        model.set_params(C=1 / (strength * len(features)))
        model.fit(features.double().numpy(), labels.numpy())
        # The solver goes on from these in place.
        fits.append((torch.tensor(model.coef_), torch.tensor(model.intercept_)))
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore", ConvergenceWarning)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"scikit-learn {sklearn.__version__}; {len(STRENGTHS)} strengths. Excess: the most by")
    print("which a strength's objective is above the least that any solver reached.\n")
    print("| rows | solver | seconds | excess |\n|---|---|---|---|")
    sets = {"emoji": emoji(given.run), "made up": made_up(given.rows, given.width, given.classes)}
    for name, (features, labels) in sets.items():
        solvers = {
            "the package's": ours,
            "scikit-learn, tol 1e-4": lambda *rows: scikit_learn(*rows, tolerance=1e-4),
            "scikit-learn, tol 1e-6": lambda *rows: scikit_learn(*rows, tolerance=1e-6),
        }
        seconds, losses = [], []
        for solve in solvers.values():
            began = time.perf_counter()
            fits = solve(features, labels)
            seconds.append(time.perf_counter() - began)
            losses.append(
                [
                    float(F.cross_entropy(features.double() @ weights.T + bias, labels))
                    + strength / 2 * float(weights.square().sum())
                    for (weights, bias), strength in zip(fits, STRENGTHS, strict=True)
                ]
            )
        reached = torch.tensor(losses, dtype=torch.float64)
        excess = (reached - reached.amin(dim=0)).amax(dim=1).tolist()
        for solver, *found in zip(solvers, seconds, excess, strict=True):
            print(f"| {name} | {solver} | {found[0]:.1f} | {found[1]:.1e} |")


if __name__ == "__main__":
    main()
