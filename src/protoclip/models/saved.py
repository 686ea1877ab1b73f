"""The files of a checkpoint, both ways: folders that appear whole or not at all, with checksums.

Tensors are safetensors and everything else is JSON, so reading a checkpoint runs no code from it.
`model.safetensors` and `model.json` are the model, which a run folder itself may hold too.
`optimizer.safetensors`, which only rank 0 reads, `resume.safetensors` and `state.json` are what a
run needs besides to go on. The run folder has its settings. When to save is decided elsewhere.

Of a sharded model every rank writes its part: instead of a file `model.safetensors` there is a
folder `model` then, and so for moments. Files are named as if there were
one of each; `shards.py` reads and writes such folders.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import protoclip
from protoclip.config import Config, HiddenLayerConfig, ModelConfig, build, without_removed
from protoclip.distributed.collectives import (
    all_gather_object,
    in_background,
    rank,
    rank0_first,
)
from protoclip.distributed.parallel import is_sharded, parts_to_fill
from protoclip.files import (
    checksum,
    file_checksum,
    left_by_killed,
    read_json,
    read_local,
    read_toml,
    require_regular,
    sync_folder,
    to_json,
    write_atomically,
)
from protoclip.models import shards
from protoclip.models.opening import examples_of, misfits

WEIGHTS, MODEL = "model.safetensors", "model.json"
OPTIMIZER, RESUME, STATE = "optimizer.safetensors", "resume.safetensors", "state.json"
CHECKSUMS = "checksums.json"
SETTINGS = "config.toml"  # of a run, in its folder
TEXT_FILES = "text"  # folder with the files of a Hugging Face text tower and tokenizer

# What `write_checkpoint`, `write_model` and a fetch from a store write to: hidden, with a process.
UNFINISHED_FOLDER = re.compile(r"\.(\.?model(\.\d+){1,2}|step-\d+\.(\d+|fetched))", re.ASCII)
FORMAT = 3  # of what a run needs to go on
TENSOR = "$tensor"  # key in `state.json` of an object that stands for the tensor of that name


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What `model.json` says, and where the files beside it are.

    Attributes:
        model: The `[model]` section that it was saved with; `start` is the folder.
        towers: What describes the towers, where `model` does not say it all.
        text_files: The folder of a Hugging Face text tower and tokenizer, if it has one.
        squashes: As of `ProtoCLIP`.
    """

    folder: Path
    model: ModelConfig
    towers: dict[str, Any] | None
    text_files: Path | None
    squashes: bool


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


def read_model(reference: str | Path) -> SavedModel:
    """The model of a run or checkpoint folder; its weights are not read.

    Raises:
        ValueError: There is none, it is damaged, or another version of protoclip wrote it.
    """
    folder = find_checkpoint(reference)
    text = folder / TEXT_FILES
    # Systems add hidden files to copied folders.
    names = sorted(f"{TEXT_FILES}/{path.name}" for path in text.glob("[!.]*"))
    require_intact(folder, MODEL, *names)
    content = read_json(folder / MODEL)
    require_version(content, folder)
    return SavedModel(
        folder=folder,
        model=model_config(content, folder),
        towers=content.get("open_clip", content.get("hugging_face")),
        text_files=text if text.is_dir() else None,
        squashes=is_squashing(content),
    )


def require_version(content: Mapping[str, Any], folder: Path) -> None:
    """Refuse the `model.json` of a version before 1.0."""
    version = str(content.get("protoclip", ""))
    if version.startswith("0."):
        raise ValueError(
            f"{folder}: written by protoclip {version}; open it with protoclip 1.x: "
            "pip install 'protoclip<2'"
        )


def is_squashing(content: Mapping[str, Any]) -> bool:
    """Whether the model of a `model.json` squashes images, as `ProtoCLIP` has it."""
    return bool(content.get("resize_mode") == "squash")


