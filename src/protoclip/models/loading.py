"""Models that are made of a start: opened for use, or built for a run and made parallel.

The start is found in `start.py` or `resolve.py`, and checkpoints are read in `saved.py`.
"""

from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoclip.config import Config, ModelConfig
from protoclip.data import transforms
from protoclip.data.transforms import EvaluationTransform, TrainingTransform
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first, world_size
from protoclip.distributed.parallel import load_whole, shard
from protoclip.models import batch_norm, lora, text_models
from protoclip.models.open_clip import text_repository
from protoclip.models.opening import Loaded
from protoclip.models.precision import resolve
from protoclip.models.protoclip import ProtoCLIP, TowerPair, image_input, image_size
from protoclip.models.resolve import resolve_start
from protoclip.models.saved import checkpoints, find_checkpoint
from protoclip.models.start import Start, find_start
from protoclip.models.tokenizers import Tokenizer
from protoclip.progress import three_digits

Pair = TypeVar("Pair", bound=TowerPair)


def load(reference: str | Path) -> Loaded:
    """Load a model: one of ours, or one that others trained.

    Args:
        reference: A run or checkpoint folder; a folder in open_clip's or Hugging Face's format
            (for open_clip's also `local-dir:FOLDER`); `open_clip:NAME/TAG`, or `open_clip:NAME`
            for an untrained model; `hf:NAME_OR_FOLDER`; or a checkpoint of the paper's reference
            code, `reference:FILE,model=NAME`.

    Returns:
        The model in evaluation mode on the CPU, with `encode_image` and `encode_text`; a
        `ProtoCLIP` if it has projection heads. Its image transform (a PIL image, turned upright by
        its EXIF orientation, to `Float[3 h w]`). Its tokenizer (`list[str]` to `Int[b c]`).

    Raises:
        ValueError: There is no such model, it cannot be downloaded, or its files are damaged.
    """
    return find_start(str(reference)).open()


def pin_newest(reference: str) -> str:
    """Resolve a reference; a run becomes its newest checkpoint, as rank 0 sees it.

    A run that still trains may write another before the next rank looks. Collective.
    """

    def newest() -> str:
        is_run = Path(reference).is_dir() and checkpoints(Path(reference))
        return str(find_checkpoint(reference)) if is_run else reference

    return rank0_first(newest)


def require_model(reference: str) -> None:
    """Refuse what `load` cannot know as a model, in a moment: weights are not read."""
    find_start(reference).check()


def start_of(source: ModelConfig | Start) -> Start:
    """The start itself, or that of a `[model]` section, which is looked up then."""
    return source if isinstance(source, Start) else resolve_start(source)


def model(source: ModelConfig | Start, *, seed: int, notes: list[str] | None = None) -> ProtoCLIP:
    """The model of a start, with its weights, or with new ones where it has none.

    New weights depend on the seed alone; the global random state is not changed. Adds a note on
    what was interpolated because the settings have other sizes than the weights.

    Raises:
        ValueError: There is no such model, or its weights are damaged or of another model.
    """
    start = start_of(source)
    with torch.random.fork_rng(devices=[]):
        # Seed the CPU's generator only: `torch.manual_seed` would seed every GPU too.
        torch.default_generator.manual_seed(seed)
        built = start.build()
        resized = start.fill(built)
    if notes is not None:
        notes += resized
    return built


def tokenizer(source: ModelConfig | Start) -> Tokenizer:
    return start_of(source).tokenizer()


def context_length(source: ModelConfig | Start) -> int:
    """Number of tokens that the model's captions are cut to."""
    return int(tokenizer(source)(["a"]).shape[1])


def training_model(
    config: Config, device: torch.device, start: Start | None = None
) -> tuple[ProtoCLIP, list[str]]:
    """The model that a run trains, parallel as `[parallel]` says, and notes for the user.

    `start` is that of `config.model`, where it is known.

    Collective. With FSDP only rank 0 holds the whole model, on its CPU, until every rank has its
    shard. The sigmoid loss gets the logit bias that it needs.
    """
    start = start or resolve_start(config.model)
    sharded = config.parallel.strategy == "fsdp" and world_size() > 1

    def build() -> tuple[ProtoCLIP, ProtoCLIP | None, list[str]]:
        notes: list[str] = []
        whole = None
        if not sharded or rank() == 0:
            whole = model(start, seed=config.run.seed, notes=notes)
        if sharded:
            with torch.random.fork_rng(devices=[]):
                built = start.build(on_meta=True)
        else:
            assert whole is not None
            built = to_device(whole, device)
        if config.model.lora is not None:
            notes += lora.add_adapters(
                built,
                config.model.lora,
                tokens=tokenizer(start)(["a"]),
                locked=config.model.locked,
                new_projections=config.model.projections_are_new,
                seed=config.run.seed,
            )
        if gets_logit_bias(config, start):
            for made in filter(None, (whole, built)):
                made.add_logit_bias()
            notes.append("loss.instance = sigmoid: the logits start with scale 10 and bias -10")
        return built, whole, notes + parallelise(config, built, device)

    built, whole, notes = raise_on_all_ranks(build)
    if sharded:
        bf16 = device.type == "cuda" and resolve(config.run.precision, device) == "bf16"
        shard(built, device, gathered=torch.bfloat16 if bf16 else None)
        load_whole(built, whole)
    return built, notes


