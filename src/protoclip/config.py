"""The settings of a run: a tree of frozen dataclasses, each with its limits. Standard library only.

The comment behind a setting is its help text, which `--help` without `all` shows behind `#:`; a
number's annotation holds its limits. Recipes, the command line and Python all pass through `build`,
so that a mistake has one message everywhere. The defaults train ProtoCLIP on the bundled emoji.
"""

import dataclasses
import datetime
import difflib
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

LONGEST_SHOWN = 80  # characters of a wrong value in a message
SIMPLE = (str, NoneType, int, float, datetime.date, datetime.time)
START = "start"  # `teacher.features` of the frozen start
# ... and of the encoders that `align` joins, as 1.0 called them in run folders.
ENCODERS = {"image_half": "image-half", "text_half": "text-half"}
NO_PATHS = ("emoji", START, *ENCODERS.values())  # where a file may be named
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")  # ... and module:Class
# Image sizes in pixels and caption lengths in tokens that small towers get by themselves.
SMALL_IMAGE_SIZES, SMALL_CONTEXT_LENGTHS = (40, 64), (16, 32, 64)
NO_COMMANDS = "pipe: sources are gone; name shards by s3://, gs://, hf:// or https://, or copy them"
# Settings, and values of settings, that are gone: what to do instead, and the value that changed
# nothing. Run folders hold that value, so it is ignored.
REMOVED: dict[str, tuple[str, Any]] = {
    "run.wandb": ("is gone; name wandb in run.loggers, and set WANDB_MODE=offline", "off"),
    "data.allow_commands": (NO_COMMANDS, False),
    "data.cache": ("is gone; data.cache_gb = 0 keeps no decoded images", "ram"),
    "model.projection": ("is gone; the projections of two encoders are linear", "linear"),
    "episodes.apart": ("is gone; loss.positives = shared makes equal captions positives", False),
    "loss.positives = masked": ("is gone; choose shared, which measures the same", None),
    "loss.positives = class": ("is gone; choose shared, for equal images and captions", None),
    "loss.keep_by": ("is gone; loss.keep keeps the relations of the start", "relations"),
    "loss.distil_by": ("is gone; teacher.distil teaches relations", "relations"),
    "optim.text_lr_scale": ("is gone; lower optim.learning_rate, or raise image_lr_scale", 1.0),
    "align.head": ("is gone; heads are linear", "auto"),
    "align.init": ("is gone; heads start in closed form", "cca"),
    "align.views": ("is gone; each image is encoded once", 1),
    "run.patience": (
        "is gone; run.stop_by waits for three evaluations, which run.evaluate_every spaces",
        3,
    ),
    "data.max_image_pixels": ("is gone; shrink images of more than 178,956,970", 178_956_970),
    "teacher.hard_targets": ("is gone; targets of a teacher are hard, as in the paper", True),
    "teacher.target_temperature": ("is gone; targets of a teacher are hard", 0.01),
}
# What other programs call settings, as they are called here.
ELSEWHERE = {
    "lr": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "bs": "episodes.batch_size",
    "batch_size": "episodes.batch_size",
    "epochs": "episodes.count",
    "train": "data",  # of commands that take one source
}

