"""What a run's own numbers say of it: why a loss does not fall, and which metrics end in a bad
model, with the way out."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from statistics import fmean, pstdev

import torch
from jaxtyping import Int
from torch import Tensor

from protoclip.config import Config
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.distributed.collectives import all_gather
from protoclip.training.optim import steps_to_peak

# Steps at the full rate before a loss at chance is worth a word. Towers from scratch may stay there
# for some dozens; a hundred more cost little, and a word too early costs trust.
PATIENCE = 300
AT_CHANCE = 0.97  # of the way from the least possible loss to that of a guess
RISEN = 1.5  # times the loss of a guess: only a model that is sure of what is wrong gets there
# AdamW moves a weight by about the rate in a step, and by less than this in so many steps does not
# move it. No rate that is of use is so low: 1e-7 is already far above it.
UNMOVED = 1e-5
# Share of a batch that repeats the rest of it, in the mean over so many logged steps.
REPEATED, OBSERVED = 0.1, 5
# A loss is a spike if it is above this multiple of the mean of the last 50, and this many standard
# deviations above it.
OBSERVATIONS, SPIKE_FACTOR, SPIKE_DEVIATIONS = 50, 2.0, 5.0
# Features with less variance on the unit sphere, in [0, 1], have collapsed. Towers with fresh
# weights give nearly equal features to all inputs, so the first steps do not count.
LEAST_SPREAD, SPREAD_FROM_STEP = 0.01, 200
# Share of clusters without a sample, and of prototypes that no sample was assigned to.
MOST_EMPTY, MOST_DEAD = 0.5, 0.75
QUIET_STEPS = 1000  # before a warning about the same metric is repeated


def repeated(captions: Sequence[bytes], samples: Int[Tensor, " n"]) -> float:
    """The share of samples whose caption comes again with another sample, in the batch of all
    ranks. Collective.

    >>> captions = [b"a cat", b"a dog", b"a cat", b"a cat"]
    >>> repeated(captions, torch.tensor([0, 1, 2, 2]))
    0.33333...
    """
    keys = b"".join(blake2b(caption, digest_size=8).digest() for caption in captions)
    hashes = torch.frombuffer(bytearray(keys), dtype=torch.int64)
    pairs = torch.stack([hashes.to(samples.device), samples], dim=1)
    different = torch.unique(all_gather(pairs), dim=0)
    return 1 - len(torch.unique(different[:, 0])) / len(different)


def at_chance(
    loss: float,
    lowest: float,
    *,
    pairs: int,
    positives: float,
    steps: int,
    overfits: bool = False,
) -> str | None:
    """Whether InfoNCE is that of a guess after so many steps at the full rate.

    Args:
        loss: Now; `lowest` is the least before.
        pairs: In a batch, so that a guess has the loss ln(pairs).
        positives: Other pairs that a pair matches on average: no loss can tell them apart.
        overfits: Whether this is a run of `--overfit`, which is not advised again.
    """
    chance, least = math.log(pairs), math.log1p(positives)
    if steps < PATIENCE or least > chance / 2 or loss < least + AT_CHANCE * (chance - least):
        return None
    said = f"train/loss/info_nce is {loss:.4g}, and ln({pairs}) = {chance:.4g} is that of a guess"
    if lowest < least + 0.9 * (chance - least):
        return f"{said}, though it was {lowest:.4g}; lower optim.learning_rate"
    trial = "" if overfits else ", and try --overfit 64"
    return (
        f"{said}, after {steps} steps at the full rate; check that captions belong to their images "
        f"(protoclip data inspect){trial}; then raise optim.learning_rate, or lower it"
    )


def unmoved(losses: Sequence[float], *, rate: float, steps: int) -> str | None:
    """Whether a rate does nothing: it cannot move weights, and InfoNCE is what it was at first.

    Args:
        losses: The first that were logged, in order.
        rate: The highest of the schedule.
        steps: At the full rate.
    """
    half = len(losses) // 2
    if steps < PATIENCE or rate * PATIENCE >= UNMOVED or half < OBSERVED:
        return None
    if abs(fmean(losses[:half]) - fmean(losses[-half:])) > pstdev(losses):
        return None
    return (
        f"train/loss/info_nce stays at {fmean(losses[-half:]):.4g}: optim.learning_rate = {rate:g} "
        "is too low to move any weight; raise it"
    )


def risen(loss: float, lowest: float, *, pairs: int) -> str | None:
    """Whether InfoNCE rose far above that of a guess."""
    chance = math.log(pairs)
    if loss < RISEN * max(chance, lowest):
        return None
    return (
        f"train/loss/info_nce rose to {loss:.4g}, far above ln({pairs}) = {chance:.4g}, that of a "
        "guess; lower optim.learning_rate, or raise optim.warm_up_steps"
    )


def repeats(shares: Sequence[float]) -> str | None:
    """Whether too many captions of each batch repeat, and are negatives of their equals."""
    if len(shares) < OBSERVED or fmean(shares) <= REPEATED:
        return None
    return (
        f"{fmean(shares):.0%} of the captions of a batch repeat others, and equal ones are "
        f"negatives of each other; give captions that say more of each image"
    )


@dataclass(kw_only=True)
class Symptoms:
    """Sees what is logged, and says each thing once. It has no state worth saving.

    Attributes:
        pairs: In a batch, of all ranks.
        warm_up: Steps until the full rate.
        rate: That full rate.
        overfits: Whether this is a run of `--overfit`.
    """

    pairs: int
    warm_up: int
    rate: float
    overfits: bool = False
    lowest: float = math.inf
    losses: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, config: Config, samples: Pairs | SampleStream, pairs: int) -> "Symptoms":
        """Those of a run on these samples."""
        return cls(
            pairs=pairs,
            warm_up=steps_to_peak(config),
            rate=config.optim.learning_rate,
            overfits=config.run.overfit is not None,
        )

    def lines(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What the metrics of a step say that was not said before."""
        lines: dict[str, str | None] = {}
        # Few pairs may repeat and be learned by heart: the verdict of `overfit` says.
        share = metrics.get("train/repeated/captions")
        if share is not None and not self.overfits:
            self.shares = [*self.shares[1 - OBSERVED :], share]
            lines["captions"] = repeats(self.shares)
        loss = metrics.get("train/loss/info_nce", math.nan)
        if math.isfinite(loss):
            steps = step - self.warm_up
            self.losses += [loss] if len(self.losses) < PATIENCE else []
            lines["risen"] = risen(loss, self.lowest, pairs=self.pairs)
            lines["unmoved"] = unmoved(self.losses, rate=self.rate, steps=steps)
            lines["chance"] = (
                None
                if lines["unmoved"]
                else at_chance(
                    loss,
                    self.lowest,
                    pairs=self.pairs,
                    positives=metrics.get("train/positives", 0.0),
                    steps=steps,
                    overfits=self.overfits,
                )
            )
            self.lowest = min(self.lowest, loss)
        new = {name: line for name, line in lines.items() if line and name not in self.said}
        self.said |= new.keys()
        return [f"step {step}: {line}" for line in new.values()]


