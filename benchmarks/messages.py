"""What do the ranks of a large run send? One process counts it, for three sizes of group.

The process is rank 0 of a simulated group (torch's fake backend): each collective is counted and
answered as if the other ranks had about the same rows. What is trained is this package's own: a
step, the clustering of an episode, a checkpoint. Only the towers and the search for the nearest
centroid compute nothing, since what is sent follows from their sizes. Bytes are those that a rank
receives if all-reduce, all-gather and reduce-scatter go round a ring; messages are those that it
receives then.

    python benchmarks/messages.py [--out benchmarks/results/messages.json] [--write]

`--write` puts the table into the results. Takes a minute or two, and 6 GB.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from protoclip.config import Config, HeadConfig, ModelConfig, PrototypeConfig, TeacherConfig
from protoclip.data.loader import Batch
from protoclip.data.sampler import Episode
from protoclip.distributed import collectives
from protoclip.encode.teachers import TeacherFeatures
from protoclip.losses.objective import LossWeights
from protoclip.models import layers, loading
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.start import resolve_start
from protoclip.progress import Progress
from protoclip.prototypes import kmeans
from protoclip.prototypes.features import QueuedFeatures
from protoclip.training.optim import PROTOTYPICAL
from protoclip.training.trainer import EpisodePrototypes, Trainer
from protoclip.training.watch import NonFiniteGuard

RESULTS = Path(__file__).parent / "results" / "messages_x86-2core_202611.md"
RANKS = {8: 512, 64: 512, 512: 64}  # and the pairs of a batch on each
VIT = ModelConfig(name="ViT-B-32", heads=HeadConfig(hidden_dim=1024, projection_dim=128))
BEGIN, END = "<!-- by benchmarks/messages.py -->\n", "<!-- end -->"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a run; the defaults are those of the table."""

    model: ModelConfig = VIT
    width: int = 512  # of the joint space
    teacher: int = 64
    episode: int = 196_608
    prototypes: int = 20_000
    iterations: int = 6


class Counting(TorchDispatchMode):
    """Counts collectives, messages and bytes under the label of the moment, and plays the peers.

    torch's fake backend gives each rank's part as a copy of this one's. Two things need more: rows
    have positions, which differ between ranks, and each peer has a member in every cluster, and
    rows that moved, or clustering would take another course.
    """

    def __init__(self, ranks: int, batch: int, width: int) -> None:
        super().__init__()
        self.ranks, self.batch, self.label = ranks, batch, ""
        self.width = width  # of the joint space, by which features are known
        self.counts: dict[str, Counter[str]] = {}

    @contextmanager
    def under(self, label: str) -> Iterator[None]:
        before, self.label = self.label, label
        yield
        self.label = before

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            self._saw(function.__name__.partition(".")[0].rstrip("_"), args)
        return result

    def _saw(self, name: str, args: Any) -> None:
        if name == "allreduce":
            (values,) = args[0]
            self._count(name, 2 * (self.ranks - 1), 2 * values.nbytes, self._part(values))
            if values.dtype in (torch.int64, torch.float64):
                values += self.ranks - 1
        elif name == "allgather":
            ((parts,), (values,)) = args[:2]
            self._count(name, self.ranks - 1, self.ranks * values.nbytes, self._part(values))
            if values.dtype == torch.int64 and values.numel() > 1 and (values.diff() > 0).all():
                for rank, part in enumerate(parts):
                    part += rank * self.batch
        elif name == "all_gather_into_tensor":
            whole = self.ranks * args[0].nbytes
            self._count(name, self.ranks - 1, whole, self._part(args[0]))
        elif name == "reduce_scatter_tensor":
            self._count(name, self.ranks - 1, args[0].nbytes, self._part(args[0]))
        elif name == "broadcast":
            self._count(name, 1, args[0][0].nbytes * self.ranks / (self.ranks - 1), "broadcasts")
        else:
            assert name in ("wait_tensor", "_wrap_tensor_autograd"), f"{name} is not counted"

    def _part(self, values: Tensor) -> str:
        """What of a step a collective is for, by its size."""
        if self.label != "step":
            return "all"
        if values.ndim == 2 and values.shape[1] == self.width:
            return "features"
        if values.ndim == 3:
            return "batch_norm"
        return "gradients" if values.numel() > 1000 else "rest"

    def _count(self, name: str, messages: int, whole: float, part: str) -> None:
        if self.label:
            counts = self.counts.setdefault(self.label, Counter())
            counts["collectives"] += 1
            counts["messages"] += messages
            received = round(whole * (self.ranks - 1) / self.ranks)
            counts["bytes"] += received
            counts[f"bytes/{part}"] += received


