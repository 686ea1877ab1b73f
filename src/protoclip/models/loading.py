"""Models: built from a configuration, or loaded from a run or another reference."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import protoclip
from protoclip.config import (
    Config,
    ModelConfig,
    build,
)
from protoclip.data import transforms
from protoclip.data.tables import line
from protoclip.data.transforms import EvaluationTransform, TrainingTransform
from protoclip.distributed.collectives import raise_on_all_ranks, rank, world_size
from protoclip.distributed.parallel import shard, spread
from protoclip.files import file_checksum, read_json, read_local, require_regular
from protoclip.models import (
    batch_norm,
    conversion,
    halves,
    hugging_face,
    lora,
    references,
    start,
    towers,
)
from protoclip.models.heads import projection_head
from protoclip.models.protoclip import ProtoCLIP, TowerPair
from protoclip.models.references import Loaded, misfits
from protoclip.models.towers import Tokenizer
from protoclip.paths import MODEL_HINT

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
    config = run_config(str(reference))
    loaded = model(config, seed=0)
    with buildable(config):
        return loaded.eval(), evaluation_transform(loaded), tokenizer(config)


def check(reference: str) -> None:
    """Refuse what `load` cannot know as a model, in a moment: weights are not read."""
    kind, name = references.kind_of(reference)
    if kind in references.CHECKS:
        references.CHECKS[kind](reference, name)
    else:
        run_config(reference)


def run_config(reference: str) -> ModelConfig:
    """As `saved_config`, with a hint for what may be meant as another model."""
    if not Path(reference).exists():
        raise ValueError(f"{reference}: no such run or checkpoint folder; {MODEL_HINT}")
    return saved_config(reference)


@contextmanager
def buildable(config: ModelConfig) -> Iterator[None]:
    """Turn what a saved description of no possible model raises into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError),
        *(RuntimeError, TypeError),
    ) as error:
        raise ValueError(
            f"{config.start}: {MODEL} describes no model that can be built ({line(repr(error))}); "
            "copy it again, or use another checkpoint"
        ) from error