# The least positive float that is not denormal: denormal numbers are flushed to 0.
ABOVE_0 = sys.float_info.min
BELOW_1 = math.nextafter(1.0, 0.0)
# Upper limits catch slips of the finger: no data and no machine of today needs as much.
Seed = Annotated[int, 0, 2**63 - 1]  # what both torch and NumPy take
Count = Annotated[int, 1, 2**31 - 1]
CountOrZero = Annotated[int, 0, 2**31 - 1]
BatchSize = Annotated[int, 2, 2**31 - 1]
ImageSize = Annotated[int, 2, 2**13]
ContextLength = Annotated[int, 3, 2**12]
Layers = Annotated[int, 1, 1000]
Width = Annotated[int, 1, 2**16]
Rank = Annotated[int, 1, 2**12]
Positive = Annotated[float, ABOVE_0, math.inf]
NotNegative = Annotated[float, 0, math.inf]
Decay = Annotated[float, 0, BELOW_1]
Share = Annotated[float, 0, BELOW_1]
LayerDecay = Annotated[float, ABOVE_0, 1]
Captions = Annotated[int, 1, 1000] | Literal["one", "all", "sentences"]
Positives = Literal["pair", "shared"]
# A setting of a tower has a value for each of the encoders that the tower joins, or one for all. A
# list is read as one text, since most towers are of one encoder. Choices may follow the mark.
SEVERAL = " & "
Each = Annotated[str, SEVERAL]
EachImagePooling = Annotated[str, SEVERAL, "own", "avg"]
EachTextPooling = Annotated[str, SEVERAL, "mean", "cls", "last"]
EngineName = Literal["auto", "torch", "onnx", "openvino"]
# `Open` settings are unset (None) until a run's plan fills them (training/plan.py). What comes
# after the plan finds a value in each, so that is what mypy sees, for which `MYPY` is true.
UNSET: Any = None
MYPY = False
Setting = TypeVar("Setting")
if MYPY:  # noqa: SIM108 (mypy knows aliases in this form alone)
    Open = Annotated[Setting, UNSET]
