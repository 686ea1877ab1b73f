"""The files of a checkpoint, both ways: folders that appear whole or not at all, with checksums.

Tensors are safetensors and everything else is JSON, so reading a checkpoint runs no code from it.
`model.safetensors` and `model.json` are the model, which a run folder itself may hold too.
`optimizer.safetensors`, which only rank 0 reads, `resume.safetensors` and `state.json` are what a
run needs besides to go on. The run folder has its settings. When to save is decided elsewhere.

Every rank writes its part of a sharded model: a folder `model` takes the place of the file
`model.safetensors` then, and so for moments. `torch.distributed.checkpoint` writes them in its
Hugging Face format, whose headers say where in the whole each part belongs, so that any number of
ranks, and one process without a group, reads what any number wrote.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

import protoclip
from protoclip.config import Config, HiddenLayerConfig, ModelConfig, build, without_removed
from protoclip.distributed.collectives import all_gather_object, in_background, rank, rank0_first
from protoclip.distributed.parallel import is_sharded, make_parts
from protoclip.files import (
    checksum,
    file_checksum,
    left_by_killed,
    read_json,
    read_local,
    read_toml,
    sync_folder,
    to_json,
    write_atomically,
)
from protoclip.models.opening import examples_of, misfits
from protoclip.rules import MODEL_HINT

WEIGHTS, MODEL = "model.safetensors", "model.json"
OPTIMIZER, RESUME, STATE = "optimizer.safetensors", "resume.safetensors", "state.json"
CHECKSUMS = "checksums.json"
SETTINGS = "config.toml"  # of a run, in its folder
TEXT_FILES = "text"  # folder with the files of a Hugging Face text tower and tokenizer

# What `write_checkpoint`, `write_model` and a fetch from a store write to: hidden, with a process.
UNFINISHED_FOLDER = re.compile(r"\.(\.?model(\.\d+){1,2}|step-\d+\.(\d+|fetched))", re.ASCII)
FORMAT = 3  # of what a run needs to go on
TENSOR = "$tensor"  # key in `state.json` of an object that stands for the tensor of that name


def model_json(
    model: ModelConfig, towers: Mapping[str, Any] | None, *, squashes: bool = False
) -> dict[str, Any]:
    """The content of `model.json`: all that builds a model again, except its weights."""
    settings = asdict(model) | {"projection": model.projection}
    content: dict[str, Any] = {"protoclip": protoclip.__version__, "model": settings}
    if towers is not None:
        content["hugging_face" if "transformers" in towers else "open_clip"] = towers
    if squashes:  # without it, images are cropped, as by all models up to 1.0.0
        content["resize_mode"] = "squash"
    return content


def model_config(content: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The `[model]` section in a `model.json`, with the folder as its start."""
    version = str(content.get("protoclip", ""))
    if version.startswith("0."):
        raise ValueError(
            f"{folder}: written by protoclip {version}; open it with protoclip 1.x: "
            "pip install 'protoclip<2'"
        )
    settings = {**content["model"], "start": str(folder)}
    settings["pretrained"] = settings.get("pretrained") or None  # "" was none up to 1.0.0
    settings["image"] = {"pooling": "avg", **settings["image"]}  # as all had it up to 1.0.0
    is_linear = settings.pop("projection", "linear") == "linear"
    try:
        return build(ModelConfig if is_linear else HiddenLayerConfig, settings, "model.")
    except ValueError as error:
        raise ValueError(
            f"{folder}: model.json was written by another version of protoclip ({error})"
        ) from error


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; some may be damaged."""
    folder = run / "checkpoints"
    names = re.compile(r"step-\d+", re.ASCII)
    paths = folder.iterdir() if folder.is_dir() else ()  # `glob` would hide an unreadable folder
    return sorted(path for path in paths if names.fullmatch(path.name))


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a model: the given one, or the newest checkpoint of a run.

    A run folder itself holds a model if fine-tuning chose one that is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such run or checkpoint folder; {MODEL_HINT}")
    for candidate in (path, *reversed(checkpoints(path))):
        weights = candidate / WEIGHTS
        if (candidate / MODEL).is_file() and (weights.is_file() or has_shards(weights)):
            return candidate
    raise ValueError(f"{path}: no checkpoint here, which has {MODEL} and {WEIGHTS}")


def run_of(path: str | Path) -> Path | None:
    """The folder of the run that a run or checkpoint folder is of; None if it is of no run."""
    start = Path(path)
    for folder in (start, start.resolve()):  # a link may lead to a checkpoint
        is_checkpoint = folder.parent.name == "checkpoints"
        for run in (folder, *[folder.parent.parent] * is_checkpoint):
            if (run / SETTINGS).is_file():
                return run
    return None


def read_config(run: Path, *, allow_links: bool = False) -> Config:
    """The settings in a run folder, which may be somebody else's: only the caller permits links.

    Raises:
        ValueError: They are damaged or of another version; names the file.
    """
    path = run / SETTINGS
    tree = read_toml(path)
    if isinstance(tree.get("data"), dict):
        tree["data"].pop("cache", None)  # of version 1.0; it changed no result
    try:
        config = Config.from_dict(without_removed(tree))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return replace(config, data=replace(config.data, allow_links=allow_links))


def read_run_config(reference: str, *, allow_links: bool = False) -> Config | None:
    """The settings of the run that a run or checkpoint folder belongs to, if it has some."""
    run = run_of(reference)
    return None if run is None else read_config(run, allow_links=allow_links)


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, or with some of them; None if intact."""
    try:
        expected = dict(json.loads(read_local(folder / CHECKSUMS)))
    except (OSError, ValueError, TypeError):
        return f"{CHECKSUMS} is damaged"
    needed = {WEIGHTS, MODEL, RESUME, STATE}
    # A sharded model that has not trained yet has no moments.
    if has_shards(folder / OPTIMIZER) or not has_shards(folder / WEIGHTS):
        needed.add(OPTIMIZER)
    for name in names or sorted(needed | expected.keys()):
        for file in files_of(folder, name, expected):
            try:
                if file_checksum(folder / file) != expected.get(file):
                    return f"{file} is not what was written: its checksum differs"
            except (OSError, ValueError) as error:
                return f"{file} cannot be read: {getattr(error, 'strerror', None) or error}"
    return None


