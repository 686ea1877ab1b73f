"""Export a model: write a folder, load it back with every library, and upload it if asked to.

Each format has a file of its own, and what goes along with the weights is in `card.py`.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from protoclip.data.access import hub_answer
from protoclip.data.emoji import emoji_table
from protoclip.export import card, huggingface, onnx, open_clip, timm
from protoclip.export.source import Features, Source, Unavailable, open_source, quiet
from protoclip.files import locked, naming, read_local
from protoclip.models import loading
from protoclip.models.formats import find_obstacle
from protoclip.terminal import line, say, visible

FORMATS: Mapping[str, Callable[[Source, Path], str]] = {
    "open_clip": open_clip.write_model,
    "hf": huggingface.write_model,
    "timm": timm.write_model,
    "onnx": onnx.write_graphs,
}
# What a format needs beside the package itself.
NEEDS = {"hf": ["transformers"], "onnx": ["onnx", "onnxruntime", "onnxscript"]}
TOLERANCE = 1e-4  # largest difference of features, relative to their mean norm
SAMPLES = 16  # images and captions that every format is checked on


def export(
    reference: str | Path,
    folder: str | Path,
    formats: str | Sequence[str] = ("open_clip", "hf"),
    *,
    opset: int = onnx.LEAST_OPSET,
    license: str = "unknown",
    push_to_hub: str | None = None,
    allow_links: bool = False,
    overwrite: bool = False,
    agrees: Callable[[str], bool] = lambda card: True,
) -> dict[str, Any]:
    """Write a model as a folder that other libraries load.

    The folder appears only when each library has loaded it and computed the same features of real
    images and captions as the model. It loads by `protoclip.load` too. A format that the model
    cannot have is left out.

    Args:
        reference: As for `protoclip.load`.
        folder: A folder that does not exist, or with `overwrite` an export; not the model's own.
        formats: One or several of "open_clip"; "hf", for transformers, transformers.js and
            sentence-transformers; "timm", the image tower alone; and "onnx".
        opset: Of the ONNX graphs, 18 or later.
        license: For the model card, as the hub writes it, such as "mit".
        push_to_hub: Name on the Hugging Face hub to upload the folder to, such as "me/model".
        allow_links: As in `data`, for the captions nearest to prototypes.
        overwrite: Replace the folder of an earlier export, with all that is in it. It stays as it
            is until the new one is complete.
        agrees: Takes the text of the model card, and returns whether to upload it.

    Returns:
        `folder`; `formats`, what was written by format; `differences`, the largest difference of
        `image` and `text` features by format, relative to their mean norm; `left_out`, the reason
        by format; `prototypes` and `captions`, why there are no prototypes or no captions
        nearest to them, or None; `license`; `names_its_path`, whether open_clip finds the text
        tower by the folder's path, so no longer once it has moved; `url`, if it was uploaded.

    Raises:
        ValueError: The reference, the folder or a format is wrong, the model can have none of the
            formats, or a library computes something else. No folder is written then. Also if
            uploading fails; the folder stays then.
    """
    folder, formats = Path(folder), [formats] if isinstance(formats, str) else formats
    restore_backup(folder)
    require_apart(str(reference), folder)
    require_new(folder, overwrite=overwrite)
    check_arguments(formats, opset, push_to_hub)
    source = open_source(str(reference), license=license)
    with locked(folder), stage_folder(folder, overwrite=overwrite) as temporary:
        facts = write_formats(source, temporary, formats, opset=opset, beside=folder.parent)
        facts = {"folder": str(folder), **facts, "license": license}
        facts["differences"] = check_features(source, temporary, list(facts["formats"]))
        # Only now, since the libraries read the folder under its temporary name.
        facts["names_its_path"] = open_clip.point_to(temporary, str(folder.absolute()))
        facts["prototypes"] = card.write_prototypes(source, temporary)
        facts["captions"] = card.add_captions(source, temporary, allow_links=allow_links)
        with naming(folder):
            card.write_card(source, temporary, facts, hub_name=push_to_hub)
            share_permissions(temporary)
    if push_to_hub is not None and agrees((folder / card.CARD).read_text(encoding="utf-8")):
        with open_clip.point_or_restore(folder, push_to_hub):
            facts["url"] = upload(folder, push_to_hub)
    return facts


@contextmanager
def stage_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends without an error.

    With `overwrite` it takes the place of an earlier export.

    Raises:
        ValueError: The folder exists by the end, and is not to be replaced.
    """
    name, folder = folder, folder.resolve()  # a link to a folder stays a link
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.protoclip")
    try:
        # Leftovers of killed processes.
        ours = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.protoclip", re.ASCII)
        for path in [path for path in folder.parent.iterdir() if ours.fullmatch(path.name)]:
            shutil.rmtree(path, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if not folder.exists():
            temporary.rename(folder)
        elif overwrite and is_export(folder):
            replace(folder, temporary)
        else:
            raise ValueError(f"{name}: exists by now; choose another folder")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace(folder: Path, new: Path) -> None:
    """Give a folder's name to a new one beside it, and remove the old one.

    If this is cut short, the old one has its name, or stays beside it until `restore_backup` or the
    next `replace`.
    """
    old = backup_path(folder)
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
    folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_backup(folder: Path) -> None:
    """Give an export its name again, if a process was killed when `replace` had set it aside."""
    real = folder.resolve()
    if not real.exists() and backup_path(real).is_dir():
        with locked(folder):  # the holder of the lock may be about to rename the new one
            if not real.exists():
                backup_path(real).rename(real)


def backup_path(folder: Path) -> Path:
    """Where `replace` keeps the old export."""
    return folder.with_name(f".{folder.name}.replaced.protoclip")


def share_permissions(folder: Path) -> None:
    """Give weights the permissions of the card: safetensors lets only their owner read them."""
    mode = stat.S_IMODE((folder / "README.md").stat().st_mode)
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def check_arguments(formats: Sequence[str], opset: int, name: str | None) -> None:
    """Refuse wrong arguments, before anything is loaded."""
    if not formats:
        raise ValueError(f"formats: none; choose of {', '.join(FORMATS)}")
    for kind in formats:
        if kind not in FORMATS:
            raise ValueError(f"formats: no format '{kind}'; choose of {', '.join(FORMATS)}")
        for package in NEEDS.get(kind, []):
            if find_spec(package) is None:
                raise ValueError(
                    f"formats: {kind} needs {package}; pip install 'protoclip[export]', or choose "
                    "other formats"
                )
    if opset < onnx.LEAST_OPSET:
        raise ValueError(f"opset: {opset} is too old; {onnx.LEAST_OPSET} or later")
    if "onnx" in formats:
        import onnx as library

        if opset > (newest := library.defs.onnx_opset_version()):
            raise ValueError(f"opset: {opset} is too new; at most {newest} with this onnx")
    if name is not None and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise ValueError(f"push_to_hub: '{name}' is no name on the hub, such as me/model")
    if name is not None and huggingface_hub.get_token() is None:
        raise ValueError(f"push_to_hub: {name}: no token for the hub; set HF_TOKEN")


def write_formats(
    source: Source, folder: Path, formats: Sequence[str], *, opset: int, beside: Path
) -> dict[str, Any]:
    """Write each format; returns what was written, and why others are left out.

    Messages name `beside`, where the user wants the folder, and not the temporary one.
    """
    graphs: Callable[[Source, Path], str] = partial(onnx.write_graphs, opset=opset)
    writers = {**FORMATS, "onnx": graphs}
    written: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(formats):
        try:
            with quiet():
                if source.config and (reason := find_obstacle(name, source.towers, source.config)):
                    raise Unavailable(reason)
                written[name] = writers[name](source, folder)
        except Unavailable as error:
            left_out[name] = str(error)
        except Exception as error:  # what these libraries raise has no common class
            raise ValueError(
                f"{source.reference}: cannot be exported as {name} ({line(str(error))}) into "
                f"{beside}"
            ) from error
    if not written:
        reasons = "; ".join(f"not as {name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"{source.reference}: {reasons}; choose other formats")
    return {"formats": written, "left_out": left_out}


@torch.inference_mode()
def check_features(
    source: Source, folder: Path, formats: list[str]
) -> dict[str, dict[str, float | None]]:
    """The largest differences of features by format; raises `ValueError` if one is too large."""
    images, captions = make_samples(source)
    tokens = source.tokenizer(captions)
    expected = Features(
        image=source.model.encode_image(images), text=source.model.encode_text(tokens)
    )
    readers: dict[str, Callable[[], Features]] = {
        "open_clip": lambda: open_clip.embed_samples(folder, images, captions),
        "hf": lambda: huggingface.embed_samples(folder, images, captions),
        "timm": lambda: timm.embed_samples(folder, images, captions),
        "onnx": lambda: onnx.embed_samples(folder, images, tokens),
        "protoclip": lambda: embed_samples(folder, images, captions),
    }
    loads = bool({"open_clip", "hf"} & set(formats))
    differences: dict[str, dict[str, float | None]] = {}
    for name in [*formats, *["protoclip"] * loads]:
        try:
            with quiet():
                computed = readers[name]()
        except Exception as error:
            raise ValueError(
                f"{source.reference}: not exported: {name} cannot load what was written "
                f"({line(str(error))})"
            ) from error
        differences[name] = {
            modality: difference(getattr(computed, modality), getattr(expected, modality))
            for modality in ("image", "text")
        }
        for modality, value in differences[name].items():
            if value is not None and not value < TOLERANCE:
                raise ValueError(
                    f"{source.reference}: not exported: the {modality} features of {name} differ "
                    f"by {value:.1e}, more than {TOLERANCE}; choose other formats"
                )
    return differences


def embed_samples(folder: Path, images: Float[Tensor, "n 3 h w"], captions: list[str]) -> Features:
    model, _, tokenizer = loading.load(folder)
    return Features(image=model.encode_image(images), text=model.encode_text(tokenizer(captions)))


def make_samples(source: Source) -> tuple[Tensor, list[str]]:
    """Images as the model reads them, and captions; one is longer than any context."""
    table = emoji_table("test").slice(0, SAMPLES)
    opened = [Image.open(BytesIO(data)) for data in table["image"].to_pylist()]
    captions: list[str] = table["caption"].to_pylist()
    images = torch.stack([source.transform(image) for image in opened])
    return images, [*captions, ", ".join(captions), "It’s A “ＴEST”: 2 cats &amp; 3 ﬁsh!"]


def difference(computed: Tensor | None, expected: Tensor) -> float | None:
    """The largest difference, relative to the mean norm of the features; None without any."""
    if computed is None:
        return None
    return float((computed.float() - expected).abs().max() / expected.norm(dim=1).mean())


def upload(folder: Path, name: str) -> str:
    """Upload a folder to the Hugging Face hub, and return its address there."""
    api = huggingface_hub.HfApi()
    done = f"{folder} is written"
    who = hub_answer(lambda timeout: api.whoami())
    if who is None:
        raise ValueError(f"{name}: the hub does not answer; {done}; check the network, HF_ENDPOINT")
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=address.repo_id)
    except Exception as error:
        raise ValueError(f"{name}: not uploaded ({line(str(error))}); {done}") from error
    ours = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    others = list[str]()
    with suppress(Exception):  # only the warning below needs it
        others = sorted({*api.list_repo_files(address.repo_id)} - ours - {".gitattributes"})
    if others:
        say(
            f"warning: {name} also holds files of no part of this export, such as "
            f"{visible(others[0])} ({len(others)} in all); readers may use them, so delete them"
        )
    return str(address)


def require_new(folder: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that exists; with `overwrite` only one that is no export."""
    if not Path(folder).exists():
        return
    if has_git(Path(folder)):
        raise ValueError(
            f"{folder}: exists, and holds .git, which is never removed; choose another folder"
        )
    if not is_export(Path(folder)):
        raise ValueError(f"{folder}: exists; choose another folder, or remove it")
    if not overwrite:
        raise ValueError(f"{folder}: exists; choose another folder, or give --overwrite")


def require_apart(reference: str, folder: str | Path) -> None:
    """Refuse a folder that is or holds the model, which would be removed with the folder."""
    if not Path(folder).exists():
        return
    model = Path(re.sub(r"^(hf|local-dir|reference):|,model=[^,]*$", "", reference))
    if model.exists() and Path(folder).resolve() in (model.resolve(), *model.resolve().parents):
        raise ValueError(f"{folder}: the model that is exported lies here; choose another folder")


def is_export(folder: Path) -> bool:
    """Whether a folder has the model card of an export, and is no Git clone of one."""
    try:
        return card.EXPORTED in read_local(folder / "README.md") and not has_git(folder)
    except (OSError, ValueError):
        return False


def has_git(folder: Path) -> bool:
    """Whether a folder is a Git clone, whose history is nowhere else."""
    return os.path.lexists(folder / ".git")
