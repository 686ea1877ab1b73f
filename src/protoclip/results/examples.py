"""The pairs that a run is measured on, and how its checkpoints group them.

The measures are in `evaluation/geometry.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from protoclip.data import sources
from protoclip.data.bands import show
from protoclip.data.loader import read_image
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs, Sample
from protoclip.data.summary import draw_samples
from protoclip.encode.features import Encoder, load_encoder
from protoclip.evaluation import geometry
from protoclip.evaluation.validation import find_change, split_validation
from protoclip.files import checksum, to_json, write_atomically
from protoclip.models.checkpoint import read_prototypes
from protoclip.models.protoclip import ProtoCLIP
from protoclip.progress import Progress
from protoclip.prototypes.kmeans import nearest
from protoclip.results.compare import name_runs
from protoclip.results.read import ANALYSIS, RunFolder, read_run
from protoclip.results.table import Cell, Row, Table
from protoclip.terminal import say

PAIRS_PER_GROUP = 5  # at least, in the mean
FEW = 100  # pairs; with fewer a note says that numbers say little
HINT = "train with --run.save_steps N --run.keep_checkpoints 100"
# Unit-norm rows, by space (features, projections) and by `images` or `texts`.
Spaces = dict[str, dict[str, Float[Tensor, "n _"]]]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Pairs to measure a model on."""

    name: str
    images: Sequence[bytes]  # encoded
    captions: Sequence[str]
    classes: Int[Tensor, " n"] | None = None  # the class of each pair, where the data have classes
    groups: Sequence[int] | None = None  # pairs of one group fit each other, where the data say so
    skipped: int = 0  # number of samples that could not be read, one of them for this `reason`
    reason: str = ""
    changed: str = ""  # how the data of the run differ from those that it was trained on

    @property
    def notes(self) -> list[str]:
        """Warnings about these pairs, in sentences without a full stop."""
        lost = f"{self.skipped:,} pairs of {self.name} could not be read, such as {self.reason}"
        trained = f"its data have changed since it was trained ({self.changed}), so it may have "
        trained += f"been trained on pairs of {self.name}"
        return [lost] * bool(self.skipped) + [trained] * bool(self.changed)

    @property
    def digest(self) -> str:
        """Identifies the pairs by their content, in any order and under any name."""
        pairs = zip(map(checksum, self.images), self.captions, strict=True)
        return checksum(to_json(sorted(pairs)).encode())

    @cached_property
    def pairs(self) -> ImageTextPairs:
        """The images, as an encoder takes them."""
        table = pa.table({"image": pa.array(self.images, pa.large_binary())})
        return ImageTextPairs(table, name=self.name, caption_columns=())


# Where pairs come from


def open_examples(run: RunFolder, samples: int) -> Examples:
    """At most `samples` pairs of a run's validation set, drawn evenly.

    Raises:
        ValueError: The data are gone, cannot be read or hold too few pairs, or none are held out.
    """
    settings = sources.allow_bad(run.config)
    source, validation, _ = split_validation(settings, sources.open_samples(settings))
    if not validation:
        raise ValueError(f"{run.folder}: this run held out no pairs to measure it on")
    changed = None
    if isinstance(source, Pairs) and len(source.left_out):
        # Pairs that are held out of changed data may have been trained on.
        changed = find_change(run.folder, source)
    split = validation[0].splits["validation"]
    images: Any = split.images
    drawn = [*draw_samples(images, samples, lambda row: read_image(images, row, show)[0], seed=0)]
    good = [(row, one) for row, one in drawn if isinstance(one, Sample)]
    bad = [str(one) for _, one in drawn if isinstance(one, BadSample)]
    rows = [row for row, _ in good]
    examples = Examples(
        name=validation[0].name,
        images=[sample.image for _, sample in good],
        captions=[sample.captions[0] for _, sample in good],
        classes=None if split.labels is None else split.labels[rows],
        groups=None if split.groups is None else [split.groups[row] for row in rows],
        skipped=len(bad),
        reason=next(iter(bad), ""),
        changed=changed or "",
    )
    if len(good) < 2 * PAIRS_PER_GROUP:
        needed = "; ".join([f"{2 * PAIRS_PER_GROUP}", *examples.notes])
        raise ValueError(f"{examples.name}: {len(good)} pairs are too few; needs {needed}")
    return examples


# Embeddings


