"""A folder for `transformers`, transformers.js and sentence-transformers; and ONNX graphs for them.

A model that has the architecture of OpenAI's CLIP becomes a `CLIPModel`. A timm tower becomes a
`VisionTextDualEncoderModel`, with the same text model. A model of `transformers` keeps its class.
The graphs of image and text tower have the names that transformers.js expects.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from html.entities import codepoint2name
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.tokenizer import get_clean_fn
from PIL import Image
from torch import Tensor, nn

from protoclip.encode.engine import write_graph
from protoclip.export.open_clip import Features, Source, Unavailable
from protoclip.export.timm import trunk_arguments
from protoclip.models import transformers as transformers_models
from protoclip.models.joined import JoinedTower
from protoclip.models.open_clip import has_quick_gelu, is_plain_vit, matrix
from protoclip.models.protoclip import TowerPair
from protoclip.models.transformers import (
    MASKED_KIND,
    HuggingFaceTowers,
    PaddedTokenizer,
    auto_model,
    draw_on_terminals_alone,
    return_what_is_read,
)

NAMES = {ours: theirs for theirs, ours in transformers_models.NAMES.items()}  # from open_clip's
SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC.value, "bilinear": Image.Resampling.BILINEAR.value}
SIGLIP2_LENGTH = 64  # tokens to which its processor pads captions, whatever its tokenizer has
ONNX_FOLDER = "onnx"


def write_model(source: Source, folder: Path) -> str:
    """Write model, tokenizer and image processor; returns the model's class."""
    if isinstance(source.towers, HuggingFaceTowers):
        model, tokenizer, processor = open_parts(source)
    else:
        model = build(source)
        tokenizer, processor = clip_tokenizer(source), image_processor(source)
    draw_on_terminals_alone()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_processor(model, tokenizer, processor, folder)
    # `CLIPTokenizer` has a normalizer of its own, and would not read the file's rules.
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"CLIPTokenizer"', '"PreTrainedTokenizerFast"'))
    return type(model).__name__


