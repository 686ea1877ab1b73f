"""`protoclip embed-teacher`: its options, and what it prints.

The features are computed and written in `encode/teachers.py`.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from protoclip.cli.spec import (
    BatchOption,
    EncodingOptions,
    JsonOption,
    Recipes,
    open_device,
    quick_imports,
)
from protoclip.config import Count, DataConfig
from protoclip.files import to_json
from protoclip.rules import require_data_paths, require_model, require_place
from protoclip.terminal import say, visible


@dataclass(frozen=True, kw_only=True)
class EmbedTeacher(Recipes, EncodingOptions, BatchOption, JsonOption):
    """Write a frozen model's features of a data set.

    After an interruption the same command continues.
    """

    teacher: str  # hf:NAME, minilm, open_clip:MODEL/TAG, timm:MODEL, run or file.
    out: str  # Folder of the features, for teacher.features.
    modality: Literal["auto", "text", "image"] = "auto"  # auto prefers images.
    pooling: Literal["mean", "cls", "pooler"] = "mean"  # From tokens to one feature.
    width: Count | None = None  # Reduce the features to this width by PCA.
    num_samples: Count | None = None  # Samples of a stream to read.
    data: DataConfig = field(default_factory=DataConfig)

    def __call__(self) -> None:
        require_data_paths(self.data)
        require_model("--teacher", self.teacher, "teacher")
        require_place("--out", self.out, is_folder=True)
        with quick_imports():
            from protoclip.cli.data import open_source, print_notes
            from protoclip.distributed import collectives
            from protoclip.encode.teachers import embed_teacher

        device = open_device(self.device)
        with collectives.process_group(device):
            samples, notes = collectives.raise_on_all_ranks(lambda: open_source(self.data))
            if collectives.rank() == 0:
                print_notes(notes)
            facts = embed_teacher(
                self.teacher,
                samples,
                Path(self.out),
                modality=self.modality,
                pooling=self.pooling,
                width=self.width,
                batch_size=self.batch_size,
                device=device,
                precision=self.precision,
                num_samples=self.num_samples,
                threads=None if self.data.workers == "auto" else self.data.workers,
            )
        if collectives.read_launcher()[0] > 0:
            return
        if self.json:
            print(to_json(facts, indent=2))
            return
        for name, value in facts.items():
            shown = f"{value:.4f}" if isinstance(value, float) else visible(str(value))
            print(f"{name:<24} {shown}")
        out = visible(self.out)
        say(f"written to {out}; train with --teacher.features {shlex.quote(out)}")
