"""What a run makes of its machines: pairs a second, waiting, memory, the share of a card's peak.

No step waits for a device because of this.
"""

import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from protoclip.config import Config
from protoclip.distributed import collectives, parallel
from protoclip.distributed.collectives import rank, world_size
from protoclip.distributed.waits import WAITS
from protoclip.models.loading import context_length
from protoclip.models.protoclip import PROJECTIONS, Precision, ProtoCLIP, image_size
from protoclip.models.start import Start
from protoclip.progress import duration, three_digits
from protoclip.terminal import say
from protoclip.training.run_folder import environment

# FLOP/s of 16-bit matrix products that are summed in 32 bits, without sparsity, by NVIDIA, and the
# names by which torch knows these cards. Other cards of a like name have other peaks.
PEAK = {"A100": 312e12, "H100": 989e12, "RTX-4090": 165e12, "RTX-2080-Ti": 54e12}
CARDS = {
    r"NVIDIA A100.*": "A100",
    r"NVIDIA (H100 80GB HBM3|H200)": "H100",  # the H200 has more memory, and computes as fast
    r"NVIDIA GeForce RTX 4090": "RTX-4090",
    r"NVIDIA GeForce RTX 2080 Ti": "RTX-2080-Ti",
}
FIRST_STEPS = 20  # whose time says how long the rest takes


@dataclass(frozen=True)
class Machines:
    """Where a run trains: the numbers of hosts, if known, and ranks, and the devices in words."""

    hosts: int | None
    ranks: int
    devices: str

    def __str__(self) -> str:
        ranks = f"{in_words(self.ranks)} on {self.devices}"
        return f"{self.hosts} host{'s' * (self.hosts > 1)}, {ranks}" if self.hosts else ranks

    def placed(self, batch: int) -> str:
        """Where a run trains with so many pairs of a batch on each rank, in words."""
        several = self.ranks > 1
        said = f"{self}, {'each ' * several}with {batch} pairs of every batch"
        if several:
            said += "; learning rate, batch and episode are for all ranks together"
        return said


def in_words(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"


def machines(device: torch.device) -> Machines:
    """Where the ranks of this run are. Collective."""
    hosts = len(set(collectives.all_gather_object(socket.gethostname())))
    names = Counter(collectives.all_gather_object(environment(device)["device"]))
    kinds = device.type == "cuda" or len(names) > 1
    devices = ", ".join(f"{number} x {name}" if kinds else name for name, number in names.items())
    return Machines(hosts, world_size(), devices)


def machines_since(state: Mapping[str, Any], now: Machines, *, over: bool) -> list[Machines]:
    """The machines of a run one after the other: those that a checkpoint has saved, and those of
    now, unless they are the same, or training is over."""
    saved = [Machines(**each) for each in state.get("machines", [])]
    if not saved:  # an earlier version saved how many ranks there were, and no more
        saved = [Machines(None, len(state["loader"]), "machines not known")]
    return saved if over or saved[-1] == now else [*saved, now]


def facts_of(of_run: Sequence[Machines]) -> dict[str, Any]:
    """What `results.json` says of a run's machines: the last ones, and all in words."""
    last = of_run[-1]
    return {"hosts": last.hosts, "ranks": last.ranks, "machines": [str(each) for each in of_run]}


def other_ranks(before: int, model: ProtoCLIP, config: Config) -> list[str]:
    """A note for a run that goes on with another number of ranks than before, if it does."""
    if before == world_size():
        return []
    said = f"going on with {in_words(world_size())} ({before} before): batches stay, "
    if not counts_by_rank(model, config):
        return [f"{said}and weights are equal up to rounding; dropout, if any, draws anew"]
    return [
        f"{said}but BatchNorm in the towers takes its statistics over other parts of a batch, so "
        "weights may differ by more than rounding (docs/scaling.md)"
    ]


def counts_by_rank(model: ProtoCLIP, config: Config) -> bool:
    """Whether a BatchNorm of the towers trains with statistics over less than a whole batch."""
    settings = config.parallel
    synchronised = settings.sync_batch_norm or settings.strategy == "fsdp"
    if synchronised and config.episodes.micro_batch_size is None:
        return False  # see `loading.parallelise`
    if config.model.frozen_batch_norm:
        return False  # see `optim.enter_stage`
    return any(
        isinstance(layer, _BatchNorm)
        for name, layer in model.towers.named_modules()
        if ("image" if name.startswith("visual.") else "text") not in config.model.locked
    )


def peak(device_name: str, precision: Precision) -> float | None:
    """FLOP/s that a card can reach in this precision; None if that is not known."""
    known = (PEAK[card] for name, card in CARDS.items() if re.fullmatch(name, device_name))
    return next(known, None) if precision in ("bf16", "fp16") else None


def passes(parameters: Iterable[nn.Parameter]) -> float:
    """How many forward passes a training step of a tower is worth in FLOPs.

    The pass itself; as much for the gradients of activations if anything trains; and for those of
    weights as large a part as the weights that train are of all.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    trained = sum(size for size, trains in sizes if trains)
    return 1 + (trained > 0) + trained / max(1, sum(size for size, _ in sizes))


def memory(device: torch.device) -> float:
    """The most memory that this process has had on its device, in bytes; 0 if not known."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu" or sys.platform == "win32":
        return 0.0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else 1024 * most)


@dataclass(frozen=True, kw_only=True)
class Forward:
    """FLOPs of one forward pass of one sample, and the parameters of both towers."""

    image: float
    text: float
    heads: float  # both
    parameters: int


