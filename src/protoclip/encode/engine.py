"""A faster forward pass of frozen encoders on a CPU: that of ONNX Runtime or OpenVINO.

In it a convolutional net encodes up to three times as many images a second as in PyTorch, and a
transformer up to a quarter more. So the engines that are installed are compared with PyTorch, and
timed, on the first inputs that are to be encoded.
"""

import json
import sys
import timeit
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip.data.access import cache_folder
from protoclip.distributed import parallel
from protoclip.distributed.collectives import count_cores
from protoclip.encode.encoder import Encoder
from protoclip.files import checksum, in_turn, replacing, to_json, write_atomically
from protoclip.terminal import say

# What an engine needs. Both read the same exported file.
PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
LEAST_OPSET = 18  # the oldest that torch exports to
LARGEST = 1_900_000_000  # bytes of weights that fit into one file
# PyTorch encodes what takes it less time than this: an export and its trials take about 5 seconds,
# and captions gain less. To open an engine that was chosen before takes about 1.
SECONDS_FOR_TRIALS, SECONDS_TO_OPEN = {"image": 10.0, "text": 30.0}, 2.0
LEAST_PASSES = 8  # fewer batches than these stay with PyTorch, too
TRIED, TRIALS = {"image": 8, "text": 32}, 4  # inputs of a trial; the fastest of the trials counts
LARGEST_DIFFERENCE = 1e-4  # between unit vectors
LEAST_GAIN = 1.1  # for which an engine is taken

Forward = Callable[[Any], Tensor]  # of a batch of inputs, to features `(b, q)`
Run = Callable[[dict[str, np.ndarray]], np.ndarray]  # the same in an engine


def accelerate(encoder: Encoder, number: int) -> Encoder:
    """The encoder of a `number` of inputs with the forward pass of its engine.

    Encoders on a card, sharded or in less than float32 stay with PyTorch. Raises `ValueError` if a
    package of the engine is not installed.
    """
    wanted = encoder.engine
    names = [name for name, packages in PACKAGES.items() if all(map(find_spec, packages))]
    is_exact = encoder.device.type == "cpu" and encoder.autocast is nullcontext
    if wanted == "torch" or not is_exact or parallel.is_sharded(encoder.module):
        return encoder
    if wanted != "auto":
        if wanted not in names:
            needed = " ".join(PACKAGES[wanted])
            raise ValueError(f"encode.engine: {wanted} needs: pip install {needed}; or choose auto")
        names = [wanted]
    return replace(encoder, forward=Engine(encoder, names, number)) if names else encoder


