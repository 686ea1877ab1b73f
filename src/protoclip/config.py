"""The configuration: one tree of frozen dataclasses, standard library only.

A recipe (TOML) and `--section.name value` on the command line set these fields; their docstrings
are what `--help` shows. The defaults are a ProtoCLIP run on the bundled emoji.
"""

from dataclasses import dataclass, field
from typing import Literal

# What the small towers read unless told otherwise: pixels and tokens.
SMALL_IMAGE_SIZE, SMALL_CONTEXT_LENGTH = 40, 16
# Settings of `data` that the command line alone may switch on; no recipe, and no run folder's
# config.toml, holds them.
PERMISSIONS = ("allow_commands", "allow_private_hosts", "allow_links")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "protoclip"
    """What tables call this run; runs of one name and several seeds share a row."""
    out: str | None = None
    """Run folder, which must not exist yet. Unset: `runs/<name>-<seed>`, in lower case."""
    seed: int = 0
    """Determines weights, episodes, views and clusterings."""
    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of forward passes; `auto` is bf16 where the hardware computes it, else fp32."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_steps: int = 0
    """Steps between checkpoints, besides those at episodes' ends and in time; 0 for none."""
    save_minutes: float = 10.0
    """Minutes between checkpoints; 0 for none."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    keep_best: str | None = None
    """A metric of the evaluations during training (`run.evaluate_every`), such as
    `eval/emoji/knn/acc1`, by whose highest value a checkpoint is kept besides the newest;
    `results.json` names it."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Log to Weights & Biases too (`pip install wandb`)."""
    evaluate_every: int = 0
    """Episodes between evaluations on the validation split; 0 evaluates at the end only."""
    evaluate: bool = True
    """Evaluate on the test split when training is done."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a mixture. What it leaves unset is taken from `data`."""

    path: str
    """As `data.train`."""
    name: str | None = None
    """What messages and derived sample ids call it; from the path if unset."""
    weight: float | None = None
    """Relative share of the samples drawn. Unset for all: every sample counts the same."""
    image_column: str | None = None
    """As `data.image_column`."""
    caption_column: list[str] | str | None = None
    """As `data.caption_column`."""
    id_column: str | None = None
    """As `data.id_column`."""
    root: str | None = None
    """As `data.root`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str = "emoji"
    """`emoji` (bundled); a CSV, TSV or Parquet file; tar shards (path, glob, brace pattern, URL or
    `pipe:` command); or a folder of pictures with captions beside them."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sources with weights, in place of `data.train`."""
    image_column: str | None = None
    """Column of a table that holds paths, URLs or encoded bytes; detected if unset."""
    caption_column: list[str] | str | None = None
    """Column of a table that holds captions, or several; detected if unset."""
    id_column: str | None = None
    """Column of a table that names samples; detected if unset."""
    root: str | None = None
    """Folder or URL that a table's relative paths start from, and that all its paths have to lie
    below (`/` for anywhere); the table's own folder if unset."""
    read: Literal["auto", "indexed", "streaming"] = "auto"
    """How tar shards are read: in any order, or as a stream. `auto`: local ones are indexed."""
    shuffle_buffer: int = 4096
    """Samples that a stream shuffles among each other."""
    augmentation: Literal["light", "clip"] = "light"
    """Training transform: `light` (the paper's for ProtoCLIP) or `clip` (a crop and nothing else)."""
    workers: int = 0
    """Processes that decode pictures; 0 decodes in the training process. Changes no result."""
    cache: Literal["ram", "disk", "none"] = "ram"
    """Where to keep decoded pictures for the next pass; changes no result. `ram` needs
    `workers = 0`. Pictures take three bytes a pixel; JPEGs so large that they are decoded at a
    fraction of their size are not kept."""
    cache_gb: float = 4.0
    """Gigabytes that decoded pictures may take."""
    cache_folder: str | None = None
    """Folder of decoded pictures on disk, and of indexes; the user's cache folder if unset."""
    small_copies: bool = False
    """Take every crop, in training and extraction, from a copy of the picture with a shorter side
    of 256 pixels (10/7 of the input where that is more), cached or not. Less sharp, but large
    pictures load faster from a cache. Cannot change when a run goes on."""
    max_image_pixels: int = 178_956_970
    """Pictures with more pixels are skipped."""
    max_bad_share: float = 0.05
    """Share of samples that may be bad; with more the run stops."""
    allow_commands: bool = False
    """Run the commands of `pipe:` sources. On the command line alone, as are the next two: a recipe
    cannot allow itself anything."""
    allow_private_hosts: bool = False
    """Read from web servers on this machine and in private networks."""
    allow_links: bool = False
    """Follow symbolic links out of the folder that a table's paths have to lie below."""
    shuffle_captions: bool = False
    """Pair each picture with another's caption: the control that must learn nothing."""

    @property
    def has_held_out_splits(self) -> bool:
        """Whether there is something to evaluate on: with the bundled data alone."""
        return self.train == "emoji" and not self.sources


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    name: str = "resnet10t"
    """A timm model name."""
    size: int | None = None
    """Height and width of the input, in pixels; of a model named by `model.name` too. Unset: 40, or
    the named model's own size."""


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    context_length: int | None = None
    """Tokens a caption is cut to, start and end tokens included; of a model named by `model.name`
    too. Unset: 16, or the named model's own number."""
    width: int = 128
    """Width of the transformer."""
    heads: int = 2
    """Attention heads; they divide the width."""
    layers: int = 2
    """Transformer layers."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    hidden_dim: int = 1024
    """Width of the hidden layers."""
    hidden_layers: int = 1
    """Hidden layers, each Linear - BatchNorm - ReLU; 0 makes the head linear."""
    projection_dim: int = 128
    """Width of the projections that are clustered."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: str | None = None
    """An open_clip model name, such as `RN50`. Unset: the small towers described by `model.image`
    and `model.text`. Unset settings of `optim` depend on it."""
    pretrained: str | None = None
    """open_clip's published weights for `model.name`, by tag; downloaded by open_clip."""
    checkpoint: str | None = None
    """A run or checkpoint folder whose weights to start from; needs the same architecture."""
    embed_dim: int = 256
    """Joint width of image and text features, for towers that are described here."""
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    heads: HeadConfig = field(default_factory=HeadConfig)


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    size: int = 4096
    """Pairs in an episode."""
    count: int = 35
    """Episodes of the whole run."""
    batch_size: int = 256
    """Pairs in a step, of all processes together; divides the episode size."""
    micro_batch_size: int | None = None
    """Pairs that pass through the towers of a process at once, to save memory: gradients are those
    of the whole batch (GradCache), for a second forward pass. BatchNorm then sees these alone."""
    replacement: bool = True
    """Draw the pairs of an episode with replacement, as the paper does."""
    warm_up: int = 1
    """Episodes at the start with InfoNCE alone."""
    locked_image: int = 1
    """Episodes at the end with the image tower locked (LiT)."""