def gets_logit_bias(config: Config, start: Start) -> bool:
    """Whether training adds the bias of the sigmoid loss to a model that has none."""
    sigmoid = config.loss.instance == "sigmoid" and config.loss.info_nce > 0
    return sigmoid and not start.has_logit_bias


def frozen_start(config: Config, device: torch.device, start: Start) -> TowerPair:
    """The towers as they are before a run's first step, at the run's sizes, which stay so.

    In evaluation mode and without gradients. Every rank holds them whole.
    """
    pair = TowerPair(model(start, seed=config.run.seed).towers)
    return to_device(pair.eval().requires_grad_(False), device)


def to_device(built: Pair, device: torch.device) -> Pair:
    """Move a model to a device, in channels-last order, which makes convolutions faster."""
    return built.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def parallelise(config: Config, built: ProtoCLIP, device: torch.device) -> list[str]:
    """Apply `[parallel]` to the layers of a model that will be on a device, in place.

    Returns notes for the user.
    """
    parallel, notes = config.parallel, []
    if world_size() > 1:
        for head in (built.image_head, built.text_head):
            batch_norm.synchronise(head, device)
        # FSDP saves one set of statistics, so ranks cannot keep their own.
        if parallel.sync_batch_norm or parallel.strategy == "fsdp":
            number = batch_norm.synchronise(built.towers, device)
            setting = "sync_batch_norm" if parallel.sync_batch_norm else "strategy = fsdp"
            notes = [f"parallel.{setting}: {number or 'no'} BatchNorm layers synchronised"]
    else:
        idle = ["strategy"] if parallel.strategy == "fsdp" else []
        idle += ["sync_batch_norm"] if parallel.sync_batch_norm else []
        notes = [f"parallel.{name}: no effect, since there is one rank" for name in idle]
    if parallel.activation_checkpointing:
        recompute_activations(built.towers, config.model)
    if parallel.compile:
        for name, part in built.towers.named_children():
            if name in ("visual", "text", "transformer"):
                part.compile()
    return notes


def check_parallel(config: Config, start: Start) -> None:
    """Refuse what `[parallel]` asks of towers that cannot do it, before data and weights are read.

    Raises:
        ValueError: As `recompute_activations`.
    """
    if config.parallel.activation_checkpointing:
        recompute_activations(start.build(on_meta=True).towers, start.model)


def recompute_activations(towers: nn.Module, config: ModelConfig) -> None:
    """Make towers compute their activations again in the backward pass, to save memory.

    Raises:
        ValueError: They cannot, or the image tower's BatchNorm would count each batch twice.
    """
    setting, image = "parallel.activation_checkpointing", towers.get_submodule("visual")
    way_out = "set it to false, or choose a transformer"
    counts = any(isinstance(part, _BatchNorm) for part in image.modules())
    if "image" not in config.locked and counts and not config.frozen_batch_norm:
        raise ValueError(
            f"{setting}: the image tower has BatchNorm, which would count a batch twice; {way_out}"
        )
    try:
        towers.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, ValueError) as error:
        raise ValueError(f"{setting}: these towers cannot do it; {way_out}") from error
    # open_clip passes over image towers that cannot. Its towers, timm's and those of `transformers`
    # mark the parts that do.
    marks = ("grad_checkpointing", "gradient_checkpointing")
    does = any(getattr(part, mark, False) for part in image.modules() for mark in marks)
    if "image" not in config.locked and not does:
        raise ValueError(f"{setting}: this image tower cannot do it; {way_out}")


def describe_training(
    config: ModelConfig, built: ProtoCLIP, reads: Tokenizer, *, aligns: bool
) -> str:
    """What a run trains, at what size; and of small towers, how to get a larger model.

    A run that `aligns` trains what lies between two frozen encoders alone.
    """
    size, length = image_size(built.towers), reads(["a"]).shape[1]
    millions = sum(parameter.numel() for parameter in built.parameters()) / 1e6
    parameters = f"{three_digits(millions)} million parameters with the heads"
    sizes = f"{size} pixels and {length} tokens, {parameters}"
    name = config.start or config.name
    if name is not None:
        return f"trains {name}, at {sizes}"
    text = (
        config.text.name
        or f"a text transformer of {config.text.layers} layer{'s' * (config.text.layers > 1)}"
    )
    if aligns:
        return f"trains what lies between {config.image.name} and {text}, both frozen, at {sizes}"
    hint = ""
    if config.image.weights is None and config.text.name is None:
        hint = "; for a larger model name one, such as --model.name ViT-S-16 or RN50"
    return f"trains {config.image.name} and {text}, at {sizes}{hint}"


def evaluation_transform(built: ProtoCLIP) -> EvaluationTransform:
    return transforms.evaluation_transform(**image_input(built.towers), squash=built.squashes)


def training_transform(
    built: ProtoCLIP, augmentation: Literal["auto", "light", "clip"]
) -> TrainingTransform:
    """The transform of an augmentation that the plan has decided."""
    make = {"light": transforms.light_transform, "clip": transforms.clip_transform}[augmentation]
    return make(**image_input(built.towers))


def text_files(start: Start, built: ProtoCLIP, reads: Tokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face text tower and tokenizer that a checkpoint holds, by name."""
    config = start.open_clip_config
    if config is not None and text_repository(config) is None:
        return {}
    return text_models.text_files(built.towers, reads)
