"""Linear probe: multinomial logistic regression on frozen features."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# L2 strengths from strong to weak, half a decade apart: 1e-2 ... 1e-8. Radford et al. (2021) go to
# 1e-10; a grid that ends too soon gives features whose best lies beyond it too little.
REGULARISATIONS = tuple(10 ** (-half_decades / 2) for half_decades in range(4, 17))


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A fitted classifier, and how flat the objective was where the fit stopped."""

    weights: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]
    classes: Int[Tensor, " k"]
    regularisation: float
    gradient: float
    """Largest entry of the scaled gradient, see `fit_linear_probes`."""

    def predict(self, features: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """The most probable of the classes seen in training."""
        logits = features.double().cpu() @ self.weights.T + self.bias
        return self.classes[logits.argmax(dim=1)]

    def accuracy(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
        """Share of rows put in their class; a class unseen in training is never right."""
        return float((self.predict(features) == labels.cpu()).double().mean())


def fit_linear_probes(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    regularisations: Sequence[float] = REGULARISATIONS,
    *,
    tolerance: float = 3e-4,
    max_iterations: int = 1000,
) -> list[LinearProbe]:
    """Minimise `mean cross-entropy + regularisation / 2 * |weights|^2` for each strength.

    The objective is that of the raw features; the bias is not penalised. It is minimised by
    full-batch L-BFGS over other variables, which changes the path and not the optimum: features are
    centred (the bias takes that up) and turned to their principal axes, and each weight is scaled
    by an estimate of the curvature along it. Features of a narrow cone, as contrastive models give,
    would take thousands of iterations otherwise. Each fit starts where the one before ended.

    Args:
        features: Training rows, finite.
        labels: Class of each row.
        regularisations: L2 strengths, above 0; from strong to weak is fastest.
        tolerance: A fit has converged when no entry of the gradient by the scaled variables is
            larger. Half the squared norm of that gradient is about the loss still to be gained.
        max_iterations: Most L-BFGS iterations a fit: in float32, then again in float64 if needed.

    Returns:
        One classifier a strength. A fit that stopped short of the tolerance warns (`UserWarning`).

    Raises:
        ValueError: Fewer than two classes, a strength that is not above 0, or features that are
            not finite.
    """
    classes, targets = torch.unique(labels.cpu(), return_inverse=True)
    if len(classes) < 2:
        raise ValueError("linear probe: the training rows need two classes or more")
    if min(regularisations, default=0.0) <= 0:
        raise ValueError(f"linear probe: regularisations {regularisations} need to be above 0")
    raw = features.double().cpu()
    if not bool(torch.isfinite(raw).all()):
        raise ValueError("linear probe: features hold non-finite values")
    centre = raw.mean(dim=0)
    variances, axes = torch.linalg.eigh((raw - centre).T @ (raw - centre) / len(raw))
    variances = variances.clamp(min=0)
    rows = (raw - centre) @ axes
    weights = rows.new_zeros(len(classes), rows.shape[1])
    bias = (torch.bincount(targets).double() / len(targets)).log()
    probes = []
    for regularisation in regularisations:
        for precision in (torch.float32, torch.float64):  # the second where the first gets stuck
            weights, bias, gradient = minimise(
                rows.to(precision),
                targets,
                weights,
                bias,
                variances,
                regularisation,
                tolerance,
                max_iterations,
            )
            if gradient <= tolerance:
                break
        else:
            warnings.warn(
                f"linear probe: regularisation {regularisation:.1e} did not converge in "
                f"{max_iterations} iterations: gradient {gradient:.1e}, above {tolerance:.1e}",
                stacklevel=2,
            )
        of_raw = weights @ axes.T
        probes.append(
            LinearProbe(
                weights=of_raw,
                bias=bias - of_raw @ centre,
                classes=classes,
                regularisation=regularisation,
                gradient=gradient,
            )
        )
    return probes


def minimise(
    rows: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    weights: Float[Tensor, "k d"],
    bias: Float[Tensor, " k"],
    variances: Float[Tensor, " d"],
    regularisation: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"], float]:
    """L-BFGS from the given weights and bias, for rows whose covariance is diagonal.

    Works in the precision of the rows and returns float64.
    """
    weights, bias = weights.to(rows), bias.to(rows)
    # The Hessian's block of class c is E[p_c (1 - p_c) x x^T] + regularisation, about
    # E[p_c (1 - p_c)] E[x x^T] + regularisation. The floor keeps fitted classes from free scales.
    chances = (rows @ weights.T + bias).softmax(dim=1)
    curvature = (chances * (1 - chances)).mean(dim=0).clamp(min=1e-8).double()
    scale = (curvature.unsqueeze(1) * variances + regularisation).rsqrt().to(rows)
    bias_scale = curvature.rsqrt().to(rows)
    scaled_weights, scaled_bias = weights / scale, bias / bias_scale
    index = torch.arange(len(rows))

    def closure() -> float:
        weights = scaled_weights * scale
        log_chances = torch.addmm(scaled_bias * bias_scale, rows, weights.T).log_softmax(dim=1)
        # The line search compares losses that differ by less than float32 resolves.
        loss = (
            -log_chances[index, targets].double().mean()
            + regularisation / 2 * weights.double().square().sum()
        )
        residual = log_chances.exp_()
        residual[index, targets] -= 1
        of_weights = residual.T @ rows / len(rows) + regularisation * weights
        scaled_weights.grad = of_weights * scale
        scaled_bias.grad = residual.mean(dim=0) * bias_scale
        return float(loss)

    optimiser = torch.optim.LBFGS(
        [scaled_weights, scaled_bias],
        max_iter=max_iterations,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    optimiser.step(closure)  # type: ignore[no-untyped-call]
    closure()
    assert scaled_weights.grad is not None
    assert scaled_bias.grad is not None
    gradient = max(float(scaled_weights.grad.abs().max()), float(scaled_bias.grad.abs().max()))
    return (scaled_weights * scale).double(), (scaled_bias * bias_scale).double(), gradient


def best_linear_probe(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    validation_features: Float[Tensor, "v d"],
    validation_labels: Int[Tensor, " v"],
    *,
    regularisations: Sequence[float] = REGULARISATIONS,
    tolerance: float = 3e-4,
    max_iterations: int = 1000,
) -> LinearProbe:
    """The linear probe whose strength was best on the validation rows.

    Raw features and a validated L2 strength, as Radford et al. (2021, A.3). The classifier is
    trained on the training rows alone; of strengths that validate equally the strongest is taken.

    Raises:
        ValueError: No validation row, or as `fit_linear_probes`.
    """
    if len(validation_features) == 0:
        raise ValueError("linear probe: needs a validation row")
    probes = fit_linear_probes(
        train_features,
        train_labels,
        sorted(regularisations, reverse=True),
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return max(probes, key=lambda probe: probe.accuracy(validation_features, validation_labels))


def linear_probe_accuracy(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    validation_features: Float[Tensor, "v d"],
    validation_labels: Int[Tensor, " v"],
    test_features: Float[Tensor, "m d"],
    test_labels: Int[Tensor, " m"],
    *,
    regularisations: Sequence[float] = REGULARISATIONS,
    tolerance: float = 3e-4,
    max_iterations: int = 1000,
) -> dict[str, float]:
    """Test accuracy of `best_linear_probe`.

    Returns:
        `acc1`, a fraction in [0, 1], and `regularisation`, the strength chosen.

    Raises:
        ValueError: No validation or no test row, or as `fit_linear_probes`.
    """
    if len(test_features) == 0:
        raise ValueError("linear probe: needs a test row")
    best = best_linear_probe(
        train_features,
        train_labels,
        validation_features,
        validation_labels,
        regularisations=regularisations,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return {
        "acc1": best.accuracy(test_features, test_labels),
        "regularisation": best.regularisation,
    }