@torch.inference_mode()
def embed_examples(encoder: Encoder, examples: Examples, *, project: bool) -> Spaces:
    """`images` and `texts` of unit norm on the CPU: the `features`, and perhaps `projections`."""
    model = encoder.model
    assert isinstance(model, ProtoCLIP)
    images = encoder.encode_images(examples.pairs, stage="images").features.to(encoder.device)
    texts = encoder.encode_texts(examples.captions, stage="texts").to(encoder.device)
    embeddings = model.embeddings(images, texts, project)
    spaces = {
        space: {
            f"{modality}s": getattr(embeddings, f"{modality}_{space}").float().cpu()
            for modality in ("image", "text")
        }
        for space in ("features", *["projections"] * project)
    }
    if not all(rows.isfinite().all() for space in spaces.values() for rows in space.values()):
        raise ValueError("the model's projections are not finite; it has diverged")
    return spaces


# `protoclip analyze`


def analyze_runs(runs: Sequence[str | Path], **options: Any) -> list[dict[str, Any]]:
    """`analyze_run` of each run, written as `analysis.json` into its folder."""
    analyses = []
    for folder in map(Path, runs):
        analysis = analyze_run(folder, **options)
        write_atomically(folder / ANALYSIS, to_json(analysis, indent=2) + "\n")
        notes, pairs = [*analysis["notes"]], analysis["pairs"]
        if len(analysis["checkpoints"]) == 1:
            notes.append(f"a single checkpoint, so no curves; {HINT}")
        if pairs < FEW:
            notes.append(f"only {pairs} pairs, whose groups say little")
        for note in notes:
            say(f"note: {folder}: {note}")
        say(f"written to {folder / ANALYSIS}")
        analyses.append(analysis)
    if len({(analysis["digest"], analysis["groups"]) for analysis in analyses}) > 1:
        say("note: the runs differ in held-out pairs or in the number of groups")
    return analyses


def analyze_run(
    folder: Path,
    *,
    samples: int = 5000,
    allow_links: bool = False,
    device: torch.device,
) -> dict[str, Any]:
    """Measure every checkpoint of a run on held-out pairs, as docs/grouping.md describes it.

    Each modality has as many groups as the run has prototypes, but at least five pairs to a group.
    Raises `ValueError` for no run, no checkpoint, no held-out data, or too few pairs.
    """
    run = read_run(folder, allow_links=allow_links)
    config, checkpoints = run.config, run.checkpoints
    if not checkpoints:
        raise ValueError(f"{folder}: no checkpoint to analyse; {HINT}")
    examples = open_examples(run, samples)
    most = len(examples.images) // PAIRS_PER_GROUP
    number = max(2, min(config.prototypes.number or most, most))
    entries, previous = [], dict[str, Any]()
    progress = Progress(f"analyze {config.run.name}", len(checkpoints))
    for done, checkpoint in enumerate(checkpoints, 1):
        step = int(checkpoint.name.removeprefix("step-"))
        entry: dict[str, Any] = {"step": step, "samples": step * config.episodes.batch_size}
        encoder = load_encoder(checkpoint, device, workers=0, show=False)
        spaces = embed_examples(encoder, examples, project=config.uses_prototypes)
        for space, rows in spaces.items():
            entry[space], previous[space] = geometry.measure(
                rows["images"],
                rows["texts"],
                num_groups=number,
                captions=examples.captions,
                concepts=examples.groups,
                content=examples.images,
                classes=examples.classes,
                previous=previous.get(space),
                seed=config.run.seed,
            )
        prototypes = read_prototypes(checkpoint) if "projections" in spaces else {}
        for modality, centroids in prototypes.items():
            assignments, _ = nearest(spaces["projections"][f"{modality}s"], centroids)
            for name, size in geometry.group_sizes(assignments, len(centroids)).items():
                entry["projections"][f"prototypes/{name}/{modality}"] = size
        entries.append(entry)
        progress.update(done)
    return {
        "name": config.run.name,
        "seed": config.run.seed,
        "folder": str(folder),
        "data": examples.name,
        "pairs": len(examples.images),
        "digest": examples.digest,
        "skipped": examples.skipped,
        "notes": examples.notes,
        "groups": number,
        "checkpoints": entries,
    }


def table_of_groupings(analyses: Sequence[dict[str, Any]]) -> Table:
    """The measures of the last checkpoints: one row a measure, one column a run and space."""
    names = name_runs((one["name"], one["seed"], one["folder"]) for one in analyses)
    columns = {
        (label, f"{space}, step {last['step']}"): last[space]
        for analysis, (_, label) in zip(analyses, names, strict=True)
        for last in analysis["checkpoints"][-1:]
        for space in ("features", "projections")
        if space in last
    }
    rows = []
    for measure in sorted({key for values in columns.values() for key in values}):
        digits = ".4g" if measure.startswith(("groups/", "prototypes/")) else ".3f"
        values = [column.get(measure) for column in columns.values()]
        texts = ["" if value is None else format(value, digits) for value in values]
        rows.append(Row(heading=[measure], cells=[Cell(value=text) for text in texts]))
    return Table(
        title="Last checkpoint, held-out pairs", heading=["measure"], columns=[*columns], rows=rows
    )