@dataclass(frozen=True, kw_only=True)
class PrototypeConfig:
    source: Literal["auto", "extract", "queue"] = "auto"
    """Where what is clustered comes from: `queue`, the projections that training made last, at no
    cost; `extract`, a pass over each episode before it is trained, as in the paper. `auto` is the
    queue where a teacher groups too, and else extraction, which is the better then."""
    extract_transform: Literal["evaluation", "training"] = "evaluation"
    """How extraction sees images: as evaluation does, each pair of an episode once, or through
    the training augmentation with draws of its own, as the reference does."""
    queue_size: int | None = None
    """Samples in the queue; `episodes.size` if unset."""
    number: int = 400
    """Prototypes per modality, at most the episode size."""
    init: Literal["k-means++", "random"] = "k-means++"
    """Where K-means starts: `spread` out over the data, or from `random` samples. The reference
    takes the best of 3 random starts, 20 iterations each; a spread one gets there in 6."""
    iterations: int = 6
    """K-means iterations."""
    restarts: int = 1
    """K-means starts, of which the best is kept."""
    back_translation: bool = True
    """Translate prototypes into the student's space (PBT)."""
    unit_norm: bool = False
    """Bring prototypes to unit norm, in K-means and in the student's space."""
    target_temperature: float = 0.01
    """Sharpness of the soft targets."""
    hard_targets: bool = False
    """One-hot targets in place of soft ones."""
    mask_empty: bool = True
    """Leave empty clusters out of the softmax; false restores the reference's behaviour, where an
    empty cluster is a class with logit 0."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    name: str = "teacher"
    """What metrics call it; several teachers have different names."""
    features: str | None = None
    """Features of an external teacher: a folder that `protoclip embed-teacher` wrote, a Parquet
    file with the columns `sample_id` and `features`, an `.npy` file with ids beside it, or `emoji`
    (bundled MiniLM features of the captions). Unset: no external teacher."""
    weight: float = 1.0
    """Weight among several teachers; `loss.teacher` multiplies it."""
    number: int = 400
    """Prototypes of the teacher's space."""
    target_temperature: float = 0.01
    """Sharpness of soft targets, where `hard_targets` is false."""
    hard_targets: bool = True
    """One-hot targets, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    info_nce: float = 1.0
    """Weight of InfoNCE."""
    prototypical: float = 1.0
    """Weight of the prototypical loss between image and text; 0 and no teacher is CLIP."""
    teacher: float = 1.0
    """Weight of the external teacher's prototypical loss."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    learning_rate: float | None = None
    """Peak learning rate. Unset: 2e-3 for the small towers; for a named model 5e-4 from a batch of
    512 on, and in proportion below."""
    image_lr_scale: float = 1.0
    """Factor to the image tower's learning rate."""
    text_lr_scale: float = 1.0
    """Factor to the text tower's learning rate."""
    heads_lr_scale: float = 0.01
    """Factor to the projection heads' learning rate. Slow heads leave grouping to the towers, and
    keep an episode's prototypes valid to its end."""
    warm_up_steps: int | None = None
    """Steps of linear warm-up; then half a cosine to 0 at the start of the locked stage. Unset: 50
    for the small towers; for a named model 2% of the run and at least 500,000 samples, but at most
    a tenth of the run."""
    locked_learning_rate: float | None = None
    """Peak learning rate of the locked-image stage, which has its own schedule. Unset: 2e-4 for the
    small towers, a tenth of the learning rate for a named model. 0: the first cosine goes on to the
    end of the run, as in the reference."""
    locked_warm_up_steps: int = 2
    """Steps of linear warm-up of the locked-image stage."""
    betas: tuple[float, float] | None = None
    """AdamW's moment decays. Unset: (0.9, 0.98), with a named convolutional image tower
    (0.9, 0.999)."""
    eps: float | None = None
    """AdamW's epsilon. Unset: 1e-6, with a named convolutional image tower 1e-8."""
    weight_decay: float | None = None
    """For matrices and filters; gains, biases and temperatures have none. Unset: 0.2, with a named
    convolutional image tower 0.1."""
    heads_weight_decay: float | None = None
    """The same for the projection heads. Unset: `weight_decay` for the small towers, 0 for a named
    model."""
    clip_norm: float = 10.0
    """Largest norm of the whole gradient."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How several processes, started by torchrun or srun, train together."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: a copy of the model in each process; `fsdp`: parameters, gradients and moments spread
    over the processes (FSDP2), for towers too large for one device."""
    activation_checkpointing: bool = False
    """Compute a tower's activations again in the backward pass, to save memory. For transformers:
    BatchNorm would count each batch twice. Counts with one process too."""
    sync_batch_norm: bool = False
    """BatchNorm of the towers over the batches of all processes; the heads' always is. Without,
    each process normalises by its own share of the batch."""
    compile: bool = False
    """Compile the towers (torch.compile): minutes at the start, then faster on most GPUs. Counts
    with one process too."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    prototypes: PrototypeConfig = field(default_factory=PrototypeConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: list[TeacherConfig] = field(default_factory=list)
    """Several external teachers, in place of `teacher`."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def uses_prototypes(self) -> bool:
        return self.loss.prototypical > 0 or self.uses_teacher

    @property
    def uses_teacher(self) -> bool:
        return bool(self.external_teachers)

    @property
    def prototype_source(self) -> Literal["extract", "queue"]:
        """`prototypes.source`, decided."""
        if self.prototypes.source != "auto":
            return self.prototypes.source
        return "queue" if self.uses_teacher else "extract"

    @property
    def external_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers that count, by name."""
        return {
            teacher.name: teacher
            for teacher in self.teachers or [self.teacher]
            if teacher.features is not None and teacher.weight * self.loss.teacher > 0
        }
