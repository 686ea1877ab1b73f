"""Why a loss does not fall: what a run's own numbers say of it, each once a run, with the way out.

`guard.Watch` warns of single metrics that are bad by themselves.
"""

import math
from collections.abc import Mapping, Sequence
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
    masked: bool,
    steps: int,
    overfits: bool = False,
) -> str | None:
    """Whether InfoNCE is that of a guess after so many steps at the full rate.

    Args:
        loss: Now; `lowest` is the least before.
        pairs: In a batch, so that a guess has the loss ln(pairs).
        positives: Other pairs that a pair matches on average: no loss can tell them apart, or they
            are `masked`.
        overfits: Whether this is a run of `--overfit`, which is not advised again.
    """
    number = max(1, round(pairs - positives)) if masked else pairs
    chance, least = math.log(number), 0.0 if masked else math.log1p(positives)
    if steps < PATIENCE or least > chance / 2 or loss < least + AT_CHANCE * (chance - least):
        return None
    said = f"train/loss/info_nce is {loss:.4g}, and ln({number}) = {chance:.4g} is that of a guess"
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


def repeats(shares: Sequence[float], *, separable: bool = True) -> str | None:
    """Whether too many captions of each batch repeat, and are negatives of their equals.

    Args:
        separable: Whether equal captions could be kept apart, and are not.
    """
    if len(shares) < OBSERVED or fmean(shares) <= REPEATED:
        return None
    apart = ", or, if more captions differ than a batch holds, episodes.apart = true"
    return (
        f"{fmean(shares):.0%} of the captions of a batch repeat others, and equal ones are "
        f"negatives of each other; set loss.positives = masked{apart * separable}"
    )


@dataclass(kw_only=True)
class Symptoms:
    """Sees what is logged, and says each thing once. It has no state worth saving.

    Attributes:
        pairs: In a batch, of all ranks.
        warm_up: Steps until the full rate.
        rate: That full rate.
        masked: Whether InfoNCE leaves out the pairs that match.
        separable: Whether equal captions could be kept apart, and are not.
        overfits: Whether this is a run of `--overfit`.
    """

    pairs: int
    warm_up: int
    rate: float
    masked: bool = False
    separable: bool = True
    overfits: bool = False
    lowest: float = math.inf
    losses: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, config: Config, samples: Pairs | SampleStream, pairs: int) -> "Symptoms":
        """Those of a run on these samples."""
        episodes = config.episodes
        return cls(
            pairs=pairs,
            warm_up=steps_to_peak(config),
            rate=config.optim.learning_rate,
            masked=config.loss.positives == "masked",
            separable=isinstance(samples, Pairs)
            and not episodes.apart
            and episodes.size > episodes.batch_size,
            overfits=config.run.overfit is not None,
        )

    def lines(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What the metrics of a step say that was not said before."""
        lines: dict[str, str | None] = {}
        # Few pairs may repeat and be learned by heart: the verdict of `overfit` says.
        share = metrics.get("train/repeated/captions")
        if share is not None and not self.overfits:
            self.shares = [*self.shares[1 - OBSERVED :], share]
            lines["captions"] = repeats(self.shares, separable=self.separable)
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
                    masked=self.masked,
                    steps=steps,
                    overfits=self.overfits,
                )
            )
            self.lowest = min(self.lowest, loss)
        new = {name: line for name, line in lines.items() if line and name not in self.said}
        self.said |= new.keys()
        return [f"step {step}: {line}" for line in new.values()]
