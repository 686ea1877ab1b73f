"""A folder for `transformers`, with the files that transformers.js and sentence-transformers read.

A model that has the architecture of OpenAI's CLIP becomes a `CLIPModel`. A timm tower becomes a
`VisionTextDualEncoderModel`, with the same text model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from protoclip.export.source import (
    Features,
    Source,
    Unavailable,
    has_quick_gelu,
    is_plain_vit,
    plain_blocks,
)
from protoclip.export.timm import has_linear_projection, trunk_arguments
from protoclip.models.hugging_face import HuggingFaceTowers, pooled

# open_clip's names of the parts of a block, and Hugging Face's.
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC.value,
    "bilinear": Image.Resampling.BILINEAR.value,
}


def write(source: Source, folder: Path) -> str:
    """Write model, tokenizer and image processor; returns the model's class.

    Raises:
        Unavailable: No model of `transformers` computes the same.
    """
    if isinstance(source.towers, HuggingFaceTowers):
        model, tokenizer, processor = opened(source)
    else:
        model = build(source)
        tokenizer, processor = clip_tokenizer(source), image_processor(source)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_processor(model, tokenizer, processor, folder)
    return type(model).__name__


def features(folder: Path, images: Float[Tensor, "n 3 h w"], captions: list[str]) -> Features:
    """What `transformers` computes from the folder."""
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    if not model.config.model_type.startswith("vision-text"):
        del tokens["attention_mask"]
    inputs = {"pixel_values": images}
    with torch.inference_mode():
        return Features(
            image=pooled(model.get_image_features(**inputs)),
            text=pooled(model.get_text_features(**tokens)),
        )


def opened(source: Source) -> tuple[Any, Any, Any]:
    """The parts of a model that is Hugging Face's already."""
    from transformers import AutoImageProcessor

    open_processor: Any = AutoImageProcessor.from_pretrained
    place = source.reference.removeprefix("hf:")
    processor = open_processor(place, trust_remote_code=False)
    tokenizer = source.text_tokenizer
    tokenizer.tokenizer.model_max_length = tokenizer.context_length
    return source.towers.model, tokenizer.tokenizer, processor


def build(source: Source) -> Any:
    """A model of `transformers` with the weights of open_clip's towers."""
    from transformers import CLIPConfig, CLIPModel, VisionTextDualEncoderModel
    from transformers import VisionTextDualEncoderConfig as DualConfig

    config, towers = source.open_clip_config, source.towers
    text_settings, text_weights, text_projection = text_model(source)
    scale = float(towers.logit_scale)
    if is_plain_vit(towers.visual):
        settings, weights, projection = vision_model(towers.visual)
        model: Any = CLIPModel(
            CLIPConfig(
                vision_config=settings,
                text_config=text_settings,
                projection_dim=int(config["embed_dim"]),
                logit_scale_init_value=scale,
            )
        )
    elif has_linear_projection(towers.visual, config["vision_cfg"]):
        settings, weights = timm_wrapper(source)
        projection = towers.visual.head.proj.weight
        model = VisionTextDualEncoderModel(
            DualConfig(
                vision_config=settings,
                text_config={"model_type": "clip_text_model", **text_settings},
                projection_dim=int(config["embed_dim"]),
                logit_scale_init_value=scale,
            )
        )
    else:
        kind = type(towers.visual).__name__
        raise Unavailable(f"no model of transformers has its image tower ({kind}) and projection")
    for part, values in ((model.vision_model, weights), (model.text_model, text_weights)):
        # transformers 4 has one more module inside.
        inner = getattr(part, "vision_model", getattr(part, "text_model", part))
        inner.load_state_dict(values)
    with torch.no_grad():
        model.visual_projection.weight.copy_(projection)
        model.text_projection.weight.copy_(text_projection)
        model.logit_scale.copy_(towers.logit_scale)
    return model.eval()


