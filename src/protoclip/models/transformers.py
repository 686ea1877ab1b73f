"""CLIP, SigLIP and dual encoders of Hugging Face `transformers`, as tower pairs.

For training, a `CLIPModel` becomes the same model of open_clip; others stay what they are. The way
back is in `export/huggingface.py`. Text models that become one tower are in `text_models.py`.
"""

import copy
import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from protoclip.data.transforms import EvaluationTransform, LibraryTransform, OfMiddle
from protoclip.models.open_clip import TowerKind, build_towers, tower_kind
from protoclip.models.opening import ImageTransform, Loaded, hub_name, readable_errors
from protoclip.models.protoclip import TowerPair
from protoclip.models.text_models import (
    max_tokens,
    read_library_model,
    require_length,
    transformers_config,
)
from protoclip.models.timm import require_multiple
from protoclip.models.tokenizers import RememberingTokenizer, Tokenizer

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
# Hugging Face's names of what is in a transformer, and open_clip's (`pre_layrnorm` is spelt so).
NAMES = {
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "embeddings.patch_embedding": "conv1",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
}
ACTIVATIONS = ("gelu", "quick_gelu")
# Captions on which the tokenizers must agree.
CAPTIONS = ("a photo of a cat", "It's A TEST: 2 cats & 3 dogs!", "naïve café, 日本 🙂")


def open_model(name: str) -> tuple[TowerPair, ImageTransform, Tokenizer]:
    """Open a repository of the hub or a folder; reads safetensors only, and runs no code of it."""
    config = open_config(name)
    model = read_library_model(name)
    processor = image_processor(name)
    transform, built = transform_of(processor), HuggingFaceTowers(model.float())
    built.visual.prepare(describe_preprocessing(processor, transform))
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


def note_ignored_mask(name: str) -> str | None:
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
        """Remember what `describe_preprocessing` returned."""
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
            model = new_model(self.config)
        model.vision_model, model.text_model = self.visual.model, self.text.model
        if hasattr(model, "visual_projection"):
            model.visual_projection = self.visual.projection
            model.text_projection = self.text.projection
        for name in ("logit_scale", "logit_bias"):
            if hasattr(model, name):
                value = getattr(self, name).detach().reshape(getattr(model, name).shape)
                setattr(model, name, nn.Parameter(value))
        return model.eval()


