"""A folder that open_clip reads as `local-dir:FOLDER`, and as `hf-hub:NAME` once it is uploaded.

How ProtoCLIP opens such a folder as a start is in `models/start.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from protoclip.export.source import Features, Source
from protoclip.files import read_json, to_json
from protoclip.models.open_clip import FILES
from protoclip.models.opening import OPEN_CLIP_CONFIG


def write_model(source: Source, folder: Path) -> str:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`; returns the model's class.

    Raises:
        Unavailable: The towers are not open_clip's.
    """
    config, built = source.open_clip_config, source.towers
    settings = {"model_cfg": dict(config), "preprocess_cfg": source.preprocessing}
    text = to_json(settings, indent=2)
    (folder / OPEN_CLIP_CONFIG).write_text(text + "\n", encoding="utf-8")
    weights = {name: tensor.contiguous() for name, tensor in built.state_dict().items()}
    save_file(weights, folder / FILES[0])
    if config["text_cfg"].get("hf_tokenizer_name"):
        # open_clip then looks for the tokenizer in the folder.
        source.text_tokenizer.tokenizer.save_pretrained(folder)
    if config["text_cfg"].get("hf_model_name"):
        built.text.config.save_pretrained(folder)
        point_to(folder, str(folder.absolute()))
    return type(built).__name__


def point_to(folder: Path, address: str) -> bool:
    """Let open_clip find a Hugging Face text tower that has no name on the hub at `address`.

    It reads the tower's configuration there: the path of the folder itself, or its hub name.
    Returns whether there is such a tower.
    """
    path = folder / OPEN_CLIP_CONFIG
    if not path.is_file():
        return False
    settings = read_json(path)
    text = settings["model_cfg"]["text_cfg"]
    names = [name for name in ("hf_model_name", "hf_tokenizer_name") if text.get(name)]
    if not any(Path(text[name]).is_absolute() or Path(text[name]).exists() for name in names):
        return False
    text |= dict.fromkeys(names, address)
    path.write_text(to_json(settings, indent=2) + "\n", encoding="utf-8")
    return True


@contextmanager
def point_or_restore(folder: Path, address: str) -> Iterator[None]:
    """`point_to`, undone if the block raises."""
    path = folder / OPEN_CLIP_CONFIG
    before = path.read_bytes() if path.is_file() else None
    point_to(folder, address)
    try:
        yield
    except BaseException:
        if before is not None:
            path.write_bytes(before)
        raise


def embed_samples(folder: Path, images: Float[Tensor, "n 3 h w"], captions: list[str]) -> Features:
    """Features that open_clip computes from the folder."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.inference_mode():
        return Features(
            image=model.encode_image(images, normalize=False),
            text=model.encode_text(tokenizer(captions), normalize=False),
        )
