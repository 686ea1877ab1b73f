"""Models of `transformers` to start from: a `CLIPModel` becomes the same model of open_clip.

Models that stay as they are have their towers in `hugging_face.py`; the way back is in
`export/huggingface.py`.
"""

import json
from functools import cache
from typing import Any

import open_clip
import torch
from torch import Tensor

from protoclip.config import ModelConfig
from protoclip.models import hugging_face
from protoclip.models.architecture import DescribedTowers
from protoclip.models.hugging_face import HuggingFaceTowers, image_transform, preprocessing
from protoclip.models.opening import Loaded, hub_name, readable_errors
from protoclip.models.protoclip import TowerPair
from protoclip.models.towers import transformers_config

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


def towers_json(reference: str, name: str) -> dict[str, Any]:
    """What describes the towers of a model in `model.json`, by its folder or hub name.

    A `CLIPModel` is described as in an `open_clip_config.json`, and trained as a model of
    open_clip. Others stay models of `transformers`.

    Raises:
        ValueError: There is no such model, or open_clip has none that computes the same.
    """
    # A run asks several times, and each asks the hub; a folder may be written anew.
    return (asked_once if hub_name(name) else read_towers_json)(reference, name)


def read_towers_json(reference: str, name: str) -> dict[str, Any]:
    """As `towers_json`, read now."""
    kinds, setting = ("clip", *hugging_face.TRAINABLE), f"model.start: {reference}"
    with readable_errors(setting, hub_name(name)):
        config = transformers_config(name)
        if config.model_type in kinds:
            processor = hugging_face.image_processor(name)
            images = preprocessing(processor, image_transform(processor))
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


asked_once = cache(read_towers_json)


def converted(reference: str, name: str, loaded: Loaded) -> TowerPair:
    """A `CLIPModel` as the same model of open_clip; others as they are.

    Raises:
        ValueError: The tokenizer of a `CLIPModel` is not CLIP's.
    """
    pair, _, tokenizer = loaded
    theirs = pair.towers
    assert isinstance(theirs, HuggingFaceTowers)
    if theirs.kind != "clip":
        return pair
    check_tokenizer(reference, tokenizer, eos=theirs.config.text_config.eos_token_id)
    described = DescribedTowers(model=ModelConfig(), towers_json=towers_json(reference, name))
    built = described.read_towers("new")
    model = theirs.library_model()
    weights = {f"visual.{key}": value for key, value in renamed(model.vision_model).items()}
    weights |= renamed(model.text_model)
    weights["visual.proj"] = model.visual_projection.weight.T
    weights["text_projection"] = model.text_projection.weight.T
    weights["logit_scale"] = model.logit_scale
    built.load_state_dict(weights)
    return TowerPair(built)


def renamed(tower: Any) -> dict[str, Tensor]:
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


def check_tokenizer(reference: str, tokenizer: Any, *, eos: int) -> None:
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