def model_config(content: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The `[model]` section in a `model.json`, with the folder as its start."""
    try:
        settings = {**content["model"], "start": str(folder)}
        if missing := {"image", "text", "heads"} - settings.keys():
            raise KeyError(min(missing))
        settings["pretrained"] = settings.get("pretrained") or None  # "" was none up to 1.0.0
        settings["image"] = {"pooling": "avg", **settings["image"]}  # as all had it up to 1.0.0
        is_linear = settings.pop("projection", "linear") == "linear"
        return build(ModelConfig if is_linear else HiddenLayerConfig, settings, "model.")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: model.json was written by another version of protoclip ({error})"
        ) from error


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; some may be damaged.

    Raises:
        OSError: Their folder cannot be read, and is no folder without checkpoints.
    """
    try:  # not `glob`, which finds nothing in a folder that it may not read
        paths = [*(run / "checkpoints").iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = re.compile(r"step-\d+", re.ASCII)
    return sorted(path for path in paths if names.fullmatch(path.name))


def find_checkpoint(path: str | Path) -> Path:
    """The folder of a model: the given one, or the newest checkpoint of a run.

    A run folder itself holds a model if fine-tuning chose one that is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such run or checkpoint folder")
    for candidate in (path, *reversed(checkpoints(path))):
        weights = candidate / WEIGHTS
        if (candidate / MODEL).is_file() and (weights.is_file() or has_shards(weights)):
            return candidate
    raise ValueError(f"{path}: no checkpoint here, which has {MODEL} and {WEIGHTS}")


def run_of(path: str | Path) -> Path | None:
    """The folder of the run that a run or checkpoint folder is of; None if it is of no run."""
    start = Path(path)
    for folder in (start, start.resolve()):  # a link may lead to a checkpoint
        above = [folder.parent.parent] if folder.parent.name == "checkpoints" else []
        for run in (folder, *above):
            if (run / SETTINGS).is_file():
                return run
    return None


def read_config(run: Path) -> Config:
    """The settings in a run folder, which may be somebody else's: they permit nothing.

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
    return replace(config, data=replace(config.data, allow_links=False))


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, or with some of them; None if intact."""
    try:
        expected = dict(json.loads(read_local(folder / CHECKSUMS)))
    except OSError as error:
        return f"{CHECKSUMS} cannot be read: {error.strerror}"
    except (ValueError, TypeError, RecursionError):
        return f"{CHECKSUMS} is damaged"
    needed = {WEIGHTS, MODEL, RESUME, STATE}
    # A sharded model that has not trained yet has no moments.
    if has_shards(folder / OPTIMIZER) or not has_shards(folder / WEIGHTS):
        needed.add(OPTIMIZER)
    for name in names or sorted(needed | expected.keys()):
        try:
            files = files_of(folder, name, expected)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        for file in files:
            try:
                if file_checksum(folder / file) != expected.get(file):
                    return f"{file} is not what was written: its checksum differs"
            except OSError as error:
                return f"{file} cannot be read: {error.strerror}"
            except ValueError as error:
                return f"{file} {error}"
    return None


def has_shards(path: Path) -> bool:
    """Whether a folder of shards stands in place of this safetensors file."""
    return path.suffix == ".safetensors" and not path.is_file() and path.with_suffix("").is_dir()


def files_of(folder: Path, name: str, listed: Collection[str]) -> list[str]:
    """A file, or in its place all shards that are in the folder, or are listed as written."""
    if not has_shards(folder / name):
        return [name]
    stem = Path(name).stem
    here = {f"{stem}/{path.name}" for path in shards.files(folder / stem)}
    return sorted(here | {entry for entry in listed if entry.startswith(f"{stem}/")})


def require_intact(folder: Path, *names: str) -> None:
    """Raise a `ValueError` that names the first damaged file of these."""
    if (wrong := damage(folder, names)) is not None:
        raise ValueError(f"{folder}: damaged ({wrong}); copy it again, or use another checkpoint")


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin so, of a safetensors file or of its shards.

    Raises:
        ValueError: The file is damaged.
    """
    if has_shards(path):
        return shards.read(path.with_suffix(""), prefix)
    with open_tensors(path) as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file, or in its shards; raises as `read_tensors`."""
    if has_shards(path):
        return {*shards.meta_tensors(path.with_suffix(""))}
    with open_tensors(path) as file:
        return {*file.keys()}


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path}: damaged ({error}); copy it again, or use another checkpoint"
        ) from error


def read_clusters(checkpoint: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Prototypes `(k, p)` of a run by their space, and the prototype of each sample `(m,)`.

    A sample without one has -1. There are no prototypes in the warm-up, in CLIP, and in a model
    that is no checkpoint of a run. The locked-image stage keeps those of the episode before it.

    Raises:
        ValueError: Their file is damaged.
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


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint's weights; raises `ValueError` if they are damaged or of another model.

    They are those of a plain model, also if `model` has adapters.
    """
    weights = read_tensors(folder / WEIGHTS)
    require_fit(folder, model, weights)
    return weights


def require_fit(folder: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    if wrong := misfits(model, weights):
        raise ValueError(
            f"{folder}: checkpoint of another architecture: {examples_of(wrong)}; make "
            "the [model] section match"
        )


def read_checkpoint(folder: Path, model: nn.Module) -> dict[str, Any]:
    """The nested state that a run saved, with its tensors on the model's device.

    `model` and `optimizer` are on the CPU, and empty but on rank 0. Of a sharded model, if sharded
    ones wrote the checkpoint, they are this rank's parts on its device, whatever the number of
    ranks was then. No rank waits for another.
    """
    require_version(read_json(folder / MODEL), folder)
    facts, device = read_json(folder / STATE), next(model.parameters()).device
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{folder / STATE}: not written by this version of protoclip, which cannot go on from "
            "it; start a new run from its weights with --model.start, in another folder"
        )
    tensors = {key: tensor.to(device) for key, tensor in read_tensors(folder / RESUME).items()}
    with explain_state_errors(folder):
        state = {**join_tensors(facts, tensors), "model": {}, "optimizer": {}}
    if has_shards(folder / WEIGHTS) and is_sharded(model):
        state |= read_parts(folder, model)
    elif rank() == 0:
        state["model"] = read_weights(folder, model)
        state["optimizer"] = read_tensors(folder / OPTIMIZER)
    return state


def read_parts(folder: Path, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """This rank's parts of weights and moments that a sharded model saved."""
    require_fit(folder, model, shards.meta_tensors(folder / Path(WEIGHTS).stem))
    stored = shards.meta_tensors(folder / Path(OPTIMIZER).stem)
    with explain_state_errors(folder):
        weights, moments = parts_to_fill(model, stored)
    for name, parts in {WEIGHTS: weights, OPTIMIZER: moments}.items():
        if parts:
            shards.fill(folder / Path(name).stem, parts)
    return {"model": weights, "optimizer": moments}


@contextmanager
def explain_state_errors(folder: Path) -> Iterator[None]:
    """Turn what a state of another form raises into a `ValueError` with the way out."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder / STATE}: not what this version of protoclip writes ({error!r}); "
            f"restore it from a copy, or delete {folder} to go on from the one before"
        ) from error


def facts_of(folder: Path, name: str) -> dict[str, Any]:
    """A section of a checkpoint's state, without its tensors."""
    with explain_state_errors(folder):
        return dict(read_json(folder / STATE).get(name, {}))


def is_aligned(checkpoint: Path) -> bool:
    """Whether `align` made a checkpoint, so that its pairs have not changed its encoders."""
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        sources = facts_of(checkpoint, "content")["sources"]
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
    model_facts: Mapping[str, Any],
    state: Mapping[str, Any],
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
    tensors: Mapping[str, dict[str, Tensor]],
    facts: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write safetensors and JSON files, by name, to a folder that appears whole or not at all.

    `text_files` are written as they are, to a folder of their own.
    """
    temporary = unfinished_path(folder)
    try:
        checksums = write_files(temporary, tensors, facts, text_files or {})
        publish_folder(temporary, folder, checksums)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_parts(
    folder: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    tensors: Mapping[str, dict[str, Tensor]],
    facts: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
) -> None:
    """`write_checkpoint` by all ranks of a sharded model. Collective, in the background.

    Args:
        parts: What each rank writes its parts of, as `shards.write`, by the name that one file of
            it would have.
        tensors, facts, text_files: As for `write_checkpoint`; of rank 0, which alone writes them.

    If one rank cannot write, all raise, and there is no checkpoint.
    """
    staging = unfinished_path(folder)
    with in_background():
        try:
            temporary, checksums = rank0_first(
                lambda: (staging, write_files(staging, tensors, facts, text_files or {}))
            )
            for stem, part in ((Path(name).stem, part) for name, part in parts.items()):
                for written in all_gather_object(shards.write(temporary / stem, part)):
                    checksums |= {f"{stem}/{name}": digest for name, digest in written.items()}
            rank0_first(lambda: publish_folder(staging, folder, checksums))
        except BaseException:
            if rank() == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise


def unfinished_path(folder: Path) -> Path:
    """Where this process writes a folder until it is whole; see `UNFINISHED_FOLDER`."""
    return folder.with_name(f".{folder.name}.{os.getpid()}")


def write_files(
    temporary: Path,
    tensors: Mapping[str, dict[str, Tensor]],
    facts: Mapping[str, Any],
    text_files: Mapping[str, bytes],
) -> dict[str, str]:
    """Write files to a new folder; returns their checksums."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    checksums: dict[str, str] = {}

    def write(name: str, data: bytes) -> None:
        checksums[name] = checksum(data)
        write_atomically(temporary / name, data, durable=True)

    temporary.mkdir()
    if text_files:
        (temporary / TEXT_FILES).mkdir()
    for name, data in text_files.items():
        write(f"{TEXT_FILES}/{name}", data)
    # One file at a time, so that only one file's bytes are in memory besides the tensors.
    for name, part in tensors.items():
        write(name, save({key: tensor.contiguous() for key, tensor in part.items()}))
    for name, content in facts.items():
        write(name, to_bytes(content))
    return checksums


def publish_folder(temporary: Path, folder: Path, checksums: Mapping[str, str]) -> None:
    """Write the checksums of a folder, and give it its name."""
    write_atomically(temporary / CHECKSUMS, to_bytes(checksums), durable=True)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    sync_folder(folder.parent)


def to_bytes(content: Mapping[str, Any]) -> bytes:
    return (to_json(content, indent=2) + "\n").encode()


def write_model(
    run: Path,
    weights: Mapping[str, Tensor],
    model_facts: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
) -> None:
    """Save a model in the run folder itself, where it comes before the checkpoints.

    It replaces an earlier one. If this ends half-way, there is none, and the newest checkpoint
    counts.
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


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, of which nothing is seen any more if this ends half-way.

    Raises:
        OSError: It cannot be removed, or not all of it.
    """
    gone = unfinished_path(folder)
    with suppress(FileNotFoundError):  # somebody else has removed it
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        gone.rmdir()  # of which something is left, if this can be done


def remove_unfinished(run: Path) -> None:
    """Remove unfinished files of killed processes; no other process writes to the run."""
    for folder in (run, run / "checkpoints"):
        for left in folder.glob(".*"):
            if UNFINISHED_FOLDER.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
    for left in left_by_killed(run):
        left.unlink(missing_ok=True)