def forward_flops(start: Start) -> Forward:
    """Count the FLOPs of a start's towers at its sizes, on the meta device: without weights and
    without a batch. Matrix products and convolutions count."""
    model = start.build(on_meta=True)
    pair: Any = model.towers
    size = image_size(pair)
    length = pair.context_length if hasattr(pair, "context_length") else context_length(start)
    if start.model.name is None and start.model.start is None:
        size, length = start.sizes.values()
    samples = 2  # BatchNorm needs more than one

    def counted(part: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, float]:
        with FlopCounterMode(display=False) as counter:
            return part(inputs), counter.get_total_flops() / samples

    # Text towers of transformers skip what needs values only if their tensors are fake, which makes
    # each operation ten times as slow.
    of_transformers = any(part.__module__.startswith("transformers") for part in pair.modules())
    fake = FakeTensorMode(allow_non_fake_inputs=True) if of_transformers else nullcontext()
    with torch.device("meta"), fake:
        features, image = counted(model.encode_image, torch.empty(samples, 3, size, size))
        tokens = torch.ones(samples, length, dtype=torch.long)
        _, text = counted(model.encode_text, tokens)
        _, head = counted(model.image_head, features)
    parameters = sum(p.numel() for p in pair.parameters())
    return Forward(image=image, text=text, heads=2 * head, parameters=parameters)


@dataclass(kw_only=True)
class Throughput:
    """What a rank measures from one report to the next.

    Attributes:
        peak: FLOP/s of this rank's card, if it is known.
        forward: Counts the FLOPs of a pair, where both towers run in a step; asked once, on rank 0,
            if there is a peak.
        captions: Texts of an image.
        waited: Seconds of waiting for data since the last report.
    """

    peak: float | None = None
    forward: Callable[[], Forward] | None = None
    captions: int = 1
    waited: float = 0.0
    _flops: float = 0.0  # of a pair, in the stage under way
    _last: tuple[float, int] = (0.0, 0)  # time, and samples seen
    _steps: int = 0
    _counted: list[Forward] = field(default_factory=list)

    def start(self, model: ProtoCLIP, seen: int) -> None:
        """Measure from here on, with what trains in this model now."""
        if self.peak is not None and self.forward is not None and rank() == 0:
            self._flops = self._pair(model, self.forward)
        WAITS.take()
        self._last, self._steps, self.waited = (time.monotonic(), seen), 0, 0.0

    def _pair(self, model: ProtoCLIP, forward: Callable[[], Forward]) -> float:
        """FLOPs of a pair in training; 0 if they cannot be counted."""
        if not self._counted:
            try:
                self._counted.append(forward())
            except Exception as error:  # a tower that does what the meta device cannot
                say(f"note: train/mfu is left out, since FLOPs cannot be counted ({error})")
                self.forward = None
                return 0.0
        counted, named = self._counted[0], [*model.towers.named_parameters()]
        # A projection that trains behind a locked tower asks that tower for no gradients.
        inside = [(name, p) for name, p in named if not name.startswith(PROJECTIONS)]
        image, text = (
            passes(p for name, p in inside if name.startswith("visual.") == of_image)
            for of_image in (True, False)
        )
        return counted.image * image + self.captions * counted.text * text

    def step(self) -> None:
        self._steps += 1

    def shares(self, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Shares of the time since the last report, on this rank. Call it when the device has
        come as far as the host."""
        spent = max(time.monotonic() - self._last[0], 1e-9)
        shares = {"data": self.waited / spent}
        # FSDP gathers and averages by itself, and does not say how long that takes.
        if world_size() > 1 and not parallel.is_sharded(module):
            waited = WAITS.take() + self._steps * parallel.unhidden_seconds(module)
            shares["collectives"] = waited / spent
        self.waited = 0.0
        return {
            f"train/share/{part}": torch.tensor(min(1.0, share), device=device)
            for part, share in shares.items()
        }

    def report(self, seen: int, device: torch.device) -> dict[str, float]:
        """Pairs a second since the last report, memory, and the share of the peak. Collective."""
        (before, had), now = self._last, time.monotonic()
        rate = (seen - had) / (now - before)
        self._last, self._steps = (now, seen), 0
        metrics = {"train/samples_per_second": rate}
        most = collectives.all_reduce(torch.tensor(memory(device) / 1e9, device=device), "max")
        if most > 0:
            metrics["train/memory_gb"] = float(most)
        if self.peak is not None and self._flops:
            metrics["train/mfu"] = rate * self._flops / (world_size() * self.peak)
        return metrics


def measures(
    start: Start | None, device: torch.device, precision: Precision, captions: int
) -> Throughput:
    """The measurements of a run with these towers; None where it trains no towers."""
    return Throughput(
        peak=peak(environment(device)["device"], precision),
        forward=None if start is None else partial(forward_flops, start),
        captions=captions,
    )


class FirstSteps:
    """Says once, after the first steps of a process, how long the steps that remain will take.

    The first step is not counted: it makes what later ones find.
    """

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.first = steps, done
        self._since = 0.0

    def update(self, done: int, batch: int, seconds: float) -> None:
        """Tell of each step: how many are done, with so many pairs in each, and the seconds that
        steps have taken, with the waits for their batches and nothing else."""
        if done - self.first == 1:
            self._since = seconds
        if done - self.first == FIRST_STEPS and done < self.steps:
            each = (seconds - self._since) / (FIRST_STEPS - 1)
            left = self.steps - done
            say(
                f"note: {three_digits(batch / each)} pairs a second: the {left:,} steps that "
                f"remain take about {duration(each * left)}, and grouping, evaluation and saving "
                "come on top"
            )
