"""What learns classes from the images of `train`: the linear probe, and kNN.

Classifiers of class names, which learn nothing from images, are in `zero_shot.py`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.evaluation import retrieval
from protoclip.evaluation.features import Features
from protoclip.evaluation.metrics import SampleResults

# L2 strengths from strong to weak. A grid that ends too early underrates some features.
REGULARISATIONS = tuple(10 ** (-half_decades / 2) for half_decades in range(4, 17))
TOLERANCE = 3e-4  # of the scaled gradient; half its squared norm is about the loss still to gain
MAX_ITERATIONS = 1000


def score_linear_probe(features: Features) -> SampleResults:
    """Does a linear classifier fitted to `train`, and `validation`, find the class?"""
    part = features.part
    assert part.labels is not None
    others = [other for name, other in features.parts.items() if name != features.split]
    rows = [(other.features, other.labels) for other in others if other.labels is not None]
    probe = best_linear_probe(*(tensor.to(features.device) for pair in rows for tensor in pair))
    return SampleResults(
        images={
            "class": part.labels.numpy(),
            "linear_probe_correct": (probe.predict(part.features) == part.labels).numpy(),
            "linear_probe_rank": probe.ranks(part.features, part.labels).numpy(),
        }
    )


def score_knn(features: Features) -> SampleResults:
    """Do the most similar images of `train` have the class?"""
    part, train = features.part, features.parts["train"]
    assert part.labels is not None
    assert train.labels is not None
    tensors = (train.features, train.labels, part.features)
    predicted = count_votes(*(tensor.to(features.device) for tensor in tensors)).argmax(dim=1)
    return SampleResults(images={"knn_correct": (predicted.cpu() == part.labels).numpy()})


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A fitted classifier; `gradient` is the largest entry of the scaled gradient after the fit."""

    weights: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]
    classes: Int[Tensor, " k"]
    gradient: float

    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return features.to(self.weights) @ self.weights.T + self.bias

    def predict(self, features: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """The most probable of the classes seen in training, on the features' device."""
        return self.classes[self.logits(features).argmax(dim=1)].to(features.device)

    def accuracy(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> float:
        """Share of correct rows; a class unseen in training is never right."""
        return float((self.predict(features) == labels).double().mean())

    def ranks(self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """How many other classes are at least as probable as the class of each row. An unseen class
        has rank k, or 5 if k is smaller, so that it is not among the first five."""
        logits, wanted = self.logits(features), labels.to(self.classes)
        position = torch.searchsorted(self.classes, wanted).clamp(max=len(self.classes) - 1)
        ranks = (logits >= logits.gather(1, position.unsqueeze(1))).sum(dim=1) - 1
        ranks = ranks.where(self.classes[position] == wanted, max(5, len(self.classes)))
        return ranks.to(features.device)


def best_linear_probe(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    validation_features: Float[Tensor, "v d"] | None = None,
    validation_labels: Int[Tensor, " v"] | None = None,
    *,
    seed: int = 0,
) -> LinearProbe:
    """A fit to all rows, with the L2 strength that is best on validation rows left out of a fit.

    CLIP (Radford et al. 2021, section A.3) and CLIP_benchmark do the same. Among equally good
    strengths the strongest wins. Without validation rows, a fifth of the training rows is used,
    drawn by the seed. If the other rows have one class, the strongest is taken.
    """
    features, labels = train_features, train_labels
    if validation_features is not None and validation_labels is not None:
        features = torch.cat([train_features, validation_features])
        labels = torch.cat([train_labels, validation_labels])
        chooses = torch.arange(len(labels)) >= len(train_labels)
    else:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chooses = torch.zeros(len(labels), dtype=torch.bool)
        chooses[order[: len(order) // 5]] = True
    chooses = chooses.to(labels.device)
    if len(torch.unique(labels[~chooses])) < 2:
        return fit_linear_probes(features, labels, REGULARISATIONS[:1])[0]
    probes = fit_linear_probes(features[~chooses], labels[~chooses])
    right = [probe.accuracy(features[chooses], labels[chooses]) for probe in probes]
    strengths = REGULARISATIONS[: right.index(max(right)) + 1]
    return fit_linear_probes(features, labels, strengths)[-1]


def fit_linear_probes(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    regularisations: Sequence[float] = REGULARISATIONS,
) -> list[LinearProbe]:
    """Minimise `mean cross-entropy + regularisation / 2 * |weights|^2` for each strength.

    It runs on the features' device, in float64 except on MPS, which lacks it.

    Contrastive features lie in a narrow cone, where scikit-learn's L-BFGS is slow or stops early
    (measured in benchmarks/results/linear_probe_x86-2core_202611.md). So features are centred,
    rotated to their principal axes, and each weight is scaled by the curvature along its axis: the
    same optimum on a shorter path. Each fit starts from the one before; go from strong to weak.

    Raises:
        ValueError: Fewer than two classes.
    """
    classes, targets = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("linear probe: the training rows need two classes or more")
    wide = torch.float32 if features.device.type == "mps" else torch.float64
    features = features.to(wide)
    centre = features.mean(dim=0)
    rows = features - centre
    covariance = rows.T @ rows / len(rows)
    # MPS has no eigenvectors either. The matrix is small.
    variances, axes = (part.to(rows) for part in torch.linalg.eigh(covariance.cpu().double()))
    rows = rows @ axes
    weights = rows.new_zeros(len(classes), rows.shape[1])
    bias = (torch.bincount(targets).to(rows) / len(targets)).log()
    probes = []
    for strength in regularisations:
        for dtype in dict.fromkeys((torch.float32, wide)):  # float64 if float32 gets stuck
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
    wide = variances.dtype
    curvature = (chances * (1 - chances)).mean(dim=0).clamp(min=1e-8).to(wide)
    scale = (curvature.unsqueeze(1) * variances + strength).rsqrt().to(rows)
    bias_scale = curvature.rsqrt().to(rows)
    scaled_weights, scaled_bias = weights / scale, bias / bias_scale
    index = torch.arange(len(rows), device=rows.device)

    def closure() -> float:
        weights = scaled_weights * scale
        log_chances = torch.addmm(scaled_bias * bias_scale, rows, weights.T).log_softmax(dim=1)
        # In float64: the line search compares losses that differ by less than float32 resolves.
        fit = -log_chances[index, targets].to(wide).mean()
        residual = log_chances.exp_()
        residual[index, targets] -= 1
        scaled_weights.grad = (residual.T @ rows / len(rows) + strength * weights) * scale
        scaled_bias.grad = residual.mean(dim=0) * bias_scale
        return float(fit + strength / 2 * weights.to(wide).square().sum())

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
    return (scaled_weights * scale).to(wide), (scaled_bias * bias_scale).to(wide), gradient


def count_votes(
    train_features: Float[Tensor, "n d"],
    train_labels: Int[Tensor, " n"],
    features: Float[Tensor, "m d"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "m c"]:
    """The votes of the k most similar training rows for each class (Wu et al. 2018).

    A neighbour of cosine similarity `s` casts a vote of `exp(s / temperature)`, relative to the
    nearest one's. If there are fewer than k training rows, all vote.
    """
    keys = F.normalize(train_features.float(), dim=1)
    number = int(train_labels.max()) + 1
    size, votes = max(1, retrieval.CHUNK // max(len(keys), number)), []
    for chunk in torch.split(features, size):
        queries = F.normalize(chunk.float(), dim=1)
        similarity, rows = (queries @ keys.T).topk(min(k, len(keys)))
        # Relative to the nearest: the same winner, and no overflow at a low temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        counted = weights.new_zeros(len(chunk), number)
        votes.append(counted.scatter_add_(1, train_labels[rows], weights))
    return torch.cat(votes)
