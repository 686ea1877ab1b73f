"""A faster forward pass of frozen image encoders on a CPU: that of ONNX Runtime or OpenVINO.

In it a convolutional net encodes up to three times as many images a second as in PyTorch, and a
transformer about as many. So the engines that are installed are compared with PyTorch, and timed,
on the first images that are to be encoded.
"""

import json
import sys
import timeit
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
# PyTorch encodes few images, and those of small models: the export and the trials take about 5
# seconds, and 1e12 floating-point operations about 20 on one core.
LEAST_IMAGES, LEAST_WORK = 200, 1e12
TRIED, TRIALS = 8, 4  # images of a trial, and trials, of which the fastest counts
LARGEST_DIFFERENCE = 1e-4  # between unit vectors
LEAST_GAIN = 1.1  # for which an engine is taken

Forward = Callable[[Tensor], Tensor]  # images `(b, 3, h, w)` to features `(b, q)`


def accelerate(encoder: Encoder, number: int) -> Encoder:
    """The encoder of a `number` of images with the forward pass of its engine.

    Encoders of texts, and those that are on a card, are sharded or compute in less than float32,
    stay with PyTorch. Raises `ValueError` if a package of the engine is not installed.
    """
    wanted = encoder.engine
    if wanted == "torch" or encoder.reads == "text" or encoder.device.type != "cpu":
        return encoder
    if encoder.autocast is not nullcontext or parallel.is_sharded(encoder.module):
        return encoder
    names = [name for name, packages in PACKAGES.items() if all(map(find_spec, packages))]
    if wanted == "auto":
        if not names or number < LEAST_IMAGES or number * count_operations(encoder) < LEAST_WORK:
            return encoder
    elif wanted in names:
        names = [wanted]
    else:
        needed = " ".join(PACKAGES[wanted])
        raise ValueError(f"encode.engine: {wanted} needs: pip install {needed}; or choose auto")
    return replace(encoder, forward=Engine(encoder, names))


def count_operations(encoder: Encoder) -> int:
    """Floating-point operations of matrices and filters for one image."""
    image = encoder.collate([*encoder.examples[:1]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.forward(image)
    return int(counter.get_total_flops())


class Engine:
    """The forward pass of an encoder in one of some engines, or in PyTorch if none is better.

    It is chosen at the first batch. The exported model and the choice are kept in the cache by the
    encoder's key, so that later passes, and other processes of this host, choose the same.
    """

    def __init__(self, encoder: Encoder, names: Sequence[str]) -> None:
        self.encoder, self.names, self.chosen = encoder, [*names], ""
        self.forwards: dict[str, Forward] = {"torch": encoder.forward}

    def __call__(self, images: Tensor) -> Tensor:
        if not self.chosen:
            self.chosen = "torch"
            with suppress(OSError):  # a cache that cannot be written
                self.chosen = self.choose(images[:TRIED])
        return self.forwards[self.chosen](images)

    def choose(self, images: Tensor) -> str:
        """The engine that was taken before, or else the fastest on these images."""
        folder = cache_folder() / "engines" / checksum(self.encoder.key().encode())
        folder.mkdir(parents=True, exist_ok=True)
        path, graph = folder / "choice.json", folder / "model.onnx"
        names, known = self.names, self.names[0] if self.encoder.engine != "auto" else None
        with in_turn(graph):
            if known is None:
                with suppress(OSError, ValueError, KeyError):
                    choice = json.loads(path.read_text())
                    known = choice["engine"] if choice["among"] == names else None
            self.open([known] if known else names, graph, images)
            if known is not None:
                return known if known in self.forwards else "torch"
            rates = {name: measure_rate(run, images) for name, run in self.forwards.items()}
            best = max(rates, key=rates.__getitem__)
            if rates[best] < LEAST_GAIN * rates["torch"]:
                best = "torch"
                graph.unlink(missing_ok=True)
            facts = {"engine": best, "among": names, "images_per_second": rates}
            write_atomically(path, to_json(facts))
            shown = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
            say(f"note: {self.encoder.name}: engine {best} (images a second: {shown})")
            return best

    def open(self, names: Sequence[str], graph: Path, images: Tensor) -> None:
        """Open those of these engines that compute the same as PyTorch."""
        expected = F.normalize(self.encoder.forward(images).float(), dim=-1)
        for name in (name for name in names if name != "torch"):
            try:
                if not graph.exists():
                    with replacing(graph) as temporary:
                        inputs, module = {"images": images[:2]}, ImageGraph(self.encoder)
                        write_graph(module, inputs, "features", temporary, is_traced=True)
                forward = OPENERS[name](str(graph), min(torch.get_num_threads(), count_cores()))
                difference = float((F.normalize(forward(images), dim=-1) - expected).abs().max())
                if not difference <= LARGEST_DIFFERENCE:
                    raise ValueError(f"it differs from PyTorch by {difference:.1g}")
                self.forwards[name] = forward
            except Exception as error:  # exporters and engines have exceptions of their own
                reason = " ".join(str(error).split())[:200]
                say(f"note: {self.encoder.name}: engine {name} is not used ({reason})")


def measure_rate(forward: Forward, images: Tensor) -> float:
    """Images a second."""
    return len(images) / min(timeit.repeat(lambda: forward(images), number=1, repeat=TRIALS))


def open_onnx(graph: str, threads: int) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised, too
    # Threads that wait for work would take the time of those that decode images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    run = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run
    return lambda images: torch.from_numpy(run(None, {"images": images.contiguous().numpy()})[0])


def open_openvino(graph: str, threads: int) -> Forward:
    # Its import would send an event to its makers; without this module it does not.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    # By default it computes in bfloat16 where the processor can.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    settings |= {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    run = openvino.Core().compile_model(graph, "CPU", settings)
    return lambda images: torch.from_numpy(run({"images": images.contiguous().numpy()})[0])


OPENERS = {"onnx": open_onnx, "openvino": open_openvino}


class ImageGraph(nn.Module):
    """The forward pass of an encoder, as what is exported."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.module, self.run = encoder.module, encoder.forward

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


def write_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    output: str,
    path: Path,
    *,
    opset: int = LEAST_OPSET,
    is_traced: bool = False,
) -> None:
    """Write a module as ONNX, for batches of any size.

    Tracing takes a tenth of the time, but what depends on values of the inputs is lost.
    """
    axes = {name: {0: "batch"} for name in inputs}
    with warnings.catch_warnings(action="ignore"):  # tracing is called old
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=[output],
            **{"dynamic_axes" if is_traced else "dynamic_shapes": axes},
            opset_version=opset,
            external_data=sum(value.nbytes for value in module.state_dict().values()) > LARGEST,
            dynamo=not is_traced,
            verbose=False,
        )


def note_engine(encoder: Encoder, folder: Path | None) -> None:
    """List the engine in the folder of a store, if it is not PyTorch."""
    engine = encoder.forward
    if folder is None or not isinstance(engine, Engine) or engine.chosen in ("", "torch"):
        return
    path, package = folder / "engines.txt", PACKAGES[engine.chosen][-1]
    with suppress(OSError):  # an optional store may have no folder
        known = path.read_text() if path.exists() else ""
        if (line := f"{package} {version(package)}\n") not in known:
            write_atomically(path, known + line)
