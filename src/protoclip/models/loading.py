"""From the configuration to devices, models and views, and from a run folder back to a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from protoclip.config import (
    SMALL_CONTEXT_LENGTH,
    SMALL_IMAGE_SIZE,
    Config,
    HeadConfig,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
)
from protoclip.data.transforms import (
    EvaluationTransform,
    TrainingTransform,
    clip_transform,
    light_transform,
)
from protoclip.distributed.collectives import (
    raise_on_all_ranks,
    rank,
    world_size,
)
from protoclip.distributed.parallel import shard, spread
from protoclip.files import file_checksum, read_json
from protoclip.models import batch_norm
from protoclip.models.heads import projection_head
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import (
    TokenCounter,
    Tokenizer,
    build_tokenizer,
    embedding_width,
    image_normalisation,
    image_size,
    named_towers,
    small_towers,
)

# Files of a checkpoint folder.
WEIGHTS, MODEL = "model.safetensors", "model.json"
OPTIMIZER, RESUME, STATE = "optimizer.safetensors", "resume.safetensors", "state.json"
CHECKSUMS = "checksums.json"


def model(config: ModelConfig, *, seed: int) -> ProtoCLIP:
    """The model with new weights, or with those of `config.checkpoint`.

    The weights are a function of the seed; the global random state is left as it was.

    Raises:
        ValueError: There is no such model, or the checkpoint is damaged or another model's.
    """
    folder = None if config.checkpoint is None else find_checkpoint(config.checkpoint)
    with (
        torch.random.fork_rng(devices=[]),
        nullcontext() if folder is None else verified(folder),
    ):
        # The CPU's generator alone, as `torch.manual_seed` would seed every GPU's too.
        torch.default_generator.manual_seed(seed)
        built = architecture(config, weights="published" if folder is None else "new")
    if folder is not None:
        built.load_state_dict(read_weights(folder, built))
    return built


def architecture(config: ModelConfig, *, weights: Literal["published", "new", "none"]) -> ProtoCLIP:
    """The model, drawn from torch's global generator; on the meta device if without weights."""
    with torch.device("meta") if weights == "none" else nullcontext():
        if config.name is not None:
            towers = named_towers(
                config.name,
                pretrained=config.pretrained,
                image_size=config.image.size,
                context_length=config.text.context_length,
                weights=weights,
            )
        else:
            towers = small_towers(
                embed_dim=config.embed_dim,
                image_model=config.image.name,
                image_size=config.image.size or SMALL_IMAGE_SIZE,
                context_length=config.text.context_length or SMALL_CONTEXT_LENGTH,
                text_width=config.text.width,
                text_heads=config.text.heads,
                text_layers=config.text.layers,
            )
        head = projection_head(
            embed_dim=embedding_width(config.name) if config.name else config.embed_dim,
            hidden_dim=config.heads.hidden_dim,
            hidden_layers=config.heads.hidden_layers,
            projection_dim=config.heads.projection_dim,
        )
        return ProtoCLIP(towers, head)


def training_model(config: Config, on: torch.device) -> tuple[ProtoCLIP, list[str]]:
    """The model that a run trains, on its device, as `[parallel]` asks for. All processes call it.

    Returns:
        The model, and what to say about it at the start.

    With FSDP the first process alone holds the whole model, on its CPU, until the others have their
    shards of it.

    Raises:
        ValueError: As `model` does, or the towers cannot do what is asked.
    """
    sharded = config.parallel.strategy == "fsdp" and world_size() > 1

    def build_own() -> tuple[ProtoCLIP, ProtoCLIP | None, list[str]]:
        if not sharded:
            built, whole = place(model(config.model, seed=config.run.seed), on), None
        else:
            whole = model(config.model, seed=config.run.seed) if rank() == 0 else None
            with torch.random.fork_rng(devices=[]):
                built = architecture(config.model, weights="none")
        return built, whole, parallelise(config, built)

    built, whole, notes = raise_on_all_ranks(build_own)
    if sharded:
        shard(built, on)
        spread(built, whole)
    return built, notes


