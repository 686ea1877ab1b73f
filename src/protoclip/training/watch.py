"""What watches a run: its machines and speed, its numbers, and steps that are not finite.

No step waits for a device because of this.
"""

import math
import platform
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import protoclip
from protoclip.distributed import parallel
from protoclip.distributed.collectives import (
    WAITS,
    all_gather,
    all_gather_object,
    all_reduce,
    raise_on_all_ranks,
    rank,
    world_size,
)
from protoclip.files import to_json, write_atomically
from protoclip.models.protoclip import PROJECTIONS, Precision, ProtoCLIP, image_shape
from protoclip.models.start import Start
from protoclip.terminal import counted, say

# FLOP/s of 16-bit matrix products that are summed in 32 bits, without sparsity, by NVIDIA, and the
# names by which torch knows these cards. Other cards of a like name have other peaks.
PEAK = {"A100": 312e12, "H100": 989e12, "RTX-4090": 165e12, "RTX-2080-Ti": 54e12}
CARDS = {
    r"NVIDIA A100.*": "A100",
    r"NVIDIA (H100 80GB HBM3|H200)": "H100",  # the H200 has more memory, and computes as fast
    r"NVIDIA GeForce RTX 4090": "RTX-4090",
    r"NVIDIA GeForce RTX 2080 Ti": "RTX-2080-Ti",
}
# Steps at the full rate before a loss at chance is worth a word; towers from scratch take dozens.
PATIENCE = 300
AT_CHANCE = 0.97  # of the way from the least possible loss to that of a guess
RISEN = 1.5  # times the loss of a guess: only a model that is sure of what is wrong gets there
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
# Steps in a row that are not finite before the run is given up. Under fp16 each of them halves the
# loss scale, which is then at a thousandth.
MOST_SKIPPED = 10


# Machines and speed


def describe_environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, without which a number means little."""
    cpu = f"{platform.machine()} CPU, {counted(torch.get_num_threads(), 'thread')}"
    return {
        "protoclip": protoclip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
    }


@dataclass(frozen=True)
class Machines:
    """Where a run trains: the numbers of hosts and ranks, and the devices in words."""

    hosts: int
    ranks: int
    devices: str

    def __str__(self) -> str:
        return f"{counted(self.hosts, 'host')}, {counted(self.ranks, 'rank')} on {self.devices}"

    def describe(self, batch: int) -> str:
        """In words, with the number of pairs of a batch that each rank has."""
        shared = "; learning rate, batch and episode are for all ranks together"
        several, on_each = self.ranks > 1, " each" * (self.ranks > 1)
        return f"{self},{on_each} with {batch} pairs of every batch{shared * several}"


def gather_machines(device: torch.device) -> Machines:
    """Where the ranks of this run are. Collective."""
    hosts = len(set(all_gather_object(socket.gethostname())))
    names = Counter(all_gather_object(describe_environment(device)["device"]))
    kinds = device.type == "cuda" or len(names) > 1
    devices = ", ".join(f"{number} x {name}" if kinds else name for name, number in names.items())
    return Machines(hosts, world_size(), devices)


def find_peak(device_name: str, precision: Precision) -> float | None:
    """FLOP/s that a card can reach in this precision; None if that is not known."""
    peaks = (PEAK[card] for name, card in CARDS.items() if re.fullmatch(name, device_name))
    return next(peaks, None) if precision in ("bf16", "fp16") else None


def count_passes(parameters: Iterable[nn.Parameter]) -> float:
    """Forward passes that a training step of a tower is worth in FLOPs: one, one for the gradients
    of activations if anything trains, and for those of weights the share that trains."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    trained = sum(size for size, trains in sizes if trains)
    return 1 + (trained > 0) + trained / max(1, sum(size for size, _ in sizes))


def measure_memory(device: torch.device) -> float:
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


def count_forward_flops(start: Start) -> Forward:
    """Count the FLOPs of a start's towers at its sizes, on the meta device."""
    model = start.build(on_meta=True)
    pair: Any = model.towers
    length = start.sizes["context_length"]
    if length is None:  # what the towers say needs no tokenizer
        length = getattr(pair, "context_length", None) or start.context_length
    samples = 2  # BatchNorm needs more than one

    def count(part: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, float]:
        with FlopCounterMode(display=False) as counter:
            return part(inputs), counter.get_total_flops() / samples

    # Text towers of transformers skip what needs values only if their tensors are fake, which makes
    # each operation ten times as slow.
    needs_fake = any(part.__module__.startswith("transformers") for part in pair.modules())
    fake = FakeTensorMode(allow_non_fake_inputs=True) if needs_fake else nullcontext()
    with torch.device("meta"), fake:
        features, image = count(model.encode_image, torch.empty(samples, *image_shape(pair)))
        _, text = count(model.encode_text, torch.ones(samples, length, dtype=torch.long))
        _, head = count(model.image_head, features)
    parameters = sum(p.numel() for p in pair.parameters())
    return Forward(image=image, text=text, heads=2 * head, parameters=parameters)