def followed(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """The `[model]` section with what follows from `model.start`, and notes for the user.

    Settings that are at their default follow; sizes may be given, and heads if the start has none.

    Raises:
        ValueError: There is no such model, it cannot be trained, or a setting contradicts it.
    """
    if config.start is None:
        if config.name is not None:
            start.refuse_untrainable(f"model.name: {config.name}", named_model(config.name))
        return config, []
    config = completed(config)
    try:
        return _followed(config, str(config.start))
    except ValueError as error:
        if str(error).startswith("model."):
            raise
        raise ValueError(f"model.start: {error}") from error


def completed(config: ModelConfig) -> ModelConfig:
    """With `model.name` as the model of a start `reference:FILE` that names none."""
    given = config.start or ""
    if config.name is None or not given.startswith("reference:") or ",model=" in given:
        return config
    return replace(config, start=f"{given},model={config.name}")


def _followed(config: ModelConfig, reference: str) -> tuple[ModelConfig, list[str]]:
    kind, name = references.kind_of(reference)
    has_heads = False
    notes: list[str] = []
    if kind == "run":
        theirs, has_heads = saved_config(reference), True
    elif kind == "open_clip":
        theirs, notes = open_clip_start(reference, name)
    elif kind == "reference":
        name, weights = references.reference_weights(reference, name)
        heads = references.reference_heads(weights)
        has_heads = heads is not None
        theirs = ModelConfig(name=name, heads=heads or config.heads)
    else:
        theirs = ModelConfig()
        if kind == "local-dir" and not (Path(name) / towers.OPEN_CLIP_CONFIG).is_file():
            raise ValueError(f"model.start: {reference}: no folder with {towers.OPEN_CLIP_CONFIG}")
    found = start.merged(config, theirs, has_heads=has_heads)
    if kind == "open_clip" and not Path(name.partition("/")[2]).is_file():
        found = replace(found, start=None)  # its name and tag say it all
    description = described(found)
    named = {} if found.name is None else named_model(found.name)
    start.refuse_untrainable(f"model.start: {reference}", description or named)
    return found, notes + start.resizing_notes(reference, description or {})


def named_model(name: str) -> dict[str, Any]:
    """A model of open_clip as an `open_clip_config.json` describes it."""
    return {"model_cfg": towers.named_config(name)}


def open_clip_start(reference: str, name: str) -> tuple[ModelConfig, list[str]]:
    """The settings of `open_clip:NAME[/TAG]`, whose tag may be a file, and notes for the user."""
    name, _, tag = name.partition("/")
    if Path(tag).is_file():
        references.require_model(reference, name)
        return ModelConfig(name=name), []
    references.published_weights(reference, name, tag)
    notes = [] if tag else [f"model.start: {reference}: untrained; no weights are named"]
    return ModelConfig(name=name, pretrained=tag or None), notes


def described(config: ModelConfig) -> dict[str, Any] | None:
    """The towers as an `open_clip_config.json` describes them; None if `config` says it all.

    Towers of `transformers` are described by `transformers` instead of `model_cfg`.
    """
    if config.start is None:
        return None
    kind, name = references.kind_of(config.start)
    if kind == "run":
        found: dict[str, Any] | None
        saved = read_json(find_checkpoint(config.start) / MODEL)
        found = saved.get("open_clip", saved.get("hugging_face"))
        return found
    if kind == "local-dir":
        found = read_json(Path(name) / towers.OPEN_CLIP_CONFIG)
        return found
    if kind == "hf":
        return conversion.description(config.start, name)
    if kind == "reference":
        return references.reference_description(name.rpartition(",model=")[2])
    return None


def text_source(config: ModelConfig) -> Path | None:
    """The folder with the files of a start's Hugging Face text tower, if it has one."""
    kind, name = references.kind_of(config.start or "")
    if kind == "local-dir":
        return references.own_text_files(Path(name))
    if config.start is None or kind != "run":
        return None
    folder = find_checkpoint(config.start) / halves.TEXT_FILES
    return folder if folder.is_dir() else None


def text_library(
    config: ModelConfig, description: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Reads a described text tower and tokenizer from the hub, if they are of Hugging Face."""
    if text_source(config) is not None:
        return nullcontext()
    if "transformers" in description:
        name = references.kind_of(str(config.start))[1]
        repository = "" if Path(name).is_dir() else name
    else:
        text = description["model_cfg"]["text_cfg"]
        if not (text.get("hf_model_name") or text.get("hf_tokenizer_name")):
            return nullcontext()
        repository = references.text_repository(description["model_cfg"])
    return references.readable_errors(f"model.start: {config.start}", repository)


def tower_kind(config: ModelConfig) -> Literal["transformer", "convolutional"] | None:
    """The kind of the image tower; None for small towers that start untrained."""
    description = described(config)
    if description is not None and "transformers" in description:
        kind: Literal["transformer", "convolutional"] = hugging_face.described_kind(description)
        return kind
    if description is not None:
        return towers.tower_kind(description["model_cfg"]["vision_cfg"])
    if config.name is not None:
        return towers.tower_kind(towers.named_config(config.name)["vision_cfg"])
    if config.image.weights is None and config.text.name is None:
        return None
    return towers.tower_kind({"timm_model_name": config.image.name})


def model(config: ModelConfig, *, seed: int, notes: list[str] | None = None) -> ProtoCLIP:
    """The model with new weights, or with those that a `followed` configuration names.

    New weights depend on the seed alone; the global random state is not changed. Adds a note on
    what was interpolated because the configuration has other sizes than the weights.

    Raises:
        ValueError: There is no such model, or its weights are damaged or of another model.
    """
    if config.start is None or references.kind_of(config.start)[0] != "run":
        return _model(config, seed=seed, notes=notes, is_run=False)
    require_intact(find_checkpoint(config.start), WEIGHTS)
    with buildable(config):
        return _model(config, seed=seed, notes=notes, is_run=True)


def _model(config: ModelConfig, *, seed: int, notes: list[str] | None, is_run: bool) -> ProtoCLIP:
    resized = is_resized(config)
    published = config.start is None and not resized
    with torch.random.fork_rng(devices=[]):
        # Seed the CPU's generator only: `torch.manual_seed` would seed every GPU too.
        torch.default_generator.manual_seed(seed)
        built = architecture(config, weights="published" if published else "new")
        if published:
            return built
        if is_run and not resized:
            folder = find_checkpoint(str(config.start))
            built.load_state_dict(read_weights(folder, built))
            return built
        source = start_model(config)
    said = start.adopt(built, source, name=config.start or f"{config.name}/{config.pretrained}")
    if notes is not None:
        notes += said
    return built


def is_resized(config: ModelConfig) -> bool:
    """Whether the configuration has other sizes than the weights that it names."""
    given = (config.image.size, config.text.context_length)
    if config.start is not None and references.kind_of(config.start)[0] == "run":
        own = saved_config(config.start)
        return given != (own.image.size, own.text.context_length)
    if config.pretrained is None:
        return False
    architecture = towers.named_config(str(config.name))
    image_size = architecture["vision_cfg"].get("image_size", 224)
    context_length = architecture["text_cfg"].get("context_length", 77)
    return given[0] not in (None, image_size) or given[1] not in (None, context_length)


def start_model(config: ModelConfig) -> TowerPair:
    """The model that a configuration starts from, at its own sizes."""
    if config.start is None:
        assert config.name is not None and config.pretrained is not None  # noqa: PT018
        return TowerPair(towers.named_towers(config.name, pretrained=config.pretrained))
    kind, name = references.kind_of(config.start)
    if kind != "run":
        loaded = references.OPENERS[kind](config.start, name)
        return conversion.converted(config.start, name, loaded) if kind == "hf" else loaded[0]
    folder = find_checkpoint(config.start)
    built = architecture(saved_config(config.start), weights="new")
    built.load_state_dict(read_weights(folder, built))
    return built


def architecture(config: ModelConfig, *, weights: towers.Weights) -> ProtoCLIP:
    """The model with weights from torch's global generator; with "none" on the meta device."""
    sizes: dict[str, Any] = {
        "image_size": config.image.size,
        "context_length": config.text.context_length,
    }
    files, description = text_source(config), described(config)
    with torch.device("meta") if weights == "none" else nullcontext():
        built: nn.Module
        if description is not None and "transformers" in description:
            built = hugging_face.described_towers(description, **sizes)
            embed_dim = hugging_face.width(built)
        elif description is not None:
            assert weights != "published"
            embed_dim = int(description["model_cfg"]["embed_dim"])
            with text_library(config, description):
                built = towers.described_towers(
                    description, weights=weights, text_files=files, **sizes
                )
        elif config.name is None:
            embed_dim, name = config.embed_dim, config.text.name
            source = str(files or halves.text_source(name))
            reads: AbstractContextManager[None] = nullcontext()
            if name is not None:
                length = towers.small_sizes(config)[1]
                halves.check_text(name, source, context_length=length)
                reads = halves.hub(name, source)
            with reads:
                built = towers.small_towers(config, text_source=source)
            if weights == "published":
                halves.load_weights(built, config, text_source=source)
        else:
            embed_dim = int(towers.named_config(config.name)["embed_dim"])
            tag = config.pretrained if weights == "published" else None
            with references.published_library(config.name, tag):
                built = towers.named_towers(
                    config.name, pretrained=config.pretrained, weights=weights, **sizes
                )
        model = ProtoCLIP(built, projection_head(embed_dim, config.heads))
        if has_logit_bias(config):
            model.add_logit_bias()
        return model


def has_logit_bias(config: ModelConfig) -> bool:
    """Whether the model has the bias of the sigmoid loss, by its name or its start."""
    if config.start is None:
        return config.name is not None and towers.has_logit_bias(config.name)
    if references.kind_of(config.start)[0] != "run":
        found = described(config)
        if found is None:  # `open_clip:NAME/FILE`
            return config.name is not None and towers.has_logit_bias(config.name)
        if "transformers" in found:
            return bool(found["transformers"]["model_type"] == "siglip")
        return found["model_cfg"].get("init_logit_bias") is not None
    path = find_checkpoint(config.start) / WEIGHTS
    try:
        require_regular(path)
        with safe_open(path, "pt") as weights:
            return "towers.logit_bias" in weights.keys()  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def training_model(config: Config, device: torch.device) -> tuple[ProtoCLIP, list[str]]:
    """The model that a run trains, parallel as `[parallel]` says, and notes for the user.

    Collective. With FSDP only rank 0 holds the whole model, on its CPU, until every rank has its
    shard. The sigmoid loss gets the logit bias that it needs.
    """
    sigmoid = config.loss.instance == "sigmoid" and config.loss.info_nce > 0
    sharded = config.parallel.strategy == "fsdp" and world_size() > 1

    def build() -> tuple[ProtoCLIP, ProtoCLIP | None, list[str]]:
        said: list[str] = []
        whole = None
        if not sharded or rank() == 0:
            whole = model(config.model, seed=config.run.seed, notes=said)
        if sharded:
            with torch.random.fork_rng(devices=[]):
                built = architecture(config.model, weights="none")
        else:
            assert whole is not None
            built = to_device(whole, device)
        if config.model.lora is not None:
            said += lora.add_adapters(
                built,
                config.model.lora,
                tokens=tokenizer(config.model)(["a"]),
                locked=config.model.locked,
                new_projections=config.model.projections_are_new,
                seed=config.run.seed,
            )
        if sigmoid and not has_logit_bias(config.model):
            for made in filter(None, (whole, built)):
                made.add_logit_bias()
            said.append("loss.instance = sigmoid: the logits start with scale 10 and bias -10")
        return built, whole, said + parallelise(config, built)

    built, whole, notes = raise_on_all_ranks(build)
    if sharded:
        shard(built, device)
        spread(built, whole)
    return built, notes


def frozen_start(config: Config, device: torch.device) -> TowerPair:
    """The towers as they are before a run's first step, at the run's sizes, which stay so.

    In evaluation mode and without gradients. Every rank holds them whole.
    """
    towers_of = model(config.model, seed=config.run.seed).towers
    return to_device(TowerPair(towers_of).eval().requires_grad_(False), device)


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
    else:
        alone = ["strategy"] if parallel.strategy == "fsdp" else []
        alone += ["sync_batch_norm"] if parallel.sync_batch_norm else []
        notes = [f"parallel.{each}: no effect, since there is one rank" for each in alone]
    if parallel.activation_checkpointing:
        recompute_activations(built.towers, config.model)
    if parallel.compile:
        for name, part in built.towers.named_children():
            if name in ("visual", "text", "transformer"):
                part.compile()
    return notes


def check_parallel(config: Config) -> None:
    """Refuse what `[parallel]` asks of towers that cannot do it, before data and weights are read.

    Raises:
        ValueError: As `recompute_activations` and `followed`.
    """
    if config.parallel.activation_checkpointing:
        model, _ = followed(config.model)
        recompute_activations(architecture(model, weights="none").towers, model)


def recompute_activations(both: nn.Module, config: ModelConfig) -> None:
    """Make towers compute their activations again in the backward pass, to save memory.

    Raises:
        ValueError: They cannot, or the image tower's BatchNorm would count each batch twice.
    """
    setting, image = "parallel.activation_checkpointing", both.get_submodule("visual")
    way_out = "set it to false, or choose a transformer"
    counts = any(isinstance(part, _BatchNorm) for part in image.modules())
    if "image" not in config.locked and counts and not config.frozen_batch_norm:
        raise ValueError(
            f"{setting}: the image tower has BatchNorm, which would count a batch twice; {way_out}"
        )
    try:
        both.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, ValueError) as error:
        raise ValueError(f"{setting}: these towers cannot do it; {way_out}") from error
    # open_clip passes over image towers that cannot. Its towers, timm's and those of `transformers`
    # mark the parts that do.
    marks = ("grad_checkpointing", "gradient_checkpointing")
    does = any(getattr(part, mark, False) for part in image.modules() for mark in marks)
    if "image" not in config.locked and not does:
        raise ValueError(f"{setting}: this image tower cannot do it; {way_out}")


def tokenizer(config: ModelConfig) -> Tokenizer:
    length, description = config.text.context_length, described(config)
    files = text_source(config)
    if description is not None and "transformers" in description:
        name = str(files or references.kind_of(str(config.start))[1])
        with text_library(config, description):
            return hugging_face.described_tokenizer(description, name, context_length=length)
    if description is not None:
        kind, name = references.kind_of(str(config.start))
        # An open_clip folder holds its own tokenizer.
        source = name if kind == "local-dir" else None if files is None else str(files)
        with text_library(config, description):
            return towers.described_tokenizer(
                description["model_cfg"]["text_cfg"], context_length=length, source=source
            )
    if config.name is None:
        length = towers.small_sizes(config)[1]
    if config.text.name is not None:
        source = str(files or halves.text_source(config.text.name))
        return towers.described_tokenizer({"hf_tokenizer_name": source}, context_length=length)
    return towers.build_tokenizer(config.name, context_length=length)


def context_length(config: ModelConfig) -> int:
    """Number of tokens that the model's captions are cut to."""
    return int(tokenizer(config)(["a"]).shape[1])


def in_words(config: ModelConfig, built: ProtoCLIP, reads: Tokenizer) -> str:
    """What a run trains, at what size; and of small towers, how to get a larger model."""
    size, length = towers.image_size(built.towers), reads(["a"]).shape[1]
    millions = sum(parameter.numel() for parameter in built.parameters()) / 1e6
    said = f"{size} pixels and {length} tokens, {millions:.3g} million parameters with the heads"
    name = config.start or config.name
    if name is not None:
        return f"trains {name}, at {said}"
    text = config.text.name or f"a text transformer of {config.text.layers} layers"
    hint = ""
    if tower_kind(config) is None:
        hint = "; for a larger model name one, such as --model.name ViT-S-16 or RN50"
    return f"trains {config.image.name} and {text}, at {said}{hint}"


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
    """The checkpoints of a run, oldest first; some may be damaged.

    Raises:
        OSError: Their folder cannot be read, and is no folder without checkpoints.
    """
    try:  # not `glob`, which finds nothing in a folder that it may not read
        found = [*(run / "checkpoints").iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = re.compile(r"step-\d+", re.ASCII)
    return sorted(path for path in found if names.fullmatch(path.name))


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a model: the given one, or the newest checkpoint of a run.

    A run has a model in its own folder if fine-tuning chose one that is no checkpoint.
    """
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
        settings = {**description["model"], "start": str(folder)}
        if missing := {"image", "text", "heads"} - settings.keys():
            raise KeyError(min(missing))
        settings.pop("checkpoint", None)  # what earlier versions called `start`
        return build(ModelConfig, settings, "model.")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: model.json was written by another version of protoclip ({error})"
        ) from error


def description(config: ModelConfig) -> dict[str, Any]:
    """What `model.json` holds: all that builds the model again, but for its weights."""
    content = {"protoclip": protoclip.__version__, "model": asdict(config)}
    if (towers_of := described(config)) is not None:
        content["hugging_face" if "transformers" in towers_of else "open_clip"] = towers_of
    return content


def text_files(config: ModelConfig, built: ProtoCLIP, reads: Tokenizer) -> dict[str, bytes]:
    """The files of a Hugging Face text tower and tokenizer that a checkpoint holds, by name."""
    if config.text.name is None and described(config) is None:
        return {}
    return halves.text_files(built.towers, reads)


def saved_config(reference: str) -> ModelConfig:
    """The `[model]` section of a run or checkpoint folder; raises `ValueError` if it is damaged."""
    folder = find_checkpoint(reference)
    text = [f"{halves.TEXT_FILES}/{path.name}" for path in (folder / halves.TEXT_FILES).glob("*")]
    require_intact(folder, MODEL, *sorted(text))
    return model_config(read_json(folder / MODEL), folder)


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, or with some of them; None if intact."""
    try:
        expected = dict(json.loads(read_local(folder / CHECKSUMS)))
    except OSError as error:
        return f"{CHECKSUMS} cannot be read: {error.strerror}"
    except (ValueError, TypeError, RecursionError):
        return f"{CHECKSUMS} is damaged"
    # Not OPTIMIZER: checkpoints of an earlier format are intact without it.
    for name in names or sorted({WEIGHTS, MODEL, RESUME, STATE} | expected.keys()):
        try:
            if file_checksum(folder / name) != expected.get(name):
                return f"{name} is not what was written: its checksum differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        except ValueError as error:
            return f"{name} {error}"
    return None


def require_intact(folder: Path, *names: str) -> None:
    """Raise a `ValueError` that names the first damaged file of these."""
    if (wrong := damage(folder, names)) is not None:
        raise ValueError(f"{folder}: damaged ({wrong}); copy it again, or use another checkpoint")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises `ValueError` if it is damaged."""
    try:
        require_regular(path)
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's weights; raises `ValueError` if they are damaged or of another model.

    They are those of a plain model, also if `model` has adapters.
    """
    weights = read_tensors(folder / WEIGHTS)
    if wrong := misfits(model, weights):
        raise ValueError(
            f"{folder}: checkpoint of another architecture: {towers.examples_of(wrong)}; make "
            "the [model] section match"
        )
    return weights