class Watch:
    """Finds metrics that end in a bad model though every number is finite; see the constants.

    It sees what is logged, and has no state worth saving.
    """

    def __init__(self) -> None:
        self._warned: dict[str, int] = {}
        self._losses: dict[frozenset[str], deque[float]] = {}

    def warnings(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """One line for each metric that looks bad, at most one in 1,000 steps."""
        warnings = {
            name: f"{name} is {value:.2g}{advice}"
            for name, value in metrics.items()
            for prefix, (is_bad, advice) in BAD.items()
            if name.startswith(prefix) and is_bad(step, value)
        }
        if spike := self._spike(metrics):
            warnings["train/loss/total"] = spike
        new = [n for n in warnings if step >= self._warned.get(n, -QUIET_STEPS) + QUIET_STEPS]
        self._warned |= dict.fromkeys(new, step)
        return [f"step {step}: {warnings[name]}" for name in new]

    def _spike(self, metrics: Mapping[str, float]) -> str | None:
        value = metrics.get("train/loss/total")
        if value is None or not math.isfinite(value):
            return None
        # Each set of losses has its own mean, since a stage with one more loss has no spike.
        terms = frozenset(name for name in metrics if name.startswith("train/loss/"))
        recent = self._losses.setdefault(terms, deque(maxlen=OBSERVATIONS))
        mean, deviation = (fmean(recent), pstdev(recent)) if recent else (0.0, 0.0)
        enough = len(recent) == OBSERVATIONS
        recent.append(value)
        limit = max(SPIKE_FACTOR * mean, mean + SPIKE_DEVIATIONS * deviation)
        if not enough or value <= limit:
            return None
        return (
            f"train/loss/total is {value:.4g}, its recent mean is {mean:.4g}; if it does not come "
            "down, lower optim.learning_rate or optim.clip_norm, or raise optim.warm_up_steps"
        )


# What makes a metric bad, by the start of its name, and what to do then.
BAD: Mapping[str, tuple[Callable[[int, float], bool], str]] = {
    "train/spread/": (
        lambda step, value: value < LEAST_SPREAD and step >= SPREAD_FROM_STEP,
        f", below {LEAST_SPREAD}: features are nearly equal for all inputs (collapse); lower "
        "optim.learning_rate, raise optim.warm_up_steps, and check that the captions differ",
    ),
    "train/prototypes/empty/": (
        lambda step, value: value > MOST_EMPTY,
        ": most clusters have no sample; lower the number of prototypes (prototypes.number, or the "
        "teacher's number) or raise episodes.size",
    ),
    "train/prototypes/dead/": (
        lambda step, value: value > MOST_DEAD,
        ": no sample of the episode was nearest to most prototypes, which then teach nothing; "
        "lower optim.heads_lr_scale or the number of prototypes, or set prototypes.source to "
        "extract",
    ),
}
