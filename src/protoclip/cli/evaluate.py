"""`protoclip evaluate`."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from protoclip.files import to_json


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run or checkpoint on the emoji's held-out concepts."""

    path: str  # A run folder or a checkpoint folder.
    _: KW_ONLY
    split: Literal["test", "validation"] = "test"  # Choose models on validation.
    json: bool = False  # Print the metrics as JSON.

    def __call__(self) -> None:
        import torch

        from protoclip.distributed import collectives
        from protoclip.evaluation.suite import evaluate
        from protoclip.models import loading

        torch.set_flush_denormal(True)
        device, folder = collectives.device("auto"), Path(self.path)
        # `compare` reads the results by sample. An unfinished run would keep outdated ones.
        finished = (folder / "results.json").is_file()
        with collectives.process_group(device):
            model, transform, tokenizer = collectives.raise_on_all_ranks(
                lambda: loading.load(self.path)
            )
            metrics = evaluate(
                loading.to_device(model, device),
                transform,
                tokenizer,
                split=self.split,
                samples_to=folder / "results" if finished else None,
            )
        if collectives.launched()[0] == 0:
            print_results({"metrics": metrics}, json=self.json)


def print_results(results: Mapping[str, Any], *, json: bool) -> None:
    if json:
        print(to_json(results, indent=2))
        return
    for name, value in results["metrics"].items():
        print(f"{name:<45} {value:.4f}")
