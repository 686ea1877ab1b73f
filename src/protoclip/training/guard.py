"""Steps that are not finite are skipped, and a run that has diverged ends; what to do where memory
runs out.

`symptoms.py` warns of what ends in a bad model though every number is finite.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from protoclip.distributed.collectives import all_reduce, raise_on_all_ranks
from protoclip.files import to_json, write_atomically

# Steps in a row that are not finite before the run is given up. Under fp16 each of them halves the
# loss scale, which is then at a thousandth.
MOST_SKIPPED = 10


class NonFiniteGuard:
    """Takes optimizer steps, skips those that are not finite, and ends a run that diverged.

    A step that is skipped counts in the schedule, and leaves nothing else behind but a lower loss
    scale in fp16. The device decides about each step, so that the host need not wait for it. The
    host counts the skipped steps in `look`: on a CPU at once, on a GPU when metrics are fetched.

    A step without a gradient is skipped too, or weights would decay and follow their momentum: no
    teacher and no prototype may know a sample of the batch. It is no fault: it is counted apart,
    lowers no loss scale, and neither ends nor adds to a row of steps that are not finite.

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
        no gradient; see `look`.

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
            self.look()
        return taken

    def _skip(self, skipped: Bool[Tensor, ""]) -> None:
        """Tell the optimizer, or in fp16 the scaler, whether to skip this step."""
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            return
        # The scaler has looked at this rank's gradients, which with FSDP are a part of all.
        for found_inf in self.scaler._found_inf_per_device(self.optimizer).values():
            found_inf.copy_(skipped)

    def look(self) -> None:
        """Count the steps that were skipped since the last look.

        Raises:
            ValueError: Ten steps in a row were not finite, those without a gradient left out.
        """
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
        raise ValueError(
            f"training has diverged: loss or gradient not finite in {self.in_a_row} steps "
            f"in a row, up to step {number}; go on with --run.precision fp32 --resume auto if "
            "that is not its precision, or start anew with a lower optim.learning_rate "
            f"({self._write_report(number, sample_ids)})"
        )

    def summary(self, steps: int, last: Path | None) -> str:
        """How many of so many steps were skipped, and why; empty if none was.

        Raises:
            ValueError: The run is finished, with this `last` checkpoint, and half of its steps or
                more were skipped, in fp16 more than its loss scale may need to settle.
        """
        said = f"{self.skipped:,} of {steps:,} steps were skipped: their loss or gradient was not"
        said += " finite"
        # In fp16 the loss scale starts at 2^16, and the steps that halve it are skipped.
        settling = 16 if self.scaler.is_enabled() else 0
        if last is not None and self.skipped > settling and 2 * self.skipped >= steps:
            raise ValueError(
                f"{said}; change optim.learning_rate, optim.heads_lr_scale, the weights of [loss] "
                f"or prototypes.target_temperature (the last checkpoint is {last})"
            )
        without = f"{self.without_gradient:,} of {steps:,} steps had no gradient and changed "
        without += "nothing, as where no teacher knows a sample of the batch"
        return "; ".join([said] * bool(self.skipped) + [without] * bool(self.without_gradient))

    def _write_report(self, number: int, sample_ids: Sequence[str]) -> str:
        losses, norms = zip(*self._row, strict=True)
        content = {
            "step": number,
            # As text, since JSON has no NaN or infinity.
            "losses": [*map(str, losses)],
            "gradient_norms": [*map(str, norms)],
            "sample_ids": sample_ids,
        }
        try:
            write_atomically(self.report, to_json(content, indent=2) + "\n")
        except OSError as error:
            return f"the samples of the last batch could not be written: {error}"
        return f"the samples of the last batch are in {self.report}"

    def state_dict(self) -> dict[str, Any]:
        row = [[str(value) for value in step] for step in self._row]  # JSON has no NaN
        counts = {"skipped": self.skipped, "without_gradient": self.without_gradient}
        return {**counts, "in_a_row": self.in_a_row, "row": row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])
        self.without_gradient = int(state.get("without_gradient", 0))  # earlier versions had none
        self._row = [(float(loss), float(norm)) for loss, norm in state.get("row", [])]


def out_of_memory(error: BaseException, way_out: str | None = None) -> str | None:
    """One line that names the settings to lower, if the error says that memory ran out.

    `way_out` is said instead, of what does not train.
    """
    text = str(error)
    # What PyTorch's allocator says, the system when a file is mapped into memory, and oneDNN.
    on_host = (
        "DefaultCPUAllocator: can't allocate memory",
        "Cannot allocate memory",
        "could not create a primitive",
    )
    if isinstance(error, MemoryError) or any(words in text for words in on_host):
        device, others, sizes = "", "lower data.cache_gb or data.workers", "episodes.size"
    elif isinstance(error, RuntimeError) and (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
    ):
        device, others, sizes = " on the device", "set run.precision = bf16", "prototypes.number"
    else:
        return None
    if way_out is not None:
        return f"out of memory{device}: {way_out}"
    return (
        f"out of memory{device}: set episodes.micro_batch_size (or lower it; gradients stay those "
        f"of the whole batch) or {others}, and go on with --resume auto; or start anew with a "
        f"lower episodes.batch_size or {sizes}"
    )
