"""Models: built from a configuration, or loaded from a run or another reference."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from protoclip.config import (
    SMALL_CONTEXT_LENGTH,
    Config,
    HeadConfig,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
)
from protoclip.data import transforms
from protoclip.data.transforms import EvaluationTransform, TrainingTransform
from protoclip.distributed.collectives import raise_on_all_ranks, rank, world_size
from protoclip.distributed.parallel import shard, spread
from protoclip.files import file_checksum, read_json
from protoclip.models import batch_norm, references, towers
from protoclip.models.heads import projection_head
from protoclip.models.protoclip import ProtoCLIP, TowerPair
from protoclip.models.references import Loaded, misfits
from protoclip.models.towers import Tokenizer

Pair = TypeVar("Pair", bound=TowerPair)

# Files of a checkpoint folder.
WEIGHTS, MODEL = "model.safetensors", "model.json"
OPTIMIZER, RESUME, STATE = "optimizer.safetensors", "resume.safetensors", "state.json"
CHECKSUMS = "checksums.json"


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
    kind, name = references.kind_of(str(reference))
    if kind in references.OPENERS:
        return references.OPENERS[kind](str(reference), name)
    if not Path(reference).exists():
        raise ValueError(
            f"{reference}: no such run or checkpoint folder; other models are written "
            "open_clip:NAME[/TAG], hf:NAME_OR_FOLDER, local-dir:FOLDER or reference:FILE,model=NAME"
        )
    folder = find_checkpoint(reference)
    require_intact(folder, MODEL)
    config = model_config(read_json(folder / MODEL), folder)
    loaded = model(config, seed=0)
    return loaded.eval(), evaluation_transform(loaded), tokenizer(config)


def model(config: ModelConfig, *, seed: int) -> ProtoCLIP:
    """The model with new weights, or with those of `config.checkpoint`.

    New weights depend on the seed alone; the global random state is not changed.

    Raises:
        ValueError: There is no such model, or the checkpoint is damaged or of another model.
    """
    if config.checkpoint is not None:
        folder = find_checkpoint(config.checkpoint)
        require_intact(folder, WEIGHTS)
    with torch.random.fork_rng(devices=[]):
        # Seed the CPU's generator only: `torch.manual_seed` would seed every GPU too.
        torch.default_generator.manual_seed(seed)
        if config.checkpoint is None:
            return architecture(config, weights="published")
        built = architecture(config, weights="new")
    built.load_state_dict(read_weights(folder, built))
    return built


def architecture(config: ModelConfig, *, weights: Literal["published", "new", "none"]) -> ProtoCLIP:
    """The model with weights from torch's global generator; with "none" on the meta device."""
    with torch.device("meta") if weights == "none" else nullcontext():
        if config.name is None:
            built, embed_dim = towers.small_towers(config), config.embed_dim
        else:
            embed_dim = int(towers.named_config(config.name)["embed_dim"])
            built = towers.named_towers(
                config.name,
                pretrained=config.pretrained,
                image_size=config.image.size,
                context_length=config.text.context_length,
                weights=weights,
            )
        model = ProtoCLIP(built, projection_head(embed_dim, config.heads))
        if has_logit_bias(config):
            model.add_logit_bias()
        return model


def has_logit_bias(config: ModelConfig) -> bool:
    """Whether the model has the bias of the sigmoid loss, by its name or its checkpoint."""
    if config.checkpoint is None:
        return config.name is not None and towers.has_logit_bias(config.name)
    path = find_checkpoint(config.checkpoint) / WEIGHTS
    try:
        with safe_open(path, "pt") as weights:
            return "towers.logit_bias" in weights.keys()  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def training_model(config: Config, device: torch.device) -> tuple[ProtoCLIP, list[str]]:
    """The model that a run trains, parallel as `[parallel]` says, and notes for the user.

    Collective. With FSDP only rank 0 holds the whole model, on its CPU, until every rank has its
    shard. The sigmoid loss gets the logit bias that it needs.
    """
    sigmoid = config.loss.instance == "sigmoid" and config.loss.info_nce > 0
    sharded = config.parallel.strategy == "fsdp" and world_size() > 1

    def build() -> tuple[ProtoCLIP, ProtoCLIP | None, list[str]]:
        whole = None if sharded and rank() else model(config.model, seed=config.run.seed)
        if sharded:
            with torch.random.fork_rng(devices=[]):
                built = architecture(config.model, weights="none")
        else:
            assert whole is not None
            built = to_device(whole, device)
        notes = []
        if sigmoid and not has_logit_bias(config.model):
            for made in filter(None, (whole, built)):
                made.add_logit_bias()
            notes = ["loss.instance = sigmoid: the logits start with scale 10 and bias -10"]
        return built, whole, notes + parallelise(config, built)

    built, whole, notes = raise_on_all_ranks(build)
    if sharded:
        shard(built, device)
        spread(built, whole)
    return built, notes