class Engine:
    """The forward pass of an encoder in one of some engines, or in PyTorch if none is better.

    It is chosen at the first batch, if PyTorch would take long. The exported model and the choice
    are kept in the cache by the encoder's key, so that later passes, and other processes of this
    host, choose the same.
    """

    def __init__(self, encoder: Encoder, names: Sequence[str], number: int) -> None:
        self.encoder, self.names, self.number, self.chosen = encoder, [*names], number, ""
        self.forwards: dict[str, Forward] = {"torch": encoder.forward}

    def __call__(self, batch: Any) -> Tensor:
        if not self.chosen:
            features = self.encoder.forward(batch)
            passes, seconds = self.number / len(features), 0.0
            if passes >= LEAST_PASSES:  # a first pass is slow, so a second one is timed
                seconds = passes * timeit.timeit(lambda: self.encoder.forward(batch), number=1)
            self.chosen = "torch"
            with suppress(OSError):  # a cache that cannot be written
                self.chosen = self.choose(batch, seconds)
            if self.chosen == "torch":
                return features
        return self.forwards[self.chosen](batch)

    @property
    def version(self) -> str:
        """The package that computed features and its version; empty for PyTorch."""
        if self.chosen in ("", "torch"):
            return ""
        package = PACKAGES[self.chosen][-1]
        return f"{package} {version(package)}"

    def choose(self, batch: Any, seconds: float) -> str:
        """The engine that was taken before, or else the fastest on these inputs.

        PyTorch if it takes few `seconds` for all.
        """
        is_open, model, reads = self.encoder.engine == "auto", self.encoder.name, self.encoder.reads
        if is_open and seconds < SECONDS_TO_OPEN:
            return "torch"
        folder = cache_folder() / "engines" / checksum(self.encoder.key().encode())
        path, graph = folder / "choice.json", folder / "model.onnx"
        if is_open and seconds < SECONDS_FOR_TRIALS[reads] and not path.exists():
            return "torch"
        folder.mkdir(parents=True, exist_ok=True)
        inputs = {name: value[: TRIED[reads]] for name, value in to_inputs(batch).items()}
        names, chosen = self.names, None if is_open else self.names[0]
        with in_turn(graph):
            if chosen is None:
                with suppress(OSError, ValueError, KeyError):
                    choice = json.loads(path.read_text())
                    chosen = choice["engine"] if choice["among"] == names else None
            if chosen is None:
                say(f"note: {model}: compares engines once, in a minute or two")
            self.open([chosen] if chosen else names, graph, inputs)
            if chosen is not None:
                return chosen if chosen in self.forwards else "torch"
            rates = {one: measure_rate(run, to_batch(inputs)) for one, run in self.forwards.items()}
            best = max(rates, key=rates.__getitem__)
            if rates[best] < LEAST_GAIN * rates["torch"]:
                best = "torch"
                graph.unlink(missing_ok=True)
            facts = {"engine": best, "among": names, "inputs_per_second": rates}
            write_atomically(path, to_json(facts))
            shown = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
            say(f"note: {model}: engine {best} ({reads}s a second: {shown})")
            return best

    def open(self, names: Sequence[str], graph: Path, inputs: dict[str, Tensor]) -> None:
        """Open those of these engines that compute the same as PyTorch."""
        encoder = self.encoder
        batches = [to_batch(inputs), encoder.collate([*encoder.examples])]  # of other lengths
        expected = [to_unit_norm(encoder.forward(batch)) for batch in batches]

        def difference(run: Forward) -> float:
            return max(
                float((to_unit_norm(run(batch)) - exact).abs().max())
                for batch, exact in zip(batches, expected, strict=True)
            )

        for name in (name for name in names if name != "torch"):
            try:
                if not graph.exists():
                    with replacing(graph) as temporary:
                        few = {key: value[:2] for key, value in inputs.items()}
                        axes = ("batch", "length")[: 1 if encoder.reads == "image" else 2]
                        module = EncoderGraph(encoder, [*few])
                        write_graph(module, few, "features", temporary, axes=axes, is_traced=True)
                threads = min(torch.get_num_threads(), count_cores())
                forward = partial(pass_through, OPENERS[name](str(graph), threads))
                if not (found := difference(forward)) <= LARGEST_DIFFERENCE:
                    raise ValueError(f"it differs from PyTorch by {found:.1g}")
                self.forwards[name] = forward
            except Exception as error:  # exporters and engines have exceptions of their own
                reason = " ".join(str(error).split())[:200]
                say(f"note: {encoder.name}: engine {name} is not used ({reason})")


def to_inputs(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch, by their names in the exported graph."""
    return {"inputs": batch} if isinstance(batch, Tensor) else dict(batch)


def to_batch(inputs: dict[str, Tensor]) -> Any:
    """The batch that has these tensors."""
    return inputs.get("inputs", inputs)


def to_unit_norm(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def pass_through(run: Run, batch: Any) -> Tensor:
    """The features of a batch from an engine."""
    inputs = to_inputs(batch)
    return torch.from_numpy(run({n: value.contiguous().numpy() for n, value in inputs.items()}))


def measure_rate(forward: Forward, batch: Any) -> float:
    """Inputs a second."""
    seconds = min(timeit.repeat(lambda: forward(batch), number=1, repeat=TRIALS))
    return len(next(iter(to_inputs(batch).values()))) / seconds


def open_onnx(graph: str, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised, too
    # Threads that wait for work would take the time of those that decode images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    run = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run
    return lambda inputs: run(None, inputs)[0]


def open_openvino(graph: str, threads: int) -> Run:
    # Its import would send an event to its makers; without this module it does not.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    # By default it computes in bfloat16 where the processor can.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    run = openvino.Core().compile_model(graph, "CPU", settings)
    return lambda inputs: run(inputs)[0]


OPENERS = {"onnx": open_onnx, "openvino": open_openvino}


class EncoderGraph(nn.Module):
    """The forward pass of an encoder, as what is exported."""

    def __init__(self, encoder: Encoder, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.run, self.names = encoder.module, encoder.forward, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(to_batch(dict(zip(self.names, inputs, strict=True))))


def write_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    output: str,
    path: Path,
    *,
    axes: Sequence[str] = ("batch",),
    opset: int = LEAST_OPSET,
    is_traced: bool = False,
) -> None:
    """Write a module as ONNX; the first dimensions of its inputs, named by `axes`, may vary.

    Tracing takes a tenth of the time, but what depends on values of the inputs is lost.
    """
    varying = {name: dict(enumerate(axes)) for name in inputs}
    with warnings.catch_warnings(action="ignore"):  # tracing is called old
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=[output],
            **{"dynamic_axes" if is_traced else "dynamic_shapes": varying},
            opset_version=opset,
            external_data=sum(value.nbytes for value in module.state_dict().values()) > LARGEST,
            dynamo=not is_traced,
            verbose=False,
        )