else:
    Open = Setting | None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "protoclip"  #: Runs with the same name share a table row.
    out: str | None = None  #: Folder of the run; else runs/NAME-SEED.
    sync: str | None = None  # Copy the run to a store: s3://bucket/folder.
    seed: Seed = 0  #: Seed of weights, episodes and clusterings.
    device: str = "auto"  #: auto, cpu, cuda, cuda:1 or mps.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  #: auto is bf16 if supported.
    log_every: Count = 10  # Steps between lines of metrics.jsonl.
    save_steps: CountOrZero = 0  # Steps between checkpoints; 0: see save_minutes.
    save_minutes: NotNegative = 10.0  # Minutes between them; 0: after each episode.
    keep_checkpoints: Count = 2  # Newest checkpoints to keep.
    keep_best: str | None = None  # Keep the best by a metric: eval/emoji/knn/acc1.
    loggers: tuple[str, ...] = ("tensorboard",)  # ... wandb mlflow trackio.
    evaluate_every: CountOrZero = 0  # Episodes between validations; 0 for none.
    guard: list[str] = field(default_factory=list)  # Other data to evaluate during the run.
    stop_by: str | None = None  # Stop early by a metric: eval/emoji/zero_shot/acc1.
    evaluate: bool = True  # Evaluate on the test split at the end.
    overfit: BatchSize | None = None  # Overfit this many pairs, as a sanity check.


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture. What it leaves unset comes from `data`."""

    path: str  # As data.train.
    name: str | None = None  # Name in messages and in sample ids; else from the path.
    weight: Positive | None = None  # Relative share of samples; else by size.
    image_column: str | None = None  # As data.image_column.
    caption_column: list[str] | str | None = None  # As data.caption_column.
    id_column: str | None = None  # As data.id_column.
    class_column: str | None = None  # As data.class_column.
    root: str | None = None  # As data.root.


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str = "emoji"  #: Table, hf:OWNER/NAME, shards or folder.
    sources: list[SourceConfig] = field(default_factory=list)  # A mixture, instead of data.train.
    validation: Share | str | None = None  #: Held-out pairs: a share or a source; else 2%.
    images: str | None = None  # Images without captions, for align of few pairs.
    texts: str | None = None  # Captions without images: a text file or table.
    image_column: str | None = None  #: Column of paths or bytes; else detected.
    caption_column: list[str] | str | None = None  #: Column(s) of captions (A B); else detected.
    id_column: str | None = None  # Column of sample ids; '' for none.
    class_column: str | None = None  # Column of classes, which evaluation uses.
    captions: Captions = "one"  # Captions per draw of an image: one, all, 5 ...
    root: str | None = None  # Folder that holds all images of a table.
    only: str | None = None  # CSV or JSON file: use the samples with these ids.
    without: str | None = None  # CSV or JSON file: leave these ids out.
    read: Literal["auto", "streaming"] = "auto"  # auto: local shards are indexed.
    shuffle_buffer: Count = 4096  # Samples that a stream shuffles at a time.
    augmentation: Literal["auto", "light", "clip"] = "auto"  # clip: crops only; auto: by size.
    workers: Annotated[int, 0, 4096] | Literal["auto"] = "auto"  # Processes that decode images.
    cache_gb: Annotated[float, 0, 1e6] = 4.0  # Gigabytes of decoded images to keep; 0: none.
    max_bad_share: Annotated[float, 0, 1] = 0.05  # Share of bad samples that ends a run.
    allow_links: bool = False  # Follow links out of --root; not in recipes.

    needs_captions = True  # no setting: `ImagesConfig` needs none

    @property
    def needs_caption_column(self) -> bool:
        """Whether a table without captions is refused; classes may stand for them."""
        return self.needs_captions and not self.class_column

    @property
    def several_captions(self) -> bool:
        """Whether one visit to an image may bring several captions."""
        return self.captions not in ("one", "sentences", 1)

    @property
    def is_emoji(self) -> bool:
        """Whether this is the bundled data, which has held-out splits of its own."""
        return self.train == "emoji" and not self.sources

    @property
    def threads(self) -> int | None:
        """How many threads read images that are encoded; None for one a core."""
        return None if self.workers == "auto" else self.workers


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(DataConfig):
    """Data whose images count without captions too, as `embed` reads them."""

    needs_captions = False


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    name: Each = "resnet10t"  #: timm models.
    weights: Each | None = None  #: timm's published weights, or a file.
    pooling: EachImagePooling | None = None  # Pooling of pixels; else as its weights need.
    joined_layers: Each | None = None  # Layers to join: last+6, auto or plain.
    size: ImageSize | None = None  # Input pixels; else from the data or the weights.
    channels: Annotated[int, 1, 1000] = 3  # Image bands; else the start's.


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    name: Each | None = None  #: Hugging Face text models; else small.
    pooling: EachTextPooling | None = None  # Pooling of tokens; else as its files say.
    joined_layers: Each | None = None  # Layers to join: last+8, auto or plain.
    context_length: ContextLength | None = None  # Tokens; else from the data or the weights.
    width: Width = 128  # Width of the transformer.
    heads: Width = 2  # Attention heads; must divide the width.
    layers: Layers = 2  # Transformer layers.


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    hidden_dim: Width = 1024  # Width of the hidden layers.
    hidden_layers: Annotated[int, 0, 1000] = 1  # Hidden layers; 0 makes the head linear.
    projection_dim: Width = 128  # Width of the projections to cluster.


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str | None = None  #: An open_clip model such as RN50; else small towers.
    pretrained: str | None = None  #: Tag of open_clip's weights for model.name.
    start: str | None = None  #: Run, or other model, to start from.
    locked: list[Literal["image", "text"]] = field(default_factory=list)  # Towers to freeze.
    lora: Rank | None = None  # Train LoRA adapters of this rank; freeze towers.
    frozen_batch_norm: bool = False  # Freeze the towers' BatchNorm statistics.
    embed_dim: Annotated[int, 2, 2**16] = 256  # Joint feature width of the small towers.
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    heads: HeadConfig = field(default_factory=HeadConfig)

    # Not a setting. The projections of two encoders into the joint space, as open_clip calls them.
    projection = "linear"

    @property
    def has_start(self) -> bool:
        """Whether it begins with weights that were trained: `start`, or a name and its tag."""
        return self.start is not None or self.pretrained is not None

    @property
    def projections_are_new(self) -> bool:
        """Whether the towers' projections into the joint space are new, as between two encoders."""
        return self.start is None and self.name is None

    @property
    def joins_encoders(self) -> bool:
        """Whether two pretrained encoders are the towers, here or in the start."""
        return self.name is None and self.text.name is not None