@dataclass(kw_only=True)
class Throughput:
    """What a rank measures from one report to the next."""

    peak: float | None = None  # FLOP/s of this rank's card, if it is known
    forward: Forward | None = None  # FLOPs of a pair, if known, where both towers run in a step
    captions: int = 1  # of an image
    seconds: float = 0.0  # of the run, without evaluation
    waited: float = 0.0  # seconds for data, in the episode under way
    trained: float = 0.0  # seconds in its steps
    _now: float = 0.0  # the time until which `seconds` counts
    _flops: float = 0.0  # of a pair, in the stage under way
    _last: tuple[float, int, float] = (0.0, 0, 0.0)  # time, samples seen, and waited, at a report
    steps: int = 0  # since then

    def pause(self) -> None:
        """Leave out of `seconds` what came since the last call of `tick`."""
        self._now = time.monotonic()

    def tick(self) -> float:
        """Count the seconds since the last call in `seconds`, and return them."""
        before, self._now = self._now, time.monotonic()
        self.seconds += self._now - before
        return self._now - before

    def start(self, model: ProtoCLIP, seen: int) -> None:
        """Measure an episode from here on, with what trains in this model now."""
        if self.forward is not None:
            # A projection that trains behind a locked tower asks that tower for no gradients.
            named = model.towers.named_parameters()
            inside = [(name, p) for name, p in named if not name.startswith(PROJECTIONS)]
            image, text = (
                count_passes(p for name, p in inside if name.startswith("visual.") == of_image)
                for of_image in (True, False)
            )
            self._flops = self.forward.image * image + self.captions * self.forward.text * text
        WAITS.take_seconds()
        self.tick()
        self.waited = self.trained = 0.0
        self._last, self.steps = (self._now, seen, 0.0), 0

    def measure_shares(self, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Shares of the time since the last report, on this rank. Call it when the device has
        come as far as the host."""
        spent = max(time.monotonic() - self._last[0], 1e-9)
        shares = {"data": (self.waited - self._last[2]) / spent}
        # FSDP gathers and averages by itself, and does not say how long that takes.
        if world_size() > 1 and not parallel.is_sharded(module):
            waited = WAITS.take_seconds() + self.steps * parallel.measure_unhidden(module)
            shares["collectives"] = waited / spent
        return {
            f"train/share/{part}": torch.tensor(min(1.0, share), device=device)
            for part, share in shares.items()
        }

    def report(self, seen: int, device: torch.device) -> dict[str, float]:
        """Pairs a second since the last report, memory, and the share of the peak. Collective."""
        (before, had, _), now = self._last, time.monotonic()
        rate = (seen - had) / (now - before)
        self._last, self.steps = (now, seen, self.waited), 0
        metrics = {"train/samples_per_second": rate}
        most = all_reduce(torch.tensor(measure_memory(device) / 1e9, device=device), "max")
        if most > 0:
            metrics["train/memory_gb"] = float(most)
        if self.peak is not None and self._flops:
            metrics["train/mfu"] = rate * self._flops / (world_size() * self.peak)
        return metrics


def make_throughput(
    start: Start | None, device: torch.device, precision: Precision, captions: int
) -> Throughput:
    """The measurements of a run with these towers; `start` is None where it trains none."""
    peak, forward = find_peak(describe_environment(device)["device"], precision), None
    if start is not None and peak is not None and rank() == 0:
        try:
            forward = count_forward_flops(start)
        except Exception as error:  # a tower that does what the meta device cannot
            say(f"note: train/mfu is left out, since FLOPs cannot be counted ({error})")
    return Throughput(peak=peak, forward=forward, captions=captions)


# Numbers


def measure_repeats(captions: Sequence[bytes], samples: Int[Tensor, " n"]) -> float:
    """The share of samples whose caption comes again with another sample, in the batch of all
    ranks. Collective.

    >>> captions = [b"a cat", b"a dog", b"a cat", b"a cat"]
    >>> measure_repeats(captions, torch.tensor([0, 1, 2, 2]))
    0.33333...
    """
    keys = b"".join(blake2b(caption, digest_size=8).digest() for caption in captions)
    hashes = torch.frombuffer(bytearray(keys), dtype=torch.int64)
    pairs = torch.stack([hashes.to(samples.device), samples], dim=1)
    different = torch.unique(all_gather(pairs), dim=0)
    return 1 - len(torch.unique(different[:, 0])) / len(different)


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


class Watch:
    """Finds what ends in a bad model though every number is finite, and says each thing once.

    A batch has `pairs`, so a guess has an InfoNCE of ln(pairs); `warm_up` steps lead to the full
    rate. A run that `overfits` is not advised to, and its few pairs may repeat.
    """

    def __init__(self, *, pairs: int, warm_up: int, overfits: bool = False) -> None:
        self.chance, self.warm_up, self.overfits = math.log(pairs), warm_up, overfits
        self._lowest = math.inf  # InfoNCE so far
        self._shares: deque[float] = deque(maxlen=OBSERVED)  # of captions that repeat
        self._losses: dict[frozenset[str], deque[float]] = {}
        self._told = set[str]()

    def list_warnings(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What the metrics of a step say that was not said before, a line each."""
        warnings: dict[str, str | None] = {
            name: f"{name} is {value:.2g}{advice}"
            for name, value in metrics.items()
            for prefix, (is_bad, advice) in BAD.items()
            if name.startswith(prefix) and is_bad(step, value)
        }
        warnings["spike"] = self._find_spike(metrics)
        warnings["repeats"] = self._find_repeats(metrics)
        loss, positives = metrics.get("train/loss/info_nce"), metrics.get("train/positives", 0.0)
        if loss is not None and math.isfinite(loss):
            warnings["chance"] = self._find_chance(loss, positives, step - self.warm_up)
            self._lowest = min(self._lowest, loss)
        new = {name: line for name, line in warnings.items() if line and name not in self._told}
        self._told |= new.keys()
        return [f"step {step}: {line}" for line in new.values()]

    def _find_spike(self, metrics: Mapping[str, float]) -> str | None:
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

    def _find_repeats(self, metrics: Mapping[str, float]) -> str | None:
        """Whether too many captions of each batch repeat, and are negatives of their equals."""
        if self.overfits or "train/repeated/captions" not in metrics:
            return None
        self._shares.append(metrics["train/repeated/captions"])
        mean = fmean(self._shares)
        if len(self._shares) < OBSERVED or mean <= REPEATED:
            return None
        return (
            f"{mean:.0%} of the captions of a batch repeat others, and equal ones are negatives of "
            "each other; give captions that say more of each image"
        )

    def _find_chance(self, loss: float, positives: float, steps: int) -> str | None:
        """Whether InfoNCE rose far above that of a guess, or is there after many steps at the full
        rate. No loss can tell the other pairs apart that a pair matches, on average `positives`."""
        chance, least, lowest = self.chance, math.log1p(positives), self._lowest
        text = f"train/loss/info_nce is {loss:.4g}, and {chance:.4g} is that of a guess"
        way_out = "lower optim.learning_rate, or raise optim.warm_up_steps"
        if loss >= RISEN * max(chance, lowest):
            return f"{text}, though it was {lowest:.4g}; {way_out}"
        if steps < PATIENCE or least > chance / 2 or loss < least + AT_CHANCE * (chance - least):
            return None
        if lowest < least + 0.9 * (chance - least):
            return f"{text}, though it was {lowest:.4g}; {way_out}"
        trial = "" if self.overfits else ", and try --overfit 64"
        return (
            f"{text}, after {steps} steps at the full rate; check that captions belong to their "
            f"images (protoclip data inspect){trial}; then raise optim.learning_rate, or lower it"
        )


# Steps that are not finite, and memory that runs out


class NonFiniteGuard:
    """Takes optimizer steps, skips those that are not finite, and ends a run that diverged.

    A skipped step counts in the schedule and lowers the loss scale of fp16. The device decides
    about each step; the host counts them in `count_skipped`, on a GPU when metrics are fetched.

    A step without a gradient, where no teacher and no prototype knows a sample of the batch, is
    skipped too, or weights would decay. It is counted apart, and lowers no loss scale.

    Args:
        optimizer: A fused one, which changes nothing where its `found_inf` is 1.
        scaler: The loss scaler; for fp16 it skips steps by itself.
        report: File that gets the losses and the samples of the last batch of a diverged run.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, report: Path
    ) -> None:
        self.optimizer, self.scaler, self.report = optimizer, scaler, report
        self.skipped = self.in_a_row = self.without_gradient = 0
        self._pending: list[tuple[int, Tensor, Sequence[str]]] = []
        self._row: list[tuple[float, float]] = []

    def step(
        self, number: int, loss: Tensor, norm: Tensor, sample_ids: Sequence[str]
    ) -> Bool[Tensor, ""]:
        """Take step `number`, unless the loss of any rank or the norm is not finite, or there is
        no gradient; raises as `count_skipped`.

        Returns:
            Whether the step was taken, the same on every rank.
        """
        loss = all_reduce(loss.detach())
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        taken = finite & (norm != 0)
        self._skip(~taken)
        self.scaler.step(self.optimizer)
        self._skip(~finite)  # which alone lowers the loss scale
        self.scaler.update()
        self._pending.append((number, torch.stack([loss, norm.detach()]), sample_ids))
        if loss.device.type == "cpu":
            self.count_skipped()
        return taken

    def _skip(self, skipped: Bool[Tensor, ""]) -> None:
        """Tell the optimizer, or in fp16 the scaler, whether to skip this step."""
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            return
        # The scaler has looked at this rank's gradients, which with FSDP are a part of all.
        for found_inf in self.scaler._found_inf_per_device(self.optimizer).values():
            found_inf.copy_(skipped)

    def count_skipped(self) -> None:
        """Count the steps that were skipped since the last call; raises after ten in a row."""
        pending, self._pending = self._pending, []
        values = torch.stack([pair for _, pair, _ in pending]).tolist() if pending else []
        for (number, _, sample_ids), (loss, norm) in zip(pending, values, strict=True):
            if math.isfinite(loss) and norm == 0:
                self.without_gradient += 1
                continue
            if math.isfinite(loss) and math.isfinite(norm):
                self.in_a_row = 0
                self._row.clear()
                continue
            self.skipped += 1
            self.in_a_row += 1
            self._row.append((loss, norm))
            if self.in_a_row >= MOST_SKIPPED:
                # All ranks are here, since they count the same; the first one says it.
                raise_on_all_ranks(partial(self._give_up, number, sample_ids))

    def _give_up(self, number: int, sample_ids: Sequence[str]) -> None:
        losses, norms = zip(*self._row, strict=True)
        content = {
            "step": number,
            # As text, since JSON has no NaN or infinity.
            "losses": [*map(str, losses)],
            "gradient_norms": [*map(str, norms)],
            "sample_ids": sample_ids,
        }
        samples = f"the samples of the last batch are in {self.report}"
        try:
            write_atomically(self.report, to_json(content, indent=2) + "\n")
        except OSError as error:
            samples = f"the samples of the last batch could not be written: {error}"
        raise ValueError(
            f"training has diverged: loss or gradient not finite in {self.in_a_row} steps "
            f"in a row, up to step {number}; go on with --run.precision fp32 --resume auto, "
            f"unless it ran in fp32, or start again with a lower optim.learning_rate ({samples})"
        )

    def summarize(self, steps: int, last: Path | None) -> str:
        """How many of all steps were skipped, and why; empty if none was.

        Raises `ValueError` if the run is finished, with this `last` checkpoint, and half of its
        steps were skipped, in fp16 beyond those that its loss scale may need to settle.
        """
        what = f"of {steps:,} steps"
        lines = []
        if self.skipped:
            problem = "were skipped: their loss or gradient was not finite"
            lines.append(f"{self.skipped:,} {what} {problem}")
        # In fp16 the loss scale starts at 2^16, and the steps that halve it are skipped.
        settling = 16 if self.scaler.is_enabled() else 0
        if last is not None and self.skipped > settling and 2 * self.skipped >= steps:
            raise ValueError(
                f"{lines[0]}; change optim.learning_rate, optim.heads_lr_scale, the weights of "
                f"[loss] or prototypes.target_temperature (the last checkpoint is {last})"
            )
        if self.without_gradient:
            why = "as where no teacher knows a sample of the batch"
            lines.append(
                f"{self.without_gradient:,} {what} had no gradient and changed nothing, {why}"
            )
        return "; ".join(lines)

    def state_dict(self) -> dict[str, Any]:
        row = [[str(value) for value in step] for step in self._row]  # JSON has no NaN
        counts = {"skipped": self.skipped, "without_gradient": self.without_gradient}
        return {**counts, "in_a_row": self.in_a_row, "row": row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])
        self.without_gradient = int(state.get("without_gradient", 0))  # 1.0.0 had none
        self._row = [(float(loss), float(norm)) for loss, norm in state.get("row", [])]


def describe_out_of_memory(error: BaseException, way_out: str | None = None) -> str | None:
    """One line that names the settings to lower (or `way_out`), if memory ran out."""
    text = str(error)
    # What PyTorch's allocator says, the system when a file is mapped into memory, and oneDNN.
    on_host = (
        "DefaultCPUAllocator: can't allocate memory",
        "Cannot allocate memory",
        "could not create a primitive",
    )
    on_device = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    if isinstance(error, MemoryError) or any(words in text for words in on_host):
        device, others, sizes = "", "lower data.cache_gb or data.workers", "episodes.size"
    elif isinstance(error, RuntimeError) and any(words in text for words in on_device):
        device, others, sizes = " on the device", "set run.precision = bf16", "prototypes.number"
    else:
        return None
    if way_out is not None:
        return f"out of memory{device}: {way_out}"
    return (
        f"out of memory{device}: set episodes.micro_batch_size (or lower it; gradients stay those "
        f"of the whole batch) or {others}, and go on with --resume auto; or start again with a "
        f"lower episodes.batch_size or {sizes}"
    )
