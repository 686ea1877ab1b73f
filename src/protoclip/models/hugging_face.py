"""CLIP, SigLIP and dual encoders of Hugging Face `transformers`, as tower pairs.

Text models that become one half are in `halves.py`; a `CLIPModel` becomes open_clip's in
`conversion.py`.
"""

import copy
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from protoclip.data.transforms import EvaluationTransform, LibraryTransform, OfMiddle
from protoclip.models.architecture import Architecture
from protoclip.models.opening import ImageTransform, hub_name
from protoclip.models.protoclip import TowerPair
from protoclip.models.towers import (
    Misfit,
    RememberingTokenizer,
    Tokenizer,
    TowerKind,
    Weights,
    examples_of,
    max_tokens,
    require_length,
    require_multiple,
    tower_kind,
    transformers_config,
)

# The kinds of Hugging Face model, as their configurations name them.
KINDS = ("clip", "siglip", "siglip2", "vision-text-dual-encoder")
# Those whose text tower must not read padding. CLIP's tokens never read later ones, and SigLIP was
# trained to read padding.
MASKED_KIND, PADDING = "vision-text-dual-encoder", -1
# Those that read padding. Their published tokenizers return no mask; a class's own default does.
UNMASKED_KINDS = ("siglip", "siglip2")
# Those that are trained as models of `transformers`. SigLIP 2 with images of any shape is not: its
# images are not cropped to squares. Where they are squares, SigLIP 2 is of the kind "siglip" too.
TRAINABLE = ("siglip", MASKED_KIND)
POSITIONS = "embeddings.position_embedding.weight"  # of SigLIP's towers


def open_model(name: str) -> tuple[TowerPair, ImageTransform, Tokenizer]:
    """Open a repository of the hub or a folder; reads safetensors only, and runs no code of it."""
    config = open_config(name)
    model = read_model(name)
    processor = image_processor(name)
    transform, built = image_transform(processor), HuggingFaceTowers(model.float())
    built.visual.prepare(preprocessing(processor, transform))
    return TowerPair(built).eval(), transform, open_tokenizer(name, config)


def open_config(name: str) -> Any:
    """The configuration of a CLIP-like model."""
    config = transformers_config(name)
    if config.model_type not in KINDS:
        is_a = ", ".join(config.architectures or ()) or config.model_type
        raise ValueError(f"{is_a} is no CLIP-like model; known are {', '.join(KINDS)}")
    return config


def image_processor(name: str) -> Any:
    """What prepares the images of a model of `transformers`; no code of it runs."""
    from transformers import AutoImageProcessor

    open_processor: Any = AutoImageProcessor.from_pretrained
    return open_processor(name, trust_remote_code=False)


def read_model(name: str, **settings: Any) -> Any:
    """A model of `transformers` with all its weights; reads safetensors only."""
    model, loading = auto_model().from_pretrained(
        name,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # else it raises, and names none of them
        **settings,
    )
    if wrong := loading["missing_keys"] | {key for key, *_ in loading["mismatched_keys"]}:
        raise Misfit(f"does not fit config.json: {examples_of(sorted(wrong))}")
    return model


def auto_model() -> Any:
    """The class that opens models of `transformers`, without progress where nobody watches."""
    from transformers import AutoModel

    draw_on_terminals_alone()
    return AutoModel


def draw_on_terminals_alone() -> None:
    """Turn off the progress bars of `transformers` if standard error is a file or a pipe."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def open_tokenizer(name: str, config: Any, *, context_length: int | None = None) -> Tokenizer:
    """The tokenizer of a model, by its folder or name; it pads to the model's own length."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    length = min(tokenizer.model_max_length, max_tokens(config.text_config))
    reads = PaddedTokenizer(
        tokenizer,
        context_length=context_length or length,
        masked=config.model_type == MASKED_KIND,
    )
    return RememberingTokenizer(reads)


def ignored_mask(name: str) -> str | None:
    """What to tell a user of a SigLIP whose tokenizer returns a mask, which is not read.

    None if it returns none. What its files do not say is as its class has it, with a mask.
    """
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    names = get_tokenizer_config(name).get("model_input_names", ["attention_mask"])
    if "attention_mask" not in names:
        return None
    return (
        "its tokenizer returns attention_mask, which SigLIP was trained without; it is not read "
        "here, and transformers gives captions other features with it"
    )


def return_what_is_read(tokenizer: Any, kind: str) -> None:
    """Let a tokenizer return no mask for a text tower of SigLIP, and one for others.

    Its saved files say so too.
    """
    names = [name for name in tokenizer.model_input_names if name != "attention_mask"]
    names = ["input_ids"] if kind in UNMASKED_KINDS else [*names, "attention_mask"]
    tokenizer.model_input_names = names
    tokenizer.init_kwargs["model_input_names"] = names  # what is saved