@dataclass(frozen=True, kw_only=True)
class HiddenLayerConfig(ModelConfig):
    """A model of a run of 1.0, whose projections may have a hidden layer."""

    projection = "mlp"


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    size: Open[Count] = UNSET  # Pairs in an episode; else from the data.
    count: Open[Count] = UNSET  #: Sets the time; else by the data.
    batch_size: BatchSize = 256  #: Pairs in a step, of all ranks together.
    micro_batch_size: BatchSize | None = None  # Pairs in the towers at once.
    replacement: bool = True  # Draw pairs with replacement.
    warm_up: CountOrZero = 1  # First episodes, which use InfoNCE alone.
    locked_image: CountOrZero = 1  # Last episodes, which lock the image tower.


@dataclass(frozen=True, kw_only=True)
class PrototypeConfig:
    source: Literal["auto", "extract", "queue"] = "auto"  # Features to cluster.
    extract_transform: Literal["evaluation", "training"] = "evaluation"  # How extraction crops.
    number: Open[Count] = UNSET  # Prototypes per modality; else a tenth.
    init: Literal["k-means++", "random"] = "k-means++"  # Where K-means starts.
    iterations: Count = 6  # K-means iterations.
    restarts: Count = 1  # K-means runs; the best is kept.
    back_translation: bool = True  # Use PBT, as the paper does.
    target_temperature: Positive = 0.01  # Temperature of the soft targets.
    hard_targets: bool = False  # One-hot targets instead of soft ones.
    mask_empty: bool = True  # Leave empty clusters out of the softmax.


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    name: str = "teacher"  # Name in metrics.
    features: str | None = None  #: A model (minilm, timm:NAME), folder, file, emoji or start.
    number: Open[Count] = UNSET  # Prototypes of its space; else a tenth.
    whiten: CountOrZero = 64  # Whiten wider features to this width; 0: off.
    distil: Open[NotNegative] = UNSET  # Weight of its features; train: 1.
    tower: Literal["image", "text"] | None = None  # Tower that learns it; else its modality's.


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    instance: Literal["auto", "info_nce", "sigmoid"] = "auto"  # auto: sigmoid for SigLIP models.
    info_nce: NotNegative = 1.0  # Weight of the instance loss: InfoNCE or sigmoid.
    positives: Open[Positives] = UNSET  # What equal pairs count as; else pair.
    prototypical: NotNegative = 0.25  #: Weight of the prototypical loss; 0 is CLIP.
    teacher: NotNegative = 0.5  # Weight of each external teacher's loss.
    strengths: Literal["automatic", "constant"] = "automatic"  # constant: weights unchanged.
    keep: NotNegative = 0.0  # Weight of distillation from the start.


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    learning_rate: Open[Positive] = UNSET  #: Peak rate; else from the model.
    image_lr_scale: Positive = 1.0  # Factor of the image tower's rate.
    heads_lr_scale: Open[Positive] = UNSET  # Factor for the heads; else from the model.
    layer_decay: LayerDecay = 1.0  # Factor of the rate per layer downwards.
    warm_up_steps: Open[CountOrZero] = UNSET  # Linear warm-up; else from the model.
    locked_learning_rate: Open[NotNegative] = UNSET  # Peak of the locked stage; 0: one cosine.
    betas: Open[tuple[Decay, Decay]] = UNSET  # For AdamW; else from the model.
    eps: Open[Positive] = UNSET  # For AdamW; else from the model.
    weight_decay: Open[NotNegative] = UNSET  # For matrices; else from the model.
    heads_weight_decay: Open[NotNegative] = UNSET  # For the heads; else from the model.
    clip_norm: Positive = 10.0  # Clip the whole gradient to this norm.


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    features: str | None = None  # Folder of the encoders' features; else in the cache.
    dropout: Share = 0.2  # Share of an encoder's features dropped in a step.
    geometry: NotNegative = 0.0  # Weight of preserving encoders' neighbourhoods.


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    engine: EngineName = "auto"  # Encoder on a CPU; auto: fastest.


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    strategy: Literal["ddp", "fsdp"] = "ddp"  # fsdp shards the model (FSDP2).
    activation_checkpointing: bool = False  # Less memory; not with BatchNorm.
    sync_batch_norm: bool = False  # BatchNorm over all ranks.
    compile: bool = False  # torch.compile: minutes at the start.


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    prototypes: PrototypeConfig = field(default_factory=PrototypeConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: list[TeacherConfig] = field(default_factory=list)  # Several, instead of teacher.
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @classmethod
    def from_dict(cls, tree: "Settings") -> "Config":
        """A configuration from nested dicts of settings.

        Raises:
            ValueError: Naming a setting that does not exist or has a value that it cannot take.
        """
        return build(cls, tree_of(tree))

    @property
    def uses_prototypes(self) -> bool:
        return self.loss.prototypical > 0 or bool(self.grouping_teachers)

    @property
    def sets_strengths(self) -> bool:
        """Whether the strengths of the prototypical losses set themselves, relative to InfoNCE."""
        return (
            self.uses_prototypes and self.loss.strengths == "automatic" and self.loss.info_nce > 0
        )

    @property
    def groups_modalities(self) -> bool:
        """Whether images and texts are clustered: to learn from, or to measure what a teacher's
        groups have in common with them."""
        return self.loss.prototypical > 0 or self.sets_strengths

    @property
    def prototype_numbers(self) -> dict[str, Any]:
        """How many prototypes a space that is clustered has, by section or teacher."""
        numbers = {"prototypes": self.prototypes.number} if self.groups_modalities else {}
        return numbers | {name: teacher.number for name, teacher in self.grouping_teachers.items()}

    @property
    def locked_episodes(self) -> int:
        """`episodes.locked_image`, or 0 where that stage would train no tower."""
        model = self.model
        # The text projection of encoders is new, and trains in spite of the lock.
        trains = "text" not in model.locked or (
            model.projections_are_new and model.text.name is not None
        )
        return self.episodes.locked_image if trains else 0

    @property
    def uses_start(self) -> bool:
        """Whether a frozen copy of the start is needed: to keep its features, or as a teacher."""
        return self.loss.keep > 0 or START in {t.features for t in self.external_teachers.values()}

    @property
    def prototype_source(self) -> Literal["extract", "queue"]:
        """The features to cluster: `prototypes.source`, or what `auto` means in this run.

        `auto` means queue with a teacher that groups, else extract, as in the paper.
        """
        if self.prototypes.source != "auto":
            return self.prototypes.source
        return "queue" if self.grouping_teachers else "extract"

    @property
    def external_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers that have features, by name, if a loss of theirs has a weight.

        `run.overfit` takes none.
        """
        if self.run.overfit is not None:
            return {}
        return {
            teacher.name: teacher
            for teacher in self.teachers or [self.teacher]
            if teacher.features is not None and (self.loss.teacher > 0 or teacher.distil)
        }

    @property
    def grouping_teachers(self) -> dict[str, TeacherConfig]:
        """Those of them that group the samples."""
        return self.external_teachers if self.loss.teacher > 0 else {}

    @property
    def distilled_teachers(self) -> dict[str, TeacherConfig]:
        """Those of them whose features a tower learns."""
        return {name: x for name, x in self.external_teachers.items() if x.distil}

    @property
    def uses_of_teachers(self) -> str:
        """The external teachers, and what is learned of each: `minilm (groups and relations)`."""
        uses = {"groups": self.grouping_teachers, "relations": self.distilled_teachers}
        return ", ".join(
            f"{name} ({' and '.join(use for use, names in uses.items() if name in names)})"
            for name in self.external_teachers
        )


# What `align` and `finetune` choose for settings that are not given, where `train` does otherwise:
# first what depends on nothing else.
ALIGN: Mapping[str, Any] = {
    "run.name": "aligned",
    "model.embed_dim": 512,
    "episodes.locked_image": 0,
    "loss.prototypical": 0.0,  # docs/LOG.md: no prototypes helped here
    "optim.learning_rate": 1e-3,
    "optim.weight_decay": 0.1,
    "optim.betas": (0.9, 0.98),
}
FINETUNE: Mapping[str, Any] = {
    "run.name": "finetuned",
    "model.frozen_batch_norm": True,
    "episodes.locked_image": 0,
    "optim.weight_decay": 0.1,
}
# What the help says of settings that follow from the data or from others.
ALIGN_HELP: Mapping[str, Any] = {
    "loss.teacher": 0.0,
    "episodes.count": "30 passes",
    "episodes.batch_size": "<= 1024",
    "episodes.replacement": False,
    "optim.learning_rate": "3e-4 or 1e-3",
}
FINETUNE_HELP: Mapping[str, Any] = {
    "run.evaluate_every": 1,
    "episodes.count": "5 image passes",
    "episodes.batch_size": "<= 512",
    "episodes.replacement": False,
    "episodes.warm_up": 0,
    "optim.learning_rate": "1e-5 or 1e-3",
    "optim.layer_decay": 0.7,
    "teacher.whiten": 0,
    "loss.prototypical": 1.0,
    "loss.teacher": 1.0,
    "loss.strengths": "constant",
}
# All that a command may choose. A run that goes on keeps what it chose.
CHOSEN: Mapping[str, tuple[str, ...]] = {
    "train": (),
    "align": (
        *(*ALIGN, *ALIGN_HELP, "episodes.size", "episodes.warm_up", "optim.warm_up_steps"),
        *("optim.heads_weight_decay", "optim.heads_lr_scale"),
    ),
    "finetune": (
        *(*FINETUNE, *FINETUNE_HELP, "teacher.features", "episodes.size"),
        *("optim.warm_up_steps", "optim.heads_lr_scale"),
    ),
}

Settings = Config | Mapping[str, Any]  # of a run: built, or as a recipe holds them
Section = TypeVar("Section")
WANTED = {
    int: "no whole number",
    float: "no number",
    str: "no text",
    bool: "neither true nor false",
}


def tree_of(settings: Any) -> Mapping[str, Any]:
    """The sections by name of the settings that `train`, `align` and `finetune` take."""
    if isinstance(settings, Config):
        return vars(settings)
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"settings: {shown(to_plain(settings))} is no Config and no dictionary; give "
            '{"data": {"train": "pairs.csv"}}, or what tomllib reads of a recipe'
        )
    return settings


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a section's settings, which take Python some time to read."""
    return get_type_hints(kind, include_extras=True)


def build(kind: type[Section], tree: Mapping[str, Any], prefix: str = "") -> Section:
    """A section, such as `Config`, from a tree of values as TOML gives them.

    Raises `ValueError` if a setting is unknown, missing, of the wrong type or out of range.
    """
    hints, given = hints_of(kind), {}  # type: ignore[arg-type] # classes can be hashed
    for name, value in tree.items():
        _, idle = REMOVED.get(without_number(f"{prefix}{name}"), ("", None))
        if name in hints:
            given[name] = value
        elif value is None or value != idle:
            raise ValueError(describe_unknown(f"{prefix}{name}", [prefix + x for x in hints]))
    settings = dataclasses.fields(kind)  # type: ignore[arg-type]
    for entry in sorted(settings, key=lambda entry: bool(entry.kw_only)):  # arguments first
        if entry.default is entry.default_factory is MISSING and entry.name not in given:
            raise ValueError(f"{prefix}{entry.name}: is missing; give one")
    values = {name: read_value(prefix + name, x, hints[name]) for name, x in given.items()}
    return kind(**values)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested settings by dotted name."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        values |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return values


def without_removed(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a run folder without those that are gone, whatever their value was."""
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        name = without_number(f"{prefix}{key}")
        if isinstance(value, Mapping):
            settings[key] = without_removed(value, f"{name}.")
        elif name not in REMOVED and f"{name} = {value}" not in REMOVED:
            settings[key] = value
    return settings


def without_number(name: str) -> str:
    """`teachers[0].number` as `teacher.number`."""
    return re.sub(r"s\[\d+\]", "", name)


def describe_unknown(name: str, names: list[str]) -> str:
    """What to say about a setting that does not exist."""
    for setting in (without_number(name), f"data.{name}"):  # `data` is left out by some commands
        if setting in REMOVED:
            return f"{name}: {REMOVED[setting][0]}"
    meant = ELSEWHERE.get(name.rpartition(".")[2], name)
    of_section = [setting for setting in names if setting.startswith(f"{name}.")]  # its main first
    close = of_section or difflib.get_close_matches(meant, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "--help lists all"
    return f"{name}: no such setting; {hint}"


def read_value(name: str, value: Any, hint: Any) -> Any:
    """A setting's value; raises `ValueError` if it does not fit the annotation."""
    value, origin, inner = to_plain(value), get_origin(hint), get_args(hint)
    if is_each(hint) and origin is Annotated:
        values = value.split(SEVERAL) if isinstance(value, str) else value
        kind = Literal[inner[2:]] if inner[2:] else inner[0]
        values = values if isinstance(values, list | tuple) else [value]
        return SEVERAL.join(read_value(name, one, kind) for one in values)
    if origin is Annotated:
        return check_limits(name, read_value(name, value, inner[0]), *inner[1:])
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        errors = []
        for kind in (kind for kind in inner if kind is not NoneType):
            try:
                return read_value(name, value, kind)
            except ValueError as error:
                errors.append(error)
        raise errors[-1 if isinstance(value, str) else 0]  # words, and text, come last
    if origin is Literal:
        if isinstance(value, str) and value in inner:  # an array has no one answer
            return value
        if (removed := f"{name} = {value}") in REMOVED:
            raise ValueError(f"{name}: {shown(value)} {REMOVED[removed][0]}")
        raise ValueError(f"{name}: {shown(value)} is not one of {', '.join(inner)}")
    if origin in (list, tuple):
        fixed = origin is tuple and inner[-1] is not Ellipsis
        if not isinstance(value, list | tuple) or (fixed and len(value) != len(inner)):
            count = f"{len(inner)} values" if fixed else "a list"
            raise ValueError(f"{name}: {shown(value)} is not {count}")
        return origin(read_value(f"{name}[{i}]", item, inner[0]) for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        tree = vars(value) if isinstance(value, hint) else value  # type: ignore[arg-type]
        if hint is TeacherConfig and isinstance(value, str):  # its features alone
            last = re.split("[:/]", value.rstrip("/"))[-1]
            tree = {"name": last.split(".")[0], "features": value}
        if not isinstance(tree, Mapping):
            raise ValueError(f"{name}: {shown(value)} is no section; give its settings by name")
        return build(hint, tree, f"{name}.")  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise ValueError(f"{name}: {shown(value)} is {WANTED[hint]}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name}: {value} is not finite")
    return value


def is_each(hint: Any) -> bool:
    """Whether a setting has a value for each encoder of a tower."""
    return any(SEVERAL in get_args(kind)[1:] for kind in (hint, *get_args(hint)))


def check_limits(name: str, value: Any, least: int | float, most: int | float) -> Any:
    """A number, if it is from `least` to `most`; raises `ValueError` if not."""
    if value < least == ABOVE_0:
        raise ValueError(f"{name}: {value} needs to be above 0")
    if value < least:
        raise ValueError(f"{name}: {value} is too small; at least {least}")
    if value > most:
        limit = "below 1" if most == BELOW_1 else f"at most {most}"
        raise ValueError(f"{name}: {value} is too large; {limit}")
    return value


def to_plain(value: Any) -> Any:
    """A value as TOML would hold it: paths as text, and NumPy's numbers as those of Python."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_number = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_number else value


def shown(value: Any) -> str:
    """A value as a recipe would hold it, on one line, for messages; of others their type."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        text = f"[{', '.join(map(shown, value))}]"
    elif isinstance(value, Mapping):
        text = f"{{{', '.join(f'{key} = {shown(item)}' for key, item in value.items())}}}"
    elif isinstance(value, SIMPLE):
        text = repr(value) if isinstance(value, str) else str(value)
    else:
        text = type(value).__name__
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