class TransformersConfig:
    """What `model.json` says of the towers of a model of `transformers`, whose code has the rest.

    Args:
        described: Its settings, as `transformers`, and as `preprocess_cfg` its images.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        from transformers import CONFIG_MAPPING

        # A copy: transformers 5.8 takes names out of the settings of the two towers.
        settings = copy.deepcopy(described["transformers"])
        self.config: Any = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
        self.images = dict(described["preprocess_cfg"])

    @property
    def kind(self) -> str:
        return str(self.config.model_type)

    @property
    def tower_kind(self) -> TowerKind:
        vision = self.config.vision_config
        if vision.model_type == "timm_wrapper":
            return tower_kind({"timm_model_name": vision.architecture})
        return "transformer" if hasattr(vision, "num_attention_heads") else "convolutional"

    @property
    def embed_dim(self) -> int:
        text = self.config.text_config
        if self.kind == MASKED_KIND:
            return int(self.config.projection_dim)
        return int(getattr(text, "projection_size", text.hidden_size))

    def build(self, *, image_size: int | None, context_length: int | None) -> HuggingFaceTowers:
        """New towers; nothing is read.

        Raises:
            ValueError: They cannot have these sizes.
        """
        text, vision = self.config.text_config, self.config.vision_config
        if image_size not in (None, self.images["size"]):
            if self.kind == MASKED_KIND:
                raise ValueError(
                    f"model.image.size: {image_size} cannot be had; the images of this model have "
                    f"{self.images['size']} pixels"
                )
            require_multiple(image_size, vision.patch_size, "this model")
            vision.image_size = self.images["size"] = image_size
        if context_length is not None:
            if self.kind != MASKED_KIND:  # whose positions are not the caption's alone
                text.max_position_embeddings = context_length
            else:
                require_length(context_length, text, "this model")
        built = HuggingFaceTowers(new_model(self.config).float())
        built.visual.prepare(self.images)
        return built


def new_model(config: Any) -> Any:
    """A model of `transformers` with new weights."""
    from transformers import AutoModel

    build: Any = AutoModel.from_config
    return build(config, trust_remote_code=False)


def interpolate_positions(weights: dict[str, Tensor], towers: HuggingFaceTowers) -> None:
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


def transform_of(processor: Any) -> ImageTransform:
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


def describe_preprocessing(processor: Any, transform: ImageTransform) -> dict[str, Any]:
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


def describe_towers(reference: str, name: str) -> dict[str, Any]:
    """The description of a model's towers for `model.json`, by its folder or hub name.

    A `CLIPModel` is described as in an `open_clip_config.json`, and trained as a model of
    open_clip. Others stay models of `transformers`.

    Raises:
        ValueError: There is no such model, or open_clip has none that computes the same.
    """
    # A run asks several times, and each asks the hub; a folder may be written anew.
    return (ask_description_once if hub_name(name) else read_description)(reference, name)


def read_description(reference: str, name: str) -> dict[str, Any]:
    """As `describe_towers`, read now."""
    kinds, setting = ("clip", *TRAINABLE), f"model.start: {reference}"
    with readable_errors(setting, hub_name(name)):
        config = transformers_config(name)
        if config.model_type in kinds:
            processor = image_processor(name)
            images = describe_preprocessing(processor, transform_of(processor))
    if config.model_type not in kinds:
        raise ValueError(
            f"{setting}: models of kind {config.model_type} cannot be trained here; "
            f"of transformers, {', '.join(kinds)} can"
        )
    if config.model_type != "clip":
        if images["size"] is None:
            raise ValueError(f"{setting}: its images are not square, and training crops squares")
        return {
            "transformers": json.loads(config.to_json_string(use_diff=False)),
            "preprocess_cfg": images,
        }
    image, text = config.vision_config, config.text_config
    if image.hidden_act != text.hidden_act or image.hidden_act not in ACTIVATIONS:
        acts = f"{image.hidden_act} and {text.hidden_act}"
        raise ValueError(f"{setting}: open_clip has no towers with {acts}")
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "quick_gelu": image.hidden_act == "quick_gelu",
            "vision_cfg": {
                "image_size": image.image_size,
                "patch_size": image.patch_size,
                "width": image.hidden_size,
                "layers": image.num_hidden_layers,
                "head_width": image.hidden_size // image.num_attention_heads,
                "mlp_ratio": image.intermediate_size / image.hidden_size,
                "norm_kwargs": {"eps": image.layer_norm_eps},
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "mlp_ratio": text.intermediate_size / text.hidden_size,
                "norm_kwargs": {"eps": text.layer_norm_eps},
            },
        },
        "preprocess_cfg": {key: images[key] for key in ("mean", "std", "resize_mode")},
    }


ask_description_once = cache(read_description)


def to_open_clip(reference: str, name: str, loaded: Loaded) -> TowerPair:
    """A `CLIPModel` as the same model of open_clip; others as they are.

    Raises:
        ValueError: The tokenizer of a `CLIPModel` is not CLIP's.
    """
    pair, _, tokenizer = loaded
    theirs = pair.towers
    assert isinstance(theirs, HuggingFaceTowers)
    if theirs.kind != "clip":
        return pair
    require_clip_tokenizer(reference, tokenizer, eos=theirs.config.text_config.eos_token_id)
    described = describe_towers(reference, name)
    built = build_towers(
        described["model_cfg"],
        described["preprocess_cfg"],
        image_size=None,
        context_length=None,
        name=name,
    )
    model = theirs.library_model()
    weights = {f"visual.{key}": value for key, value in rename_weights(model.vision_model).items()}
    weights |= rename_weights(model.text_model)
    weights["visual.proj"] = model.visual_projection.weight.T
    weights["text_projection"] = model.text_projection.weight.T
    weights["logit_scale"] = model.logit_scale
    built.load_state_dict(weights)
    return TowerPair(built)


def rename_weights(tower: Any) -> dict[str, Tensor]:
    """The weights of a tower by open_clip's names; queries, keys and values are one there."""
    state: dict[str, Tensor] = tower.state_dict()
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if "position_ids" in key or "k_proj" in key or "v_proj" in key:
            continue  # the first is no weight; the others go along with the queries
        if "q_proj" in key:
            parts = [state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            value = torch.cat(parts)
        weights[name] = value
    return weights


def require_clip_tokenizer(reference: str, tokenizer: Any, *, eos: int) -> None:
    """Refuse a tokenizer that reads captions otherwise than open_clip's; padding may differ."""
    ours = open_clip.SimpleTokenizer()
    # transformers writes 2 for the end of old models, and takes the largest token then.
    same = eos in (2, ours.eot_token_id)
    for caption in CAPTIONS:
        tokens = tokenizer([caption])[0].tolist()
        expected = ours([caption], context_length=len(tokens))[0].tolist()
        length = expected.index(ours.eot_token_id) + 1
        same = same and tokens[:length] == expected[:length]
    if not same:
        raise ValueError(f"model.start: {reference}: its tokenizer is not CLIP's")
