"""Count the hops of a run: how many functions, modules and rooms each step passes through.

    python scripts/count_hops.py [--json]

Traces an untrained run of the default settings over a table of 96 pairs on the CPU: its plan, its
set-up, its first batch, a forward pass with its losses, and an evaluation with empty and with kept
features. A function counts once, with those inside it. A room is a folder of the package, and the
files at the top are one more. An edge is a pair of caller and callee; one that crosses leads from
room to room. Depth counts the functions that are open at once.
"""

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PAIRS = 96
T = TypeVar("T")
Function = tuple[str, str]  # module and name


@dataclass
class Trace:
    """What one thread called of the package."""

    package: Path
    functions: set[Function] = field(default_factory=set)
    edges: set[tuple[Function, Function]] = field(default_factory=set)
    depth: int = 0
    _stack: list[Function] = field(default_factory=list)
    _names: dict[CodeType, Function | None] = field(default_factory=dict)

    def record(self, frame: FrameType, event: str, argument: object) -> None:
        """Take an event of `sys.setprofile`."""
        function = self._function(frame.f_code)
        if function is None:
            return
        if event == "call":
            self.functions.add(function)
            if self._stack and self._stack[-1] != function:
                self.edges.add((self._stack[-1], function))
            self._stack.append(function)
            self.depth = max(self.depth, len(self._stack))
        elif event == "return" and self._stack:
            self._stack.pop()

    def _function(self, code: CodeType) -> Function | None:
        """The function of the package that some code belongs to, if it is any's."""
        if code not in self._names:
            path = Path(code.co_filename)
            is_function = code.co_name != "<module>" and bool(code.co_flags & 1)  # no class body
            self._names[code] = None
            if is_function and path.is_relative_to(self.package):
                module = ".".join(path.relative_to(self.package).with_suffix("").parts)
                self._names[code] = module, code.co_qualname.partition(".<locals>")[0]
        return self._names[code]

    def counts(self) -> dict[str, int]:
        ends = [(room(caller), room(callee)) for caller, callee in self.edges]
        crossing = [(caller, callee) for caller, callee in ends if caller != callee]
        return {
            "functions": len(self.functions),
            "modules": len({module for module, _ in self.functions}),
            "rooms": len({*map(room, self.functions)}),
            "edges": len(self.edges),
            "crossing": len(crossing),
            "depth": self.depth,
        }


def room(function: Function) -> str:
    """The folder of a function's module; files at the top are one room."""
    return function[0].rpartition(".")[0]


def trace(call: Callable[[], T]) -> tuple[T, Trace]:
    """The result of a call, and what it called."""
    import protoclip

    made = Trace(Path(protoclip.__file__).parent)
    sys.setprofile(made.record)
    try:
        return call(), made
    finally:
        sys.setprofile(None)


def write_pairs(path: Path) -> None:
    """Write pairs that all differ: an image of its own colour, and a caption of its own."""
    colours = np.random.default_rng(0).integers(0, 256, (PAIRS, 3), dtype=np.uint8)
    images = []
    for colour in colours:
        buffer = io.BytesIO()
        Image.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy()).save(buffer, format="PNG")
        images.append(buffer.getvalue())
    captions = [f"a square of {' '.join(map(str, colour))}" for colour in colours]
    names = [f"pair-{number}" for number in range(PAIRS)]
    columns = {"sample_id": names, "image": images, "caption": captions}
    pq.write_table(pa.table(columns), path)


def trace_steps(folder: Path) -> dict[str, Trace]:
    """The steps of a run whose data and run folder are in a folder."""
    import torch

    from protoclip import evaluate
    from protoclip.config import Config
    from protoclip.evaluation.validation import open_data
    from protoclip.losses.objective import objective
    from protoclip.models import loading
    from protoclip.models.protoclip import evaluation_transform
    from protoclip.training.plan import make_plan
    from protoclip.training.run import Run

    pairs, steps = folder / "pairs.parquet", dict[str, Trace]()
    write_pairs(pairs)
    config = Config.from_dict(
        {
            "data": {"train": str(pairs), "workers": 0},
            "run": {"device": "cpu", "out": str(folder / "run")},
        }
    )
    plan, steps["make_plan"] = trace(lambda: make_plan(config))

    def set_up() -> Run:
        model, _ = loading.training_model(plan.config, torch.device("cpu"), plan.start)
        return Run(plan, model, folder=folder / "run")

    run, steps["model and run"] = trace(set_up)
    run.trainer.start_episode(run.episode(0))
    batches = run.loader.batches(run.training_pass(0))
    batch, steps["first batch"] = trace(lambda: next(batches))
    batches.close()

    def forward() -> Any:
        embeddings = run.model(batch.image, batch.text, project=True).paired()
        return objective(embeddings, None, {}, weights=run.trainer.weights)

    _, steps["forward, losses"] = trace(forward)

    data, steps["open a table"] = trace(lambda: open_data(str(pairs)))

    def evaluate_run() -> Any:
        transform, cache = evaluation_transform(run.model), folder / "kept"
        return evaluate(run.model, transform, run.loader.tokenizer, data, cache=cache)

    for state in ("cold", "warm"):
        _, steps[f"evaluate, {state}"] = trace(evaluate_run)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PROTOCLIP_CACHE"] = str(Path(folder) / "cache")
        steps = trace_steps(Path(folder))
    counts = {name: step.counts() for name, step in steps.items()}
    if as_json:
        print(json.dumps(counts, indent=2))
        return
    columns = [*next(iter(counts.values()))]
    print(f"{'step':<18}" + "".join(f"{column:>11}" for column in columns))
    for name, row in counts.items():
        print(f"{name:<18}" + "".join(f"{row[column]:>11}" for column in columns))


if __name__ == "__main__":
    main()