class Teacher(TeacherFeatures):
    def __init__(self, width: int) -> None:
        self.width = width

    def rows(self, sample_ids: Sequence[str]) -> Tensor:
        return torch.randn(len(sample_ids), self.width)

    def sample(self) -> Any:
        raise NotImplementedError


def hollow(model: ProtoCLIP) -> ProtoCLIP:
    """The model with towers that read features off their inputs; all parameters get gradients."""
    towers: Any = model.towers
    image = [p for name, p in towers.named_parameters() if name.startswith("visual.")]
    text = [p for name, p in towers.named_parameters() if not name.startswith("visual.")]

    def encode(
        inputs: Tensor, normalize: bool = False, *, parameters: list[nn.Parameter]
    ) -> Tensor:
        rows = inputs[:, 0, 0] if inputs.ndim == 4 else inputs.float()
        return rows + 0 * sum(parameter.sum() for parameter in parameters)

    towers.encode_image = partial(encode, parameters=image)
    towers.encode_text = partial(encode, parameters=text)
    return model


def add_up(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does with a bucket of gradients, for a backend whose work has no result."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def any_centroid(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randint(len(centroids), (len(rows),)), 0.1 + torch.rand(len(rows))


def count(ranks: int, batch: int, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Collectives, messages and bytes of a step, an episode and a checkpoint, on one rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        # The processor decides on bfloat16; which centroid is nearest changes nothing that is sent.
        with (
            patch.object(kmeans, "bfloat16_pays", lambda *_: False),
            patch.object(kmeans, "nearest", any_centroid),
        ):
            return counted(ranks, batch, sizes)
    finally:
        dist.destroy_process_group()


def counted(ranks: int, batch: int, sizes: Sizes) -> dict[str, dict[str, int]]:
    torch.manual_seed(0)
    share, width = sizes.episode // ranks, sizes.model.heads.projection_dim
    model = hollow(loading.build_model(resolve_start(sizes.model), seed=0))
    for head in (model.image_head, model.text_head):
        layers.synchronise(head, torch.device("cpu"))
    source = QueuedFeatures(
        model=model,
        batches=lambda episode: (),
        teachers={"teacher": Teacher(sizes.teacher)},
        autocast=nullcontext,
        size=sizes.episode,
    )
    source.pushed, source.batch_size = share, batch
    source.sample_ids = [f"{row:09}" for row in range(share)]
    source.image, source.text = (
        nn.functional.normalize(torch.randn(share, width), dim=1) for _ in range(2)
    )
    counting = Counting(ranks, batch, sizes.width)

    class Counted(EpisodePrototypes):
        """Clusters of a fixed number, counted."""

        def cluster(self, space: str, rows: Tensor, positions: Tensor | None) -> kmeans.KMeans:
            with counting.under("kmeans"):
                return kmeans.kmeans(
                    rows,
                    sizes.prototypes,
                    iterations=sizes.iterations,
                    seed=0,
                    positions=positions,
                )

    group = {"params": [*model.parameters()], "scale": 1.0}  # of the learning rate
    optimizer, scaler = torch.optim.AdamW([group], fused=True), torch.amp.GradScaler(enabled=False)
    trainer = Trainer(
        model=model,
        stage=lambda episode: PROTOTYPICAL,
        prototypes=Counted(
            # Hard targets, since soft ones take memory and send nothing.
            config=Config(
                prototypes=PrototypeConfig(hard_targets=True), teacher=TeacherConfig(features="-")
            ),
            source=source,
        ),
        weights=LossWeights(teachers={"teacher": 1.0}),
        schedule=lambda step: 0.0,
        guard=NonFiniteGuard(optimizer, scaler, Path(tempfile.gettempdir()) / "diverged.json"),
        autocast=nullcontext,
        clip_norm=1.0,
        micro_batch_size=None,
        batches=share // batch,
        batch_size=ranks * batch,
    )
    pairs = Batch(
        position=torch.arange(batch),
        sample_id=source.sample_ids[:batch],
        image=torch.randn(batch, 3, 1, sizes.width),
        text=torch.randint(100, (batch, sizes.width)),
        features={"teacher": torch.randn(batch, sizes.teacher)},
    )
    episode = Episode(index=0, rows=torch.arange(share))
    with counting:
        trainer.prototypes.targets = {("image", "text"): None}  # type: ignore[dict-item]
        trainer.start_episode(episode)  # wraps the model, which a stage does once
        trainer._module.register_comm_hook(None, add_up)  # type: ignore[operator]
        trainer.prototypes.targets = {}
        with counting.under("episode"):
            trainer.start_episode(episode)
        trainer.train_step(pairs, detailed=False)  # after the first step DDP sorts its buckets
        with counting.under("step"):
            trainer.train_step(pairs, detailed=False)
            collectives.any_rank([False, False, False])
        with counting.under("checkpoint"):
            trainer.state_dict()
        with counting.under("episode"):
            trainer.end_episode()
    return {label: dict(sorted(counts.items())) for label, counts in counting.counts.items()}


def table(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Rows of Markdown, a column for each number of ranks."""
    names = {
        "**a step**, gradients": ("step", "bytes/gradients"),
        "features for InfoNCE, and their gradients": ("step", "bytes/features"),
        "BatchNorm of the heads": ("step", "bytes/batch_norm"),
        "**an episode**, K-means of three spaces": ("kmeans", "bytes"),
        "back-translation, assignments and positions": ("episode", "bytes"),
        "**a checkpoint**, with the queue": ("checkpoint", "bytes"),
    }
    heads = [f"{w} x {b} = {w * b:,}" for w, b in ((int(w), RANKS[int(w)]) for w in counts)]
    lines = [
        f"| W ranks x b pairs = batch | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    for what, (label, key) in names.items():
        found = [counts[w][label][key] / 1e6 for w in counts]
        cells = [f"{mb:,.0f} MB" if mb >= 10 else f"{mb:.1f} MB" for mb in found]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    for what, labels in {
        "a step": ("step",),
        "an episode": ("kmeans", "episode"),
        "a checkpoint": ("checkpoint",),
    }.items():
        cells = [
            f"{sum(counts[w][label]['collectives'] for label in labels):,} / "
            f"{sum(counts[w][label]['messages'] for label in labels):,}"
            for w in counts
        ]
        lines.append(f"| collectives / messages of {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def written(page: str, counts: Mapping[str, Any]) -> str:
    """The page with this table in its place."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table(counts) + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the counts to this JSON file")
    parser.add_argument("--write", action="store_true", help="write the table to the results")
    arguments = parser.parse_args()
    progress, counts = Progress("benchmark: messages", len(RANKS)), {}
    for number, (ranks, batch) in enumerate(RANKS.items()):
        counts[str(ranks)] = count(ranks, batch, Sizes())
        progress.update(number + 1)
    print(table(counts))
    if arguments.out:
        arguments.out.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    if arguments.write:
        page = RESULTS.read_text(encoding="utf-8")
        RESULTS.write_text(written(page, counts), encoding="utf-8")


if __name__ == "__main__":
    main()