def to_device(built: Pair, device: torch.device) -> Pair:
    """Move a model to a device, in channels-last order, which makes convolutions faster."""
    return built.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def parallelise(config: Config, built: ProtoCLIP) -> list[str]:
    """Apply `[parallel]` to a model's layers, in place; returns notes for the user."""
    parallel, notes = config.parallel, []
    if world_size() > 1:
        for head in (built.image_head, built.text_head):
            batch_norm.synchronise(head)
        # FSDP saves one set of statistics, so ranks cannot keep their own.
        if parallel.sync_batch_norm or parallel.strategy == "fsdp":
            number = batch_norm.synchronise(built.towers)
            setting = "sync_batch_norm" if parallel.sync_batch_norm else "strategy = fsdp"
            notes = [f"parallel.{setting}: {number or 'no'} BatchNorm layers synchronised"]
    if parallel.activation_checkpointing:
        try:
            built.towers.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                "parallel.activation_checkpointing: these towers cannot do it; set it to false"
            ) from error
    if parallel.compile:
        for name, part in built.towers.named_children():
            if name in ("visual", "text", "transformer"):
                part.compile()
    return notes


def tokenizer(config: ModelConfig) -> Tokenizer:
    length = config.text.context_length
    if config.name is None and length is None:
        length = SMALL_CONTEXT_LENGTH
    return towers.build_tokenizer(config.name, context_length=length)


def context_length(config: ModelConfig) -> int:
    """Number of tokens that the model's captions are cut to."""
    return int(tokenizer(config)(["a"]).shape[1])


def image_input(built: ProtoCLIP) -> dict[str, Any]:
    mean, std = towers.image_normalisation(built.towers)
    return {"size": towers.image_size(built.towers), "mean": mean, "std": std}


def evaluation_transform(built: ProtoCLIP) -> EvaluationTransform:
    return EvaluationTransform(**image_input(built))


def training_transform(
    built: ProtoCLIP, augmentation: Literal["light", "clip"]
) -> TrainingTransform:
    given = {"light": transforms.light_transform, "clip": transforms.clip_transform}[augmentation]
    return given(**image_input(built))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; some may be damaged."""
    return sorted((run / "checkpoints").glob("step-*"))


def find_checkpoint(path: str | Path) -> Path:
    """The newest checkpoint of a run folder, or the checkpoint folder itself."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such run or checkpoint folder")
    for candidate in (path, *reversed(checkpoints(path))):
        if (candidate / MODEL).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    raise ValueError(f"{path}: no checkpoint here, which has {MODEL} and {WEIGHTS}")


def model_config(description: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The `[model]` section that a checkpoint was saved with, pointing to the checkpoint."""
    try:
        kinds = {"image": ImageTowerConfig, "text": TextTowerConfig, "heads": HeadConfig}
        sections = {name: kind(**description["model"][name]) for name, kind in kinds.items()}
        return ModelConfig(**{**description["model"], **sections, "checkpoint": str(folder)})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: model.json was written by another version of protoclip ({error})"
        ) from error


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, or with some of them; None if intact."""
    try:
        expected = dict(json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")))
        # Not OPTIMIZER: checkpoints of an earlier format are intact without it.
        for name in names or sorted({WEIGHTS, MODEL, RESUME, STATE} | expected.keys()):
            if file_checksum(folder / name) != expected.get(name):
                return f"{name} is not what was written: its checksum differs"
    except OSError as error:
        return f"{Path(error.filename or CHECKSUMS).name} cannot be read: {error.strerror}"
    except (ValueError, TypeError):
        return f"{CHECKSUMS} is damaged"
    return None


def require_intact(folder: Path, *names: str) -> None:
    """Raise a `ValueError` that names the first damaged file of these."""
    if (wrong := damage(folder, names)) is not None:
        raise ValueError(f"{folder}: damaged ({wrong}); copy it again, or use another checkpoint")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises `ValueError` if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's weights; raises `ValueError` if they are damaged or of another model."""
    weights = read_tensors(folder / WEIGHTS)
    if wrong := misfits(model, weights):
        raise ValueError(
            f"{folder}: checkpoint of another architecture: {len(wrong)} tensors are missing, "
            f"unknown or of another shape, such as {wrong[0]}; make the [model] section match"
        )
    return weights