def embed_samples(folder: Path, images: Float[Tensor, "n 3 h w"], captions: list[str]) -> Features:
    """What `transformers` computes from the folder, of captions as the card's code calls it."""
    from transformers import AutoProcessor

    model: Any = auto_model().from_pretrained(folder, use_safetensors=True).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    tokens = processor(text=captions, padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        return {
            "image": HuggingFaceTowers(model).encode_image(images),
            "text": model.get_text_features(**tokens).pooler_output,
        }


def open_parts(source: Source) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of a model that is Hugging Face's already.

    A run of such a model prepares images as in the run's evaluation.
    """
    model = source.towers.library_model()
    if hasattr(source.towers, "logit_bias") and not hasattr(model, "logit_bias"):
        raise Unavailable("no model of transformers with such towers has a logit bias")
    length = source.text_tokenizer.context_length
    if source.towers.kind == "siglip2" and length != SIGLIP2_LENGTH:
        raise Unavailable(
            f"its processor pads captions to {SIGLIP2_LENGTH} tokens, not to {length}"
        )
    if source.checkpoint is not None:
        processor = image_processor(source)
    else:
        processor = transformers_models.image_processor(source.reference.removeprefix("hf:"))
    tokenizer = source.text_tokenizer
    tokenizer.tokenizer.model_max_length = tokenizer.context_length
    return_what_is_read(tokenizer.tokenizer, source.towers.kind)
    return model, tokenizer.tokenizer, processor


def build(source: Source) -> Any:
    """A model of `transformers` with the weights of open_clip's towers.

    Only for towers that `closed_formats` does not rule out.
    """
    from transformers import CLIPConfig, CLIPModel, VisionTextDualEncoderModel
    from transformers import VisionTextDualEncoderConfig as DualConfig

    config, visual = source.open_clip_config, source.towers.visual
    shared: dict[str, Any] = {
        "projection_dim": int(config["embed_dim"]),
        "logit_scale_init_value": float(source.towers.logit_scale),
    }
    if is_plain_vit(visual):
        settings = {
            **transformer_settings(visual.transformer, visual.ln_post),
            "image_size": visual.image_size[0],
            "patch_size": visual.patch_size[0],
        }
        shared |= {"vision_config": settings, "text_config": text_settings(source)}
        model: Any = CLIPModel(CLIPConfig(**shared))
        weights, projection = rename_weights(visual), visual.proj.T
    else:
        name, arguments = trunk_arguments(source)
        settings = {"model_type": "timm_wrapper", "architecture": name, "model_args": arguments}
        shared["vision_config"] = {**settings, "hidden_size": visual.trunk.num_features}
        shared["text_config"] = {"model_type": "clip_text_model", **text_settings(source)}
        model = VisionTextDualEncoderModel(DualConfig(**shared))
        weights = {f"timm_model.{name}": value for name, value in visual.trunk.state_dict().items()}
        projection = visual.head.proj.weight
    text = getattr(source.towers, "text", source.towers)
    model.vision_model.load_state_dict(weights)
    model.text_model.load_state_dict(rename_weights(text))
    with torch.no_grad():
        model.visual_projection.weight.copy_(projection)
        model.text_projection.weight.copy_(matrix(text.text_projection).T)
        model.logit_scale.copy_(source.towers.logit_scale)
    return model.eval()


def text_settings(source: Source) -> dict[str, Any]:
    """Settings of the `CLIPTextModel` that equals a text tower."""
    text, tokenizer = getattr(source.towers, "text", source.towers), source.text_tokenizer
    number = len(text.token_embedding.weight)
    if len(getattr(tokenizer, "encoder", ())) != number:
        raise Unavailable("its tokenizer is not CLIP's")
    return {
        **transformer_settings(text.transformer, text.ln_final),
        "vocab_size": number,
        "max_position_embeddings": len(text.positional_embedding),
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }


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


def rename_weights(tower: nn.Module) -> dict[str, Tensor]:
    """The weights of a tower by Hugging Face's names, with separate queries, keys and values."""
    weights: dict[str, Tensor] = {}
    for key, value in tower.state_dict().items():
        if not key.startswith(tuple(NAMES)):  # the projection, and weights of the other tower
            continue
        for ours, theirs in NAMES.items():
            key = key.replace(ours, theirs)
        if "in_proj_" not in key:
            weights[key] = value
            continue
        for name, part in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
            weights[key.replace("attn.in_proj_", f"self_attn.{name}.")] = part
    return weights


def clip_tokenizer(source: Source) -> Any:
    """open_clip's tokenizer under Hugging Face's names of the special tokens."""
    from tokenizers import decoders
    from transformers import CLIPTokenizer

    tokenizer = source.text_tokenizer
    if getattr(tokenizer, "clean_fn", None) is not get_clean_fn("lower"):
        raise Unavailable("its tokenizer does not clean captions as CLIP's")
    vocabulary = {SPECIAL.get(token, token): number for token, number in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    build: Any = CLIPTokenizer
    usual = build(vocab=vocabulary, merges=merges, model_max_length=source.context_length)
    return_what_is_read(usual, "clip")
    backend = usual.backend_tokenizer
    backend.normalizer = normalizer_of(tokenizer.clean_fn, backend.normalizer)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    return usual


def normalizer_of(clean: Callable[[str], str], usual: Any) -> Any:
    """The usual normalizer of captions, after rules for what only `clean` does.

    The rules replace characters, and the usual entities of HTML, as `clean` does.
    """
    from tokenizers import Regex, normalizers

    names = {ord("'"): "apos", **codepoint2name}
    patterns: dict[str, list[str]] = defaultdict(list)
    # The ampersand is the first, since `&amp;#39;` holds another entity.
    for code in dict.fromkeys((ord("&"), *range(0x21, 0x7F), *range(0x80, 0xA0), *names)):
        forms = f"#0*{code}|#[xX]0*(?:{code:x}|{code:X})|{names.get(code, f'#{code}')}"
        pattern = f"&(?:(?:{forms});)" + "+" * (code == ord("&"))
        patterns[clean(f".&#{code};.")[1:-1]].append(pattern)
    # Latin letters, punctuation, and forms of letters; other scripts are read alike.
    for character in map(chr, (*range(0x300), *range(0x2000, 0x2070), *range(0xFB00, 0x10000))):
        text = f".{character}."
        if (cleaned := clean(text)) != usual.normalize_str(text):
            patterns[cleaned[1:-1]].append(character)
    rules = [normalizers.Replace(Regex("|".join(old)), new) for new, old in patterns.items()]
    return normalizers.Sequence([*rules, usual])


def image_processor(source: Source) -> Any:
    from transformers import CLIPImageProcessor

    settings, side = source.preprocessing, source.image_size
    mode, interpolation = settings["resize_mode"], settings["interpolation"]
    if mode not in ("shortest", "squash") or interpolation not in RESAMPLE:
        raise Unavailable(f"no image processor resizes images as it does ({mode}, {interpolation})")
    square = {"height": side, "width": side}
    build: Any = CLIPImageProcessor
    return build(
        size={"shortest_edge": side} if mode == "shortest" else square,
        crop_size=square,
        do_center_crop=mode == "shortest",
        resample=RESAMPLE[interpolation],
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )


def write_processor(model: Any, tokenizer: Any, processor: Any, folder: Path) -> None:
    """`processor_config.json`, and `preprocessor_config.json`, which transformers.js reads."""
    import transformers

    kinds: Mapping[str, Any] = {
        "CLIPModel": transformers.CLIPProcessor,
        "VisionTextDualEncoderModel": transformers.VisionTextDualEncoderProcessor,
    }
    if (kind := kinds.get(type(model).__name__)) is not None:
        kind(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)


class ImageGraph(nn.Module):
    def __init__(self, model: TowerPair) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.model.encode_image(pixel_values)


class TextGraph(ImageGraph):
    def forward(
        self, input_ids: Int[Tensor, "b c"], attention_mask: Int[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Takes a mask if the text tower must not read padding."""
        if attention_mask is None:
            return self.model.encode_text(input_ids)
        text: Any = self.model.towers.text
        return text(input_ids=input_ids, attention_mask=attention_mask)  # type: ignore[no-any-return]


def make_graphs(source: Source) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The graphs of image and text tower, each with inputs by their names."""
    kind = source.towers.kind if isinstance(source.towers, HuggingFaceTowers) else ""
    if kind == "siglip2":
        raise Unavailable("it reads images as patches, whose number differs by image")
    size, tokens = source.image_size, torch.ones(2, source.context_length, dtype=torch.long)
    images = {"pixel_values": torch.zeros(2, source.image_shape[0], size, size)}
    texts = {"input_ids": tokens}
    if kind == MASKED_KIND or isinstance(getattr(source.towers, "text", None), JoinedTower):
        texts["attention_mask"] = torch.ones_like(tokens)
    return [(ImageGraph(source.model), images), (TextGraph(source.model), texts)]


def write_graphs(source: Source, folder: Path) -> str:
    """Write both graphs, for batches of any size, and what prepares their inputs if none has."""
    names, graphs = [("vision", "image_embeds"), ("text", "text_embeds")], make_graphs(source)
    (folder / ONNX_FOLDER).mkdir()
    for (name, output), (module, inputs) in zip(names, graphs, strict=True):
        path = folder / ONNX_FOLDER / f"{name}_model.onnx"
        write_graph(module, inputs, output, path, opset=source.opset)
    tokenizer, is_new = source.text_tokenizer, not (folder / "preprocessor_config.json").exists()
    if is_new and isinstance(tokenizer, PaddedTokenizer):
        with suppress(Unavailable):
            image_processor(source).save_pretrained(folder)
            tokenizer.tokenizer.model_max_length = tokenizer.context_length
            tokenizer.save_pretrained(folder)
    return f"opset {source.opset}"


def embed_graph_samples(
    folder: Path, images: Float[Tensor, "n k h w"], tokens: Int[Tensor, "m c"]
) -> Features:
    """Features that ONNX Runtime computes from the folder; masked padding has token -1."""
    texts = {"input_ids": tokens.clamp(min=0), "attention_mask": (tokens >= 0).long()}
    return {
        "image": run_graph(folder / ONNX_FOLDER / "vision_model.onnx", {"pixel_values": images}),
        "text": run_graph(folder / ONNX_FOLDER / "text_model.onnx", texts),
    }


def run_graph(graph: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """The output of a graph that takes some of these inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    arrays = {x.name: inputs[x.name].contiguous().numpy() for x in session.get_inputs()}
    return torch.from_numpy(session.run(None, arrays)[0])
