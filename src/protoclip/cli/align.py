"""`protoclip align`."""

from dataclasses import dataclass

from protoclip.cli.train import Train, show_results
from protoclip.config import Config
from protoclip.paths import require_paths, require_place


@dataclass(frozen=True, kw_only=True)
class Align(Train):
    """Train heads between two frozen pretrained halves.

    Each image and each caption is encoded once. The defaults differ from those
    of train; notes say how. Name the halves by
    --model.image.name and --model.text.name.
    """

    def __call__(self) -> None:
        settings = self.settings()
        config = Config.from_dict(settings)
        if self.resume == "never":
            require_paths(config)
        if config.run.out is not None:
            require_place("run.out", config.run.out, is_folder=True)
        if config.align.features is not None:
            require_place("align.features", config.align.features, is_folder=True)
        import torch

        from protoclip.training.align import align

        torch.set_flush_denormal(True)
        show_results(align(settings, resume=self.resume), as_json=self.json)
