"""Export a model: write a folder, load it back with every library, and upload it if asked to."""

import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from protoclip.data.emoji import emoji_table
from protoclip.encode.engine import LEAST_OPSET
from protoclip.export import card, huggingface, immich, open_clip, timm
from protoclip.export.open_clip import Features, Source, Unavailable, open_source
from protoclip.files import naming
from protoclip.models import loading
from protoclip.models.open_clip import closed_formats
from protoclip.models.opening import HUB_NAME, Tokenizer, quiet_libraries
from protoclip.models.protoclip import TowerPair
from protoclip.terminal import line, say, visible

FORMATS: Mapping[str, Callable[[Source, Path], str]] = {
    "open_clip": open_clip.write_model,
    "hf": huggingface.write_model,
    "timm": timm.write_model,
    "onnx": huggingface.write_graphs,
    "immich": immich.write_model,
}
# What a format needs beside the package itself.
NEEDS = {"hf": ["transformers"], "onnx": ["onnx", "onnxruntime", "onnxscript"]}
NEEDS["immich"] = [*NEEDS["hf"], *NEEDS["onnx"]]
AUTO = ("open_clip", "hf")  # the formats of `auto`; where a model can have neither, onnx
TOLERANCE = 1e-4  # largest difference of features, relative to their mean norm
SAMPLES = 16  # images and captions that every format is checked on


def export(
    reference: str | Path,
    folder: str | Path,
    formats: str | Sequence[str] = "auto",
    *,
    opset: int = LEAST_OPSET,
    license: str = "unknown",
    push_to_hub: str | None = None,
    allow_links: bool = False,
    overwrite: bool = False,
    agrees: Callable[[str], bool] = lambda card: True,
) -> dict[str, Any]:
    """Write a model as a folder that other libraries load.

    The folder appears only when each library has loaded it and computed the same features of real
    images and captions as the model. A format that the model cannot have is left out.

    Args:
        reference: As for `protoclip.load`.
        folder: A folder that does not exist, or with `overwrite` an export; not the model's own.
        formats: One or several of "open_clip"; "hf", for transformers, transformers.js and
            sentence-transformers; "timm", the image tower alone; "onnx"; and "immich". "auto" is
            open_clip and hf, or for a model that can have neither, onnx.
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
    require_new(folder, str(reference), overwrite=overwrite)
    check_arguments(AUTO if formats == ["auto"] else formats, opset, push_to_hub)
    source = open_source(str(reference), license=license, opset=opset)
    closed = closed_formats(source.towers, source.config) if source.config else {}
    if formats == ["auto"]:
        formats = [*AUTO, "onnx"] if closed.keys() >= {*AUTO} else AUTO
        check_arguments(formats, opset, push_to_hub)
    with stage_folder(folder, overwrite=overwrite) as temporary:
        facts = write_formats(source, temporary, formats, closed)
        facts |= {"folder": str(folder), "license": license}
        # Only now, since the libraries read the folder under its temporary name.
        if names_its_path := open_clip.names_its_path(temporary):
            open_clip.point_to(temporary, str(folder.absolute()))
        facts["names_its_path"] = names_its_path
        reasons = card.write_prototypes(source, temporary, allow_links=allow_links)
        facts["prototypes"], facts["captions"] = reasons
        with naming(folder):
            card.write_card(source, temporary, facts, hub_name=push_to_hub)
        # Those of the card: safetensors lets only the owner of weights read them.
        mode = stat.S_IMODE((temporary / card.CARD).stat().st_mode)
        for path in temporary.rglob("*.safetensors"):
            path.chmod(mode)
    if push_to_hub is not None and agrees((folder / card.CARD).read_text(encoding="utf-8")):
        if names_its_path:
            open_clip.point_to(folder, push_to_hub)
        try:
            facts["url"] = upload(folder, push_to_hub)
        finally:
            if names_its_path:
                open_clip.point_to(folder, str(folder.absolute()))
    return facts


@contextmanager
def stage_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends without an error.

    With `overwrite` it takes the place of an earlier export, which stays until then.
    """
    folder = folder.resolve()  # a link to a folder stays a link
    temporary = folder.with_name(f".{folder.name}.protoclip")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_arguments(formats: Sequence[str], opset: int, name: str | None) -> None:
    """Refuse wrong arguments, before anything is loaded."""
    for kind in formats or ["none"]:
        if kind not in FORMATS:
            raise ValueError(f"formats: no format '{kind}'; choose from {', '.join(FORMATS)}")
        for package in NEEDS.get(kind, []):
            if find_spec(package) is None:
                raise ValueError(
                    f"formats: {kind} needs {package}; pip install 'protoclip[export]', or choose "
                    "other formats"
                )
    if opset < LEAST_OPSET:
        raise ValueError(f"opset: {opset} is too old; {LEAST_OPSET} or later")
    if name is not None and not HUB_NAME.fullmatch(name):
        raise ValueError(f"push_to_hub: '{name}' is not a name on the hub, such as me/model")
    if name is not None and huggingface_hub.get_token() is None:
        raise ValueError(f"push_to_hub: {name}: no token for the hub; set HF_TOKEN")