def has_shards(path: Path) -> bool:
    """Whether a folder of shards stands in place of this safetensors file."""
    return path.suffix == ".safetensors" and not path.is_file() and path.with_suffix("").is_dir()


def files_of(folder: Path, name: str, listed: Collection[str]) -> list[str]:
    """A file, or in its place all shards that are in the folder, or are listed as written."""
    if not has_shards(folder / name):
        return [name]
    stem = Path(name).stem
    here = {f"{stem}/{path.name}" for path in (folder / stem).glob("*.safetensors")}
    return sorted(here | {entry for entry in listed if entry.startswith(f"{stem}/")})


def require_intact(folder: Path, *names: str) -> None:
    """Raise a `ValueError` that names the first damaged file of these."""
    if (wrong := damage(folder, names)) is not None:
        raise ValueError(f"{folder}: damaged ({wrong}); copy it again, or use another checkpoint")


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin so, of a safetensors file or of its shards, on the CPU."""
    if has_shards(path):
        stored = read_meta_tensors(path).items()
        names = [(name, like) for name, like in stored if name.startswith(prefix)]
        whole = {name: torch.empty_like(like, device="cpu") for name, like in names}
        fill_shards(path, whole)
        return whole
    try:
        with safe_open(path, "pt") as file:
            return {n: file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); copy it again, or use another checkpoint"
        ) from error


def read_clusters(checkpoint: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Prototypes `(k, p)` of a run by their space, and the prototype of each sample `(m,)` or -1.

    There are none in the warm-up, in CLIP, and in a model that is no checkpoint of a run. The
    locked-image stage keeps those of the episode before it.
    """
    path = checkpoint / RESUME
    if not path.is_file():
        return {}
    require_intact(checkpoint, RESUME)
    stored = read_tensors(path, "clusters/")
    spaces = [name.split("/")[1] for name in stored if name.endswith("/centroids")]
    return {
        space: (stored[f"clusters/{space}/centroids"], stored[f"clusters/{space}/assignments"])
        for space in spaces
    }


def read_prototypes(checkpoint: Path) -> dict[str, Tensor]:
    """The prototypes `(k, p)` of images and of texts, where a checkpoint of a run holds some."""
    clusters = read_clusters(checkpoint)
    return {name: clusters[name][0].float() for name in ("image", "text") if name in clusters}