def text_model(source: Source) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Settings and weights of a `CLIPTextModel`, and the projection."""
    towers = source.towers
    text = getattr(towers, "text", towers)
    pool = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
    projection = getattr(text, "text_projection", None)
    matrix = projection.weight.T if isinstance(projection, nn.Linear) else projection
    if (
        pool != "argmax"
        or text.attn_mask is None
        or not isinstance(matrix, Tensor)
        or getattr(projection, "bias", None) is not None
        or getattr(text, "cls_emb", None) is not None
        or getattr(towers, "logit_bias", None) is not None
        or not plain_blocks(text.transformer)
    ):
        raise Unavailable("no model of transformers has its text tower")
    tokenizer = source.text_tokenizer
    number, width = text.token_embedding.weight.shape
    if len(getattr(tokenizer, "encoder", ())) != number:
        raise Unavailable("its tokenizer is not CLIP's")
    settings = {
        **transformer_settings(text.transformer, text.ln_final),
        "vocab_size": number,
        "max_position_embeddings": len(text.positional_embedding),
        "projection_dim": matrix.shape[1],
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }
    weights = {
        "embeddings.token_embedding.weight": text.token_embedding.weight,
        "embeddings.position_embedding.weight": text.positional_embedding,
        **block_weights(text.transformer),
        **{f"final_layer_norm.{k}": v for k, v in text.ln_final.state_dict().items()},
    }
    return settings, weights, matrix.T


def vision_model(visual: Any) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Settings and weights of a `CLIPVisionModel`, and the projection."""
    settings = {
        **transformer_settings(visual.transformer, visual.ln_post),
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "projection_dim": visual.proj.shape[1],
    }
    weights = {
        "embeddings.class_embedding": visual.class_embedding,
        "embeddings.patch_embedding.weight": visual.conv1.weight,
        "embeddings.position_embedding.weight": visual.positional_embedding,
        # The missing letter is Hugging Face's.
        **{f"pre_layrnorm.{k}": v for k, v in visual.ln_pre.state_dict().items()},
        **block_weights(visual.transformer),
        **{f"post_layernorm.{k}": v for k, v in visual.ln_post.state_dict().items()},
    }
    return settings, weights, visual.proj.T


def transformer_settings(transformer: Any, norm: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": "quick_gelu" if has_quick_gelu(transformer) else "gelu",
        "layer_norm_eps": norm.eps,
    }


def block_weights(transformer: Any) -> dict[str, Tensor]:
    """The weights of a transformer's blocks by Hugging Face's names."""
    found: dict[str, Tensor] = {}
    for number, block in enumerate(transformer.resblocks):
        prefix, own = f"encoder.layers.{number}.", block.state_dict()
        for kind in ("weight", "bias"):
            queries, keys, values = own[f"attn.in_proj_{kind}"].chunk(3)
            found[f"{prefix}self_attn.q_proj.{kind}"] = queries
            found[f"{prefix}self_attn.k_proj.{kind}"] = keys
            found[f"{prefix}self_attn.v_proj.{kind}"] = values
            for theirs, name in BLOCK.items():
                found[f"{prefix}{name}.{kind}"] = own[f"{theirs}.{kind}"]
    return found


def timm_wrapper(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of a `TimmWrapperModel`."""
    name, arguments = trunk_arguments(source)
    trunk = source.towers.visual.trunk
    settings = {
        "model_type": "timm_wrapper",
        "architecture": name,
        "model_args": arguments,
        "hidden_size": trunk.num_features,
    }
    return settings, {f"timm_model.{k}": v for k, v in trunk.state_dict().items()}


def clip_tokenizer(source: Source) -> Any:
    """open_clip's tokenizer under Hugging Face's names of the special tokens."""
    from transformers import CLIPTokenizer

    tokenizer = source.text_tokenizer
    if getattr(tokenizer, "clean_fn", None) is not open_clip_lower():
        raise Unavailable("its tokenizer does not clean captions as CLIP's")
    vocabulary = {SPECIAL.get(token, token): number for token, number in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    build: Any = CLIPTokenizer
    return build(vocab=vocabulary, merges=merges, model_max_length=source.context_length)


def open_clip_lower() -> Any:
    from open_clip.tokenizer import get_clean_fn

    return get_clean_fn("lower")


def image_processor(source: Source) -> Any:
    from transformers import CLIPImageProcessor

    given, side = source.preprocessing, source.image_size
    mode, interpolation = given["resize_mode"], given["interpolation"]
    if mode not in ("shortest", "squash") or interpolation not in RESAMPLE:
        raise Unavailable(f"no image processor resizes images as it does ({mode}, {interpolation})")
    square = {"height": side, "width": side}
    build: Any = CLIPImageProcessor
    return build(
        size={"shortest_edge": side} if mode == "shortest" else square,
        crop_size=square,
        do_center_crop=mode == "shortest",
        resample=RESAMPLE[interpolation],
        image_mean=list(given["mean"]),
        image_std=list(given["std"]),
    )


def write_processor(model: Any, tokenizer: Any, processor: Any, folder: Path) -> None:
    """`processor_config.json` for transformers 5, `preprocessor_config.json` for transformers.js."""
    import transformers

    kinds: Mapping[str, Any] = {
        "CLIPModel": transformers.CLIPProcessor,
        "VisionTextDualEncoderModel": transformers.VisionTextDualEncoderProcessor,
    }
    if (kind := kinds.get(type(model).__name__)) is not None:
        kind(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