def write_formats(
    source: Source, folder: Path, formats: Sequence[str], closed: Mapping[str, str]
) -> dict[str, Any]:
    """Write each format that is not closed, with the reason why, and compare the features that its
    library computes from the folder.

    Returns what was written, why others are left out, and the largest differences of features.
    """
    images, captions = make_samples(source)
    expected = embed_samples(source.model, source.tokenizer, images, captions)
    readers: dict[str, Callable[[], Features]] = {
        "open_clip": lambda: open_clip.embed_samples(folder, images, captions),
        "hf": lambda: huggingface.embed_samples(folder, images, captions),
        "timm": lambda: timm.embed_samples(folder, images),
        "onnx": lambda: huggingface.embed_graph_samples(folder, images, source.tokenizer(captions)),
        "immich": lambda: immich.embed_samples(folder, images, captions),
        "protoclip": lambda: embed_samples(*loading.load(folder)[::2], images, captions),
    }
    written, left_out = dict[str, str](), dict[str, str]()
    differences: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys([*formats, "protoclip"]):
        if name == "protoclip" and not {"open_clip", "hf"} & written.keys():
            continue
        try:
            with quiet_libraries(offline=True), redirect_stderr(StringIO()):
                if name in closed:
                    raise Unavailable(closed[name])
                if name in FORMATS:
                    written[name] = FORMATS[name](source, folder)
                computed = readers[name]()
        except Unavailable as error:
            left_out[name] = str(error)
            continue
        except Exception as error:  # what these libraries raise has no common class
            raise ValueError(
                f"{source.reference}: cannot be exported as {name} ({line(str(error))}) into "
                f"{folder.parent}"
            ) from error
        differences[name] = {"image": None, "text": None}
        for modality, features in computed.items():
            wanted = expected[modality]
            if name == "immich":  # which has zeros behind vectors of unit norm
                wanted, features = F.normalize(wanted, dim=1), features[:, : wanted.shape[1]]
            value = float((features.float() - wanted).abs().max() / wanted.norm(dim=1).mean())
            differences[name][modality] = value
            if not value < TOLERANCE:
                raise ValueError(
                    f"{source.reference}: not exported: the {modality} features of {name} differ "
                    f"by {value:.1e}, more than {TOLERANCE}; choose other formats"
                )
    if not written:
        reasons = "; ".join(f"not as {name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"{source.reference}: {reasons}; choose other formats")
    return {"formats": written, "left_out": left_out, "differences": differences}


@torch.inference_mode()
def embed_samples(
    model: TowerPair, tokenizer: Tokenizer, images: Float[Tensor, "n c h w"], captions: list[str]
) -> Features:
    return {"image": model.encode_image(images), "text": model.encode_text(tokenizer(captions))}


def make_samples(source: Source) -> tuple[Tensor, list[str]]:
    """Images as the model reads them, and captions; one is longer than any context."""
    table = emoji_table("test").slice(0, SAMPLES)
    opened = [Image.open(BytesIO(data)) for data in table["image"].to_pylist()]
    captions: list[str] = table["caption"].to_pylist()
    images = torch.stack([source.prepare(image) for image in opened])
    return images, [*captions, ", ".join(captions), "It’s A “ＴEST”: 2 cats &amp; 3 ﬁsh!"]


def upload(folder: Path, name: str) -> str:
    """Upload a folder to the Hugging Face hub, and return its address there."""
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=address.repo_id)
        there = {*api.list_repo_files(address.repo_id)} - {".gitattributes"}
    except Exception as error:
        reason = line(str(error))
        raise ValueError(f"{name}: not uploaded ({reason}); {folder} is written") from error
    others = sorted(there - {path.relative_to(folder).as_posix() for path in folder.rglob("*")})
    if others:
        say(
            f"warning: {name} also holds files that are not part of this export, such as "
            f"{visible(others[0])} ({len(others)} in all); readers may use them, so delete them"
        )
    return str(address)


def require_new(folder: Path, reference: str, *, overwrite: bool) -> None:
    """Refuse a folder that exists, unless it is an export to overwrite, without the model."""
    if not folder.exists():
        return
    model = Path(re.sub(r"^(hf|local-dir|reference):|,model=[^,]*$", "", reference))
    if model.exists() and folder.resolve() in (model.resolve(), *model.resolve().parents):
        raise ValueError(f"{folder}: the model to export is in this folder; choose another folder")
    card_file = folder / card.CARD
    is_export = card_file.is_file() and card.EXPORTED in card_file.read_text(encoding="utf-8")
    if not is_export or (folder / ".git").exists():  # the history of a clone is nowhere else
        raise ValueError(f"{folder}: exists; choose another folder, or remove it")
    if not overwrite:
        raise ValueError(f"{folder}: exists; choose another folder, or give --overwrite")