def place(built: ProtoCLIP, on: torch.device) -> ProtoCLIP:
    """Move a model to a device, with filters in channels-last order, where convolutions are faster.

    The order of filters in memory changes speed and last digits, nothing else.
    """
    return built.to(on, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def parallelise(config: Config, built: ProtoCLIP) -> list[str]:
    """What `[parallel]` asks for in one process, in place; names of weights stay.

    Returns:
        What to say about it at the start.

    Raises:
        ValueError: The towers cannot do what is asked.
    """
    parallel, notes = config.parallel, []
    if world_size() > 1:
        for head in (built.image_head, built.text_head):
            batch_norm.synchronise(head)
        # Statistics of one process's own would be lost where its weights are part of a whole.
        if parallel.sync_batch_norm or parallel.strategy == "fsdp":
            number = batch_norm.synchronise(built.towers)
            setting = "sync_batch_norm" if parallel.sync_batch_norm else "strategy = fsdp"
            notes = [f"parallel.{setting}: {number or 'no'} BatchNorm layers synchronised"]
    if parallel.activation_checkpointing:
        try:
            built.towers.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                "parallel.activation_checkpointing: these towers cannot do it"
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
    return build_tokenizer(config.name, context_length=length)


def token_counter(config: ModelConfig) -> TokenCounter:
    return TokenCounter(config.name)


def context_length(config: ModelConfig) -> int:
    """Tokens that the model's captions are cut to."""
    return int(tokenizer(config)(["a"]).shape[1])


def evaluation_transform(built: ProtoCLIP) -> EvaluationTransform:
    mean, std = image_normalisation(built.towers)
    return EvaluationTransform(size=image_size(built.towers), mean=mean, std=std)


def training_transform(
    built: ProtoCLIP, augmentation: Literal["light", "clip"]
) -> TrainingTransform:
    mean, std = image_normalisation(built.towers)
    transform = light_transform if augmentation == "light" else clip_transform
    return transform(size=image_size(built.towers), mean=mean, std=std)


def load(path: str | Path) -> tuple[ProtoCLIP, EvaluationTransform, Tokenizer]:
    """A trained model, ready to use.

    Args:
        path: A run folder or a checkpoint folder.

    Returns:
        The model in evaluation mode on the CPU, the image transform (a PIL picture to
        `Float[3 h w]`) and the tokenizer (`list[str]` to `Int[b c]`).

    Raises:
        ValueError: No checkpoint there, or a damaged one.
    """
    folder = find_checkpoint(path)
    require_intact(folder, MODEL)
    config = model_config(read_json(folder / MODEL), folder)
    built = model(config, seed=0)
    return built.eval(), evaluation_transform(built), tokenizer(config)


def model_config(description: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The architecture a checkpoint was saved with, and the checkpoint for its weights."""
    try:
        sections = dict(description["model"])
        sections["image"] = ImageTowerConfig(**sections["image"])
        sections["text"] = TextTowerConfig(**sections["text"])
        sections["heads"] = HeadConfig(**sections["heads"])
        return ModelConfig(**{**sections, "checkpoint": str(folder)})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: model.json was written by another version of protoclip ({error})"
        ) from error


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with a checkpoint's files, or with some of them, or None."""
    expected: dict[str, str] = {}
    try:
        expected = dict(json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")))
        if names is None:
            # A checkpoint of an earlier format may be whole too; what goes on from it refuses it.
            names = sorted({WEIGHTS, MODEL, RESUME, STATE} | expected.keys())
        with ThreadPoolExecutor() as pool:  # hashing frees the interpreter
            found = list(pool.map(file_checksum, [folder / name for name in names]))
    except OSError as error:
        return f"{Path(error.filename or CHECKSUMS).name} cannot be read: {error.strerror}"
    except (ValueError, TypeError):
        return f"{CHECKSUMS} is damaged"
    for name, value in zip(names, found, strict=True):
        if expected.get(name) != value:
            return f"{name} is not what was written, by its checksum"
    return None


def require_intact(folder: Path, *names: str) -> None:
    """Check files of a checkpoint.

    Raises:
        ValueError: One is not as it was written; names it.
    """
    if (wrong := damage(folder, names)) is not None:
        raise ValueError(
            f"{folder}: damaged ({wrong}); copy the folder again from where it is whole, or take "
            "another checkpoint"
        )


@contextmanager
def verified(folder: Path) -> Iterator[None]:
    """Check a model's weights in a thread while the block does something else, then wait for it.

    Raises:
        ValueError: They are not as they were written.
    """
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(require_intact, folder, WEIGHTS)
        yield
        checked.result()


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    return sorted((run / "checkpoints").glob("step-*"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder meant by a run folder (its newest) or a checkpoint folder.

    Raises:
        ValueError: There is none.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such run or checkpoint folder")
    for candidate in (path, *reversed(checkpoints(path))):
        if (candidate / MODEL).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    raise ValueError(
        f"{path}: no checkpoint here; expected {MODEL} and {WEIGHTS}, or checkpoints/ with them"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises `ValueError` if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's weights, which are to be those of a model's architecture.

    Raises:
        ValueError: The file is damaged, or belongs to another architecture.
    """
    weights = read_tensors(folder / WEIGHTS)
    own = model.state_dict()
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    reshaped = [
        name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
    ]
    if missing or unknown or reshaped:
        example = sorted(missing | unknown | set(reshaped))[0]
        raise ValueError(
            f"{folder}: checkpoint of another architecture: {len(missing)} tensors missing, "
            f"{len(unknown)} unknown, {len(reshaped)} of another shape, such as {example}; "
            "make the [model] section match"
        )
    return weights