class Tower(nn.Module):
    """One side of a model: `model`, and `projection` where there is one."""

    def __init__(self, model: Any, projection: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.projection = nn.Identity() if projection is None else projection

    def forward(self, **inputs: Tensor) -> Float[Tensor, "b d"]:
        return self.projection(self.model(**inputs).pooler_output)  # type: ignore[no-any-return]


class ImageTower(Tower):
    """The image side, whose attributes say what images a run trains it on, as open_clip's do."""

    def __init__(self, model: Any, projection: nn.Module | None) -> None:
        super().__init__(model, projection)
        self.image_size: int | None = None
        self.image_mean: tuple[float, ...] | None = None
        self.image_std: tuple[float, ...] | None = None

    def prepare(self, images: Mapping[str, Any]) -> None:
        """Remember what `preprocessing` returned."""
        self.image_size = images["size"]
        self.image_mean, self.image_std = tuple(images["mean"]), tuple(images["std"])


class HuggingFaceTowers(nn.Module):
    """A model of `transformers` as a tower pair, whose parts have the names of open_clip's.

    Where the text tower must not read padding, padding has token -1.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.visual = ImageTower(model.vision_model, getattr(model, "visual_projection", None))
        self.text = Tower(model.text_model, getattr(model, "text_projection", None))
        # Some models hold these as vectors of one number.
        self.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(()))
        if hasattr(model, "logit_bias"):
            self.logit_bias = nn.Parameter(model.logit_bias.detach().reshape(()))

    @property
    def kind(self) -> str:
        return str(self.config.model_type)

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        packed = self.kind == "siglip2"
        inputs = unpack_patches(images) if packed else {"pixel_values": images}
        return self.visual(**inputs)  # type: ignore[no-any-return]

    def encode_text(self, tokens: Int[Tensor, "b c"]) -> Float[Tensor, "b d"]:
        if self.kind != MASKED_KIND:
            return self.text(input_ids=tokens)  # type: ignore[no-any-return]
        mask = tokens != PADDING
        # Columns of padding alone cost time and change nothing; without values none is known.
        used: Any = slice(None) if tokens.is_meta else mask.any(0)
        padding = getattr(self.config.text_config, "pad_token_id", None) or 0
        ids = tokens.masked_fill(~mask, padding)[:, used]
        return self.text(  # type: ignore[no-any-return]
            input_ids=ids, attention_mask=mask[:, used].long()
        )

    @property
    def ignores_padding(self) -> bool:
        """As `TowerPair.ignores_padding`."""
        return self.kind in ("clip", MASKED_KIND)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations, as open_clip's towers can; raises `ValueError` if one cannot."""
        assert enable, "nothing turns it off"
        for tower in (self.visual.model, self.text.model):
            if not tower.supports_gradient_checkpointing:
                raise ValueError(f"{type(tower).__name__} cannot recompute activations")
            # transformers 6 knows it by its new name alone.
            new = getattr(tower, "activation_checkpointing_enable", None)
            (new or tower.gradient_checkpointing_enable)({"use_reentrant": False})

    def library_model(self) -> Any:
        """The model of `transformers` with these weights, which it shares with the towers."""
        with torch.device("meta"):
            model = untrained(self.config)
        model.vision_model, model.text_model = self.visual.model, self.text.model
        if hasattr(model, "visual_projection"):
            model.visual_projection = self.visual.projection
            model.text_projection = self.text.projection
        for name in ("logit_scale", "logit_bias"):
            if hasattr(model, name):
                value = getattr(self, name).detach().reshape(getattr(model, name).shape)
                setattr(model, name, nn.Parameter(value))
        return model.eval()


class TransformersTowers(Architecture):
    """The towers of a model of `transformers`, by its settings, which are its `towers_json`."""

    @property
    def open_clip_config(self) -> None:
        return None

    @property
    def tower_kind(self) -> TowerKind:
        vision = self._config.vision_config
        if vision.model_type == "timm_wrapper":
            return tower_kind({"timm_model_name": vision.architecture})
        return "transformer" if hasattr(vision, "num_attention_heads") else "convolutional"

    @property
    def embed_dim(self) -> int:
        config = self._config
        if config.model_type == MASKED_KIND:
            return int(config.projection_dim)
        return int(getattr(config.text_config, "projection_size", config.text_config.hidden_size))

    @property
    def has_logit_bias(self) -> bool:
        return bool(self._config.model_type == "siglip")

    def towers(self, weights: Weights) -> HuggingFaceTowers:
        """New towers; nothing is read.

        Raises:
            ValueError: They cannot have the sizes that `model` asks for.
        """
        config, images = self._config, dict((self.towers_json or {})["preprocess_cfg"])
        text, vision = config.text_config, config.vision_config
        size, length = self.sizes["image_size"], self.sizes["context_length"]
        if size not in (None, images["size"]):
            if config.model_type == MASKED_KIND:
                raise ValueError(
                    f"model.image.size: {size} cannot be had; the images of this model have "
                    f"{images['size']} pixels"
                )
            require_multiple(size, vision.patch_size, "this model")
            vision.image_size = images["size"] = size
        if length is not None:
            if config.model_type != MASKED_KIND:  # whose positions are not the caption's alone
                text.max_position_embeddings = length
            else:
                require_length(length, text, "this model")
        built = HuggingFaceTowers(untrained(config).float())
        built.visual.prepare(images)
        return built

    def repository(self, weights: Weights) -> str | None:
        return None if self.text_files else hub_name(str(self.tokenizer_source))

    def read_tokenizer(self) -> Tokenizer:
        source, length = str(self.tokenizer_source), self.sizes["context_length"]
        return open_tokenizer(source, self._config, context_length=length)

    @property
    def _config(self) -> Any:
        from transformers import CONFIG_MAPPING

        # A copy: transformers 5.8 takes names out of the settings of the two towers.
        settings = copy.deepcopy((self.towers_json or {})["transformers"])
        return CONFIG_MAPPING[settings["model_type"]].from_dict(settings)


def untrained(config: Any) -> Any:
    """A model of `transformers` with new weights."""
    from transformers import AutoModel

    build: Any = AutoModel.from_config
    return build(config, trust_remote_code=False)


def interpolate(weights: dict[str, Tensor], towers: HuggingFaceTowers) -> None:
    """Bring SigLIP's position embeddings to the sizes of its towers, in place.

    Those of images are on a grid, and bicubic; those of captions are linear.
    """
    wanted = {name: len(value) for name, value in towers.state_dict().items() if POSITIONS in name}
    image, text = f"visual.model.{POSITIONS}", f"text.model.{POSITIONS}"
    if image in wanted and wanted[image] != len(weights[image]):
        side = round(wanted[image] ** 0.5)
        grid = resample_abs_pos_embed(weights[image][None], [side, side], num_prefix_tokens=0)
        weights[image] = grid[0]
    if text in wanted and wanted[text] != len(weights[text]):
        line = weights[text].T[None]
        weights[text] = F.interpolate(line, wanted[text], mode="linear")[0].T


class PaddedTokenizer:
    """Captions as tokens, padded to one length; padding is -1 if the model masks it."""

    def __init__(self, tokenizer: Any, *, context_length: int, masked: bool) -> None:
        self.tokenizer, self.context_length, self.masked = tokenizer, context_length, masked

    def __call__(self, texts: list[str]) -> Int[Tensor, "b c"]:
        batch = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        tokens: Tensor = batch["input_ids"]
        return tokens.masked_fill(batch["attention_mask"] == 0, PADDING) if self.masked else tokens

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that `open_tokenizer` reads."""
        self.tokenizer.save_pretrained(folder)


def image_transform(processor: Any) -> ImageTransform:
    """Ours if it gives the same; else what the model's own image processor does."""
    text = processor.to_json_string()
    settings = json.loads(text)
    resized_to = settings.get("size") or {}
    side = resized_to.get("shortest_edge")
    clip = {
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": Image.Resampling.BICUBIC.value,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
    }
    if side and all(settings.get(name) == value for name, value in clip.items()):
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
        return EvaluationTransform(size=side, mean=mean, std=std)
    name = type(processor).__name__
    apply: ImageTransform = partial(
        pack_patches if name.startswith("Siglip2") else process, processor
    )
    if {"shortest_edge", "longest_edge"} & resized_to.keys():
        apply = OfMiddle(apply)
    return LibraryTransform(settings=f"{name}({' '.join(text.split())})", apply=apply)


def preprocessing(processor: Any, transform: ImageTransform) -> dict[str, Any]:
    """How images become tensors, in open_clip's words; `size` is None if they are not square."""
    _, *sides = transform(Image.new("RGB", (64, 48))).shape
    settings = json.loads(processor.to_json_string())
    resized_to = settings.get("size") or {}
    crops = settings.get("do_center_crop") and settings.get("crop_size") != resized_to
    squashes = settings.get("do_resize") and {"height", "width"} <= resized_to.keys() and not crops
    return {
        "size": sides[0] if len(set(sides)) == 1 else None,
        "mean": list(getattr(processor, "image_mean", None) or (0.0, 0.0, 0.0)),
        "std": list(getattr(processor, "image_std", None) or (1.0, 1.0, 1.0)),
        "resize_mode": "squash" if squashes else "shortest",
    }


def process(processor: Any, image: Image.Image) -> Float[Tensor, "3 h w"]:
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels


def pack_patches(processor: Any, image: Image.Image) -> Float[Tensor, "3 n q"]:
    """SigLIP 2's input as one tensor: patches, then a row that begins with the grid's size."""
    inputs = processor(images=image, return_tensors="pt")
    patches = inputs["pixel_values"][0]
    packed = F.pad(patches.reshape(3, len(patches), -1), (0, 0, 0, 1))
    packed[:2, -1, 0] = inputs["spatial_shapes"][0]
    return packed


def unpack_patches(packed: Float[Tensor, "b 3 n q"]) -> dict[str, Tensor]:
    shapes = packed[:, :2, -1, 0].round().long()
    patches = packed[:, :, :-1]
    count = patches.shape[2]
    mask = torch.arange(count, device=packed.device) < shapes.prod(1, keepdim=True)
    return {
        "pixel_values": patches.reshape(len(packed), count, -1),
        "pixel_attention_mask": mask.int(),
        "spatial_shapes": shapes,
    }
