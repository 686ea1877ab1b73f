"""Linear probe: multinomial logistic regression on frozen features."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# L2 strengths from strong to weak. A grid that ends too early underrates some features.
REGULARISATIONS = tuple(10 ** (-half_decades / 2) for half_decades in range(4, 17))
TOLERANCE = 3e-4  # of the scaled gradient; half its squared norm is about the loss still to gain
MAX_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A fitted classifier; `gradient` is the largest entry of the scaled gradient after the fit."""

    weights: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]
    classes: Int[Tensor, " k"]
    gradient: float

    def predict(self, features: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """The most probable of the classes seen in training."""
        return self.classes[(features.double() @ self.weights.T + self.bias).argmax(dim=1)]

    def accuracy(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
        """Share of correct rows; a class unseen in training is never right."""
        return float((self.predict(features) == labels).double().mean())

    def ranks(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """How many other classes are at least as probable as each row's own; k if it is unseen."""
        logits = features.double() @ self.weights.T + self.bias
        position = torch.searchsorted(self.classes, labels).clamp(max=len(self.classes) - 1)
        own = logits.gather(1, position.unsqueeze(1))
        ranks = (logits >= own).sum(dim=1) - 1
        return ranks.where(self.classes[position] == labels, len(self.classes))


def best_linear_probe(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    validation_features: Float[Tensor, "v d"] | None = None,
    validation_labels: Int[Tensor, " v"] | None = None,
    *,
    seed: int = 0,
) -> LinearProbe:
    """The probe whose L2 strength is best on validation (Radford et al. 2021), or the strongest.

    Without validation rows, the strength is the best for a fifth of the training rows (drawn by the
    seed) after a fit to the others, and then all training rows are fitted.
    """
    if validation_features is not None and validation_labels is not None:
        probes = fit_linear_probes(train_features, train_labels)
        return max(probes, key=lambda probe: probe.accuracy(validation_features, validation_labels))
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order[: len(order) // 5], order[len(order) // 5 :]
    probes = fit_linear_probes(train_features[rest], train_labels[rest])
    right = [probe.accuracy(train_features[held_out], train_labels[held_out]) for probe in probes]
    strengths = REGULARISATIONS[: right.index(max(right)) + 1]
    return fit_linear_probes(train_features, train_labels, strengths)[-1]


def fit_linear_probes(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    regularisations: Sequence[float] = REGULARISATIONS,
) -> list[LinearProbe]:
    """Minimise `mean cross-entropy + regularisation / 2 * |weights|^2` for each strength.

    Contrastive features lie in a narrow cone, where scikit-learn's L-BFGS is slow or stops early
    (benchmarks/linear_probe.py). So features are centred, rotated to their principal axes, and each
    weight is scaled by the curvature along its axis: the same optimum on a shorter path. Each fit
    starts from the one before; go from strong to weak.

    Raises:
        ValueError: Fewer than two classes.
    """
    classes, targets = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("linear probe: the training rows need two classes or more")
    features = features.double()
    centre = features.mean(dim=0)
    centred = features - centre
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    rows = centred @ axes
    weights = rows.new_zeros(len(classes), rows.shape[1])
    bias = (torch.bincount(targets).double() / len(targets)).log()
    probes = []
    for strength in regularisations:
        for dtype in (torch.float32, torch.float64):  # float64 where float32 gets stuck
            weights, bias, gradient = minimise(
                rows.to(dtype), targets, weights, bias, variances.clamp(min=0), strength
            )
            if gradient <= TOLERANCE:
                break
        else:
            warnings.warn(
                f"linear probe: regularisation {strength:.1e} did not converge in "
                f"{MAX_ITERATIONS} iterations",
                stacklevel=2,
            )
        raw = weights @ axes.T
        probes.append(
            LinearProbe(weights=raw, bias=bias - raw @ centre, classes=classes, gradient=gradient)
        )
    return probes


def minimise(
    rows: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    weights: Float[Tensor, "k d"],
    bias: Float[Tensor, " k"],
    variances: Float[Tensor, " d"],
    strength: float,
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"], float]:
    """L-BFGS in the rows' precision from the given start; returns weights, bias and gradient."""
    weights, bias = weights.to(rows), bias.to(rows)
    # The Hessian's block of class c is E[p_c (1 - p_c) x x^T] + strength, about
    # E[p_c (1 - p_c)] E[x x^T] + strength. The floor bounds the scales of classes fitted perfectly.
    chances = (rows @ weights.T + bias).softmax(dim=1)
    curvature = (chances * (1 - chances)).mean(dim=0).clamp(min=1e-8).double()
    scale = (curvature.unsqueeze(1) * variances + strength).rsqrt().to(rows)
    bias_scale = curvature.rsqrt().to(rows)
    scaled_weights, scaled_bias = weights / scale, bias / bias_scale
    index = torch.arange(len(rows))

    def closure() -> float:
        weights = scaled_weights * scale
        log_chances = torch.addmm(scaled_bias * bias_scale, rows, weights.T).log_softmax(dim=1)
        # In float64: the line search compares losses that differ by less than float32 resolves.
        fit = -log_chances[index, targets].double().mean()
        residual = log_chances.exp_()
        residual[index, targets] -= 1
        scaled_weights.grad = (residual.T @ rows / len(rows) + strength * weights) * scale
        scaled_bias.grad = residual.mean(dim=0) * bias_scale
        return float(fit + strength / 2 * weights.double().square().sum())

    variables = [scaled_weights, scaled_bias]
    torch.optim.LBFGS(
        variables,
        max_iter=MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    ).step(closure)  # type: ignore[no-untyped-call]
    closure()
    gradient = max(float(v.grad.abs().max()) for v in variables if v.grad is not None)
    return (scaled_weights * scale).double(), (scaled_bias * bias_scale).double(), gradient
