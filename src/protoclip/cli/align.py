"""`protoclip align`: its options.

The run is in `training/run.py`, and its defaults in `training/defaults.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from protoclip.cli.train import Train, check_paths, perform, show_results
from protoclip.config import Config
from protoclip.training.defaults import ALIGN, ALIGN_HELP


@dataclass(frozen=True, kw_only=True)
class Align(Train):
    """Train heads between two frozen pretrained encoders.

    Each image and each caption is encoded once. Name the encoders by
    --model.image.name and --model.text.name. Other defaults follow from the
    data; notes say which.
    """

    # With words where they follow from the data.
    defaults: ClassVar[Mapping[str, Any]] = {**ALIGN, "model.image.name": None, **ALIGN_HELP}

    def __call__(self) -> None:
        settings = self.settings()
        check_paths(Config.from_dict(settings), resume=self.resume)
        results = perform("align", settings, resume=self.resume)
        show_results(results, as_json=self.json, explores=True)