def require_fit(folder: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of another model; they are those of a plain one, also if it has adapters."""
    if wrong := misfits(model, weights):
        raise ValueError(
            f"{folder}: checkpoint of another architecture: {examples_of(wrong)}; make "
            "the [model] section match"
        )


def read_checkpoint(folder: Path, model: nn.Module) -> dict[str, Any]:
    """The nested state that a run saved, with its tensors on the model's device.

    `model` and `optimizer` are on the CPU, and empty except on rank 0. If sharded models wrote the
    checkpoint and `model` is one, they are this rank's parts on its device, whatever the number of
    ranks was then. No rank waits for another.
    """
    facts, device = read_json(folder / STATE), next(model.parameters()).device
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{folder / STATE}: not written by this version of protoclip, which cannot go on from "
            "it; start a new run from its weights with --model.start, in another folder"
        )
    tensors = {key: tensor.to(device) for key, tensor in read_tensors(folder / RESUME).items()}
    state = {**join_tensors(facts, tensors), "model": {}, "optimizer": {}}
    if has_shards(folder / WEIGHTS) and is_sharded(model):
        require_fit(folder, model, read_meta_tensors(folder / WEIGHTS))
        stored = read_meta_tensors(folder / OPTIMIZER)
        state["model"], state["optimizer"] = make_parts(model, stored)
        for name, parts in ((WEIGHTS, state["model"]), (OPTIMIZER, state["optimizer"])):
            if parts:
                fill_shards(folder / name, parts)
    elif rank() == 0:
        state["model"] = read_tensors(folder / WEIGHTS)
        require_fit(folder, model, state["model"])
        state["optimizer"] = read_tensors(folder / OPTIMIZER)
    return state


def facts_of(folder: Path, name: str) -> dict[str, Any]:
    """A section of a checkpoint's state, without its tensors; raises `ValueError` for damage."""
    require_intact(folder, STATE)
    return dict(read_json(folder / STATE).get(name, {}))


def read_section(folder: Path, name: str) -> dict[str, Any]:
    """A section of a checkpoint's state, with its tensors on the CPU; raises as `facts_of`."""
    if not (facts := facts_of(folder, name)):
        return {}
    require_intact(folder, RESUME)
    return dict(join_tensors(facts, read_tensors(folder / RESUME, f"{name}/")))


def is_aligned(checkpoint: Path) -> bool:
    """Whether `align` made a checkpoint, so that its pairs have not changed its encoders."""
    with suppress(ValueError):
        sources = facts_of(checkpoint, "content").get("sources", [])
        return any("encoded" in source for source in sources)
    return False


def split_tensors(state: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """A copy of a nested state as JSON; adds copies of its tensors to `tensors`, on the CPU."""
    if isinstance(state, Tensor):
        assert name not in tensors, f"{name}: two tensors of this name"
        tensors[name] = state.detach().to("cpu", copy=True)
        return {TENSOR: name}
    prefix = name and f"{name}/"
    if isinstance(state, Mapping):
        return {
            key: split_tensors(value, tensors, f"{prefix}{key}") for key, value in state.items()
        }
    if isinstance(state, list | tuple):
        return [
            split_tensors(value, tensors, f"{prefix}{index}") for index, value in enumerate(state)
        ]
    return state


def join_tensors(facts: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested state that `split_tensors` took apart, with its keys in the same order."""
    if isinstance(facts, list):
        return [join_tensors(value, tensors) for value in facts]
    if not isinstance(facts, dict):
        return facts
    if facts.keys() == {TENSOR}:
        return tensors[facts[TENSOR]]
    return {key: join_tensors(value, tensors) for key, value in facts.items()}


def checkpoint_files(
    model_facts: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The safetensors and the JSON files of a run's nested state, by name.

    `model` and `optimizer` in the state are copies already.
    """
    files = {WEIGHTS: state["model"], OPTIMIZER: state["optimizer"]}
    stems = {Path(name).stem for name in files}
    others = {key: value for key, value in state.items() if key not in stems}
    tensors: dict[str, Tensor] = {}
    facts = {MODEL: model_facts, STATE: split_tensors({"format": FORMAT, **others}, tensors)}
    return {**files, RESUME: tensors}, facts


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
    *,
    parts: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a folder that appears whole or not at all.

    Args:
        tensors: Of safetensors files, by their names.
        facts: Contents of JSON files, by their names.
        text_files: Files of a folder of their own, which are written as they are.
        parts: The parts of this rank of a sharded model, by the name that one file of all parts
            would have. Then all ranks call this in the background, and rank 0 writes the rest; if
            one rank cannot write, all raise.
    """
    temporary, checksums = unfinished_path(folder), dict[str, str]()

    def write(name: str, data: bytes) -> None:
        checksums[name] = checksum(data)
        write_atomically(temporary / name, data, durable=True)

    def write_files() -> Path:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if text_files:
            for name, data in text_files.items():
                (temporary / TEXT_FILES / name).parent.mkdir(parents=True, exist_ok=True)
                write(f"{TEXT_FILES}/{name}", data)
        # One file at a time, so that only one file's bytes are in memory besides the tensors.
        for name, values in tensors.items():
            write(name, save({key: tensor.contiguous() for key, tensor in values.items()}))
        for name, content in facts.items():
            write(name, (to_json(content, indent=2) + "\n").encode())
        return temporary

    def publish() -> None:
        text = to_json(checksums, indent=2) + "\n"
        write_atomically(temporary / CHECKSUMS, text.encode(), durable=True)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)

    try:
        if parts is None:
            write_files()
            publish()
            return
        with in_background():
            shared = rank0_first(write_files)
            for stem, part in ((Path(name).stem, part) for name, part in parts.items()):
                for written in all_gather_object(write_shards(shared / stem, part)):
                    checksums |= {f"{stem}/{name}": digest for name, digest in written.items()}
            rank0_first(publish)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def unfinished_path(folder: Path) -> Path:
    """Where this process writes a folder until it is whole; see `UNFINISHED_FOLDER`."""
    return folder.with_name(f".{folder.name}.{os.getpid()}")


def write_model(
    run: Path,
    weights: Mapping[str, Tensor],
    model_facts: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
) -> None:
    """Save a model in the run folder itself, where it comes before the checkpoints.

    It replaces an earlier one. If this ends half-way, the newest checkpoint counts.
    """
    written = run / f".model.{os.getpid()}"
    try:
        write_checkpoint(written, {WEIGHTS: dict(weights)}, {MODEL: model_facts}, text_files)
        # Without `MODEL` there is no model, so it goes first, and comes last.
        (run / MODEL).unlink(missing_ok=True)
        if text_files:
            shutil.rmtree(run / TEXT_FILES, ignore_errors=True)
            (written / TEXT_FILES).rename(run / TEXT_FILES)
        for name in (WEIGHTS, CHECKSUMS, MODEL):
            (written / name).replace(run / name)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    sync_folder(run)


def remove_unfinished(run: Path) -> None:
    """Remove unfinished files of killed processes; no other process writes to the run."""
    for folder in (run, run / "checkpoints"):
        for left in folder.glob(".*"):
            if UNFINISHED_FOLDER.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
    for left in left_by_killed(run):
        left.unlink(missing_ok=True)


class ShardWriter(HuggingFaceStorageWriter):
    """Torch's writer, which remembers the checksums of the files that this rank has written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.per_thread_copy_ahead = 0  # or its thread would take memory of the first card
        self.folder, self.checksums = folder, dict[str, str]()

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        names = {result.storage_data.relative_path for result in written.value()}
        self.checksums = {name: file_checksum(self.folder / name) for name in sorted(names)}
        return written


def write_shards(folder: Path, parts: Mapping[str, Tensor]) -> dict[str, str]:
    """Write this rank's parts of all tensors, on the CPU; returns its files' checksums by name.

    What is no DTensor is the same on all ranks, and rank 0 writes it. Collective, in the background
    if the caller is. If one rank cannot write, all raise what that one met.
    """
    writer = ShardWriter(folder)
    once = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with in_background() as group, raise_first_cause():
        save_sharded(dict(parts), storage_writer=writer, planner=once, process_group=group)
    return writer.checksums


def read_meta_tensors(path: Path) -> dict[str, Tensor]:
    """The whole tensors of shards on the meta device: their names, shapes and types."""
    metadata = HuggingFaceStorageReader(str(path.with_suffix(""))).read_metadata()
    stored: dict[str, Any] = dict(metadata.state_dict_metadata)
    return {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        for name, tensor in stored.items()
    }


def fill_shards(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors in place: whole ones, or this rank's parts of DTensors. No rank waits."""
    reader = HuggingFaceStorageReader(str(path.with_suffix("")))
    with warnings.catch_warnings(), raise_first_cause():
        warnings.simplefilter("ignore", UserWarning)  # that it reads without a group
        load_sharded(dict(tensors), storage_reader=reader, no_dist=True)


@contextmanager
def raise_first_cause() -> Iterator[None]:
    """Raise what the first rank met that failed, in place of torch's collection of tracebacks."""
    try:
        yield
    except CheckpointException as error:
        raise error.failures[min(error.failures)][0] from None
