"""A folder for the smart search of Immich, in the layout of the models that Immich publishes.

Its service gives the graphs one `image`, as `preprocess_cfg.json` says, or one `text`, as int32.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from open_clip.tokenizer import HFTokenizer, get_clean_fn
from PIL import Image
from torch import Tensor, nn

from protoclip.data.transforms import EvaluationTransform
from protoclip.encode.engine import write_graph
from protoclip.export import huggingface
from protoclip.export.open_clip import Features, Source, Unavailable
from protoclip.files import read_json, to_json, write_atomically
from protoclip.models import transformers as transformers_models
from protoclip.models.transformers import PaddedTokenizer

FOLDER, GRAPH = "immich", "model.onnx"
# Immich takes the models that it knows by name; here is one for each width of its vectors.
NAMES = {
    512: "ViT-B-32__openai",
    768: "ViT-L-14__openai",
    1024: "RN50__openai",
    1152: "ViT-SO400M-14-SigLIP-384__webli",
    1536: "ViT-gopt-16-SigLIP2-256__webli",
}


class VisualGraph(nn.Module):
    """Vectors of unit norm, with zeros up to a width that Immich has: they change no cosine."""

    def __init__(self, tower: nn.Module, width: int, padding: int | None = None) -> None:
        super().__init__()
        self.tower, self.width, self.padding = tower, width, padding

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.finish(self.tower(image))

    def finish(self, features: Float[Tensor, "b q"]) -> Float[Tensor, "b d"]:
        return F.pad(F.normalize(features, dim=-1), (0, self.width - features.shape[1]))


class TextualGraph(VisualGraph):
    """The same of tokens, of which those that are `padding` are masked; unset, none."""

    def forward(self, text: Int[Tensor, "b c"]) -> Float[Tensor, "b d"]:
        mask = [] if self.padding is None else [(text != self.padding).long()]
        return self.finish(self.tower(text.long(), *mask))


def write_model(source: Source, folder: Path) -> str:
    """Write `config.json`, and graph and settings of each tower; returns whose place it takes."""
    preprocessing, (tokenizer, padding) = describe_images(source), open_tokenizer(source)
    (image_graph, pixels), (text_graph, tokens) = huggingface.make_graphs(source)
    with torch.inference_mode():
        needed = image_graph(**pixels).shape[1]
    if (width := next((width for width in NAMES if width >= needed), None)) is None:
        raise Unavailable(f"its vectors have {needed} numbers, and Immich's at most {max(NAMES)}")
    masked = tokenizer.token_to_id(padding) if "attention_mask" in tokens else None
    visual = VisualGraph(image_graph, width), {"image": pixels["pixel_values"]}
    textual = TextualGraph(text_graph, width, masked), {"text": tokens["input_ids"].int()}
    root = folder / FOLDER
    for name, (graph, inputs) in {"visual": visual, "textual": textual}.items():
        (root / name).mkdir(parents=True)
        write_graph(graph, inputs, f"{name}_embeds", root / name / GRAPH, opset=source.opset)
    tokenizer.save(str(root / "textual" / "tokenizer.json"))
    text = {"context_length": source.context_length}
    write_atomically(root / "config.json", to_json({"text_cfg": text}))
    write_atomically(root / "visual" / "preprocess_cfg.json", to_json(preprocessing))
    write_atomically(root / "textual" / "tokenizer_config.json", to_json({"pad_token": padding}))
    return f"in place of {NAMES[width]}"


def describe_images(source: Source) -> dict[str, Any]:
    """How images are prepared, in open_clip's words; Immich can crop a centre square or squash."""
    if isinstance(source.transform, EvaluationTransform) or source.config is not None:
        settings, modes = source.preprocessing, ["squash", "shortest"]
    else:
        processor = transformers_models.image_processor(source.reference.removeprefix("hf:"))
        settings = transformers_models.describe_preprocessing(processor, source.transform)
        settings["interpolation"] = Image.Resampling(processor.resample).name.lower()
        modes = ["squash"]  # such a processor may crop less than it resizes to
    mode, interpolation = settings["resize_mode"], settings["interpolation"]
    if mode not in modes or interpolation not in huggingface.RESAMPLE:
        raise Unavailable(f"Immich resizes no images as it does ({mode}, {interpolation})")
    names = ("mean", "std", "interpolation", "resize_mode")
    return {"size": source.image_size} | {name: settings[name] for name in names}


def open_tokenizer(source: Source) -> tuple[Any, str]:
    """A tokenizer that cleans captions as the model's does, since Immich does not; its padding."""
    from tokenizers import Regex, Tokenizer, normalizers

    ours = source.text_tokenizer
    if not isinstance(ours, PaddedTokenizer | HFTokenizer):
        backend = huggingface.clip_tokenizer(source).backend_tokenizer
        return backend, backend.id_to_token(0)
    backend = getattr(ours.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Unavailable("its tokenizer has no tokenizer.json")
    backend = Tokenizer.from_str(backend.to_str())
    if isinstance(ours, HFTokenizer):
        own = [] if backend.normalizer is None else [backend.normalizer]
        if ours.clean_fn is get_clean_fn("canonicalize"):
            rules = {"_": " ", r"[!-/:-@\[-`{-~]": "", r"\s+": " "}
            removals = [normalizers.Replace(Regex(old), new) for old, new in rules.items()]
            own = [*removals, normalizers.Strip(), normalizers.Lowercase(), *own]
        clean = huggingface.normalizer_of(get_clean_fn("whitespace"), normalizers.Sequence([]))
        backend.normalizer = normalizers.Sequence([clean, *own])
    return backend, ours.tokenizer.pad_token


def read_tokens(
    tokenizer: Any, padding: str, length: int, captions: list[str]
) -> Int[Tensor, "m c"]:
    """Captions as int32 tokens, padded or cut to one length."""
    number = tokenizer.token_to_id(padding)
    tokenizer.enable_padding(length=length, pad_token=padding, pad_id=number)
    tokenizer.enable_truncation(max_length=length)
    return torch.tensor([tokenizer.encode(text).ids for text in captions], dtype=torch.int32)


def embed_samples(folder: Path, images: Float[Tensor, "n 3 h w"], captions: list[str]) -> Features:
    """What Immich computes from the folder."""
    from tokenizers import Tokenizer

    root = folder / FOLDER
    length = read_json(root / "config.json")["text_cfg"]["context_length"]
    pad = read_json(root / "textual" / "tokenizer_config.json")["pad_token"]
    tokenizer = Tokenizer.from_file(str(root / "textual" / "tokenizer.json"))
    tokens = read_tokens(tokenizer, pad, length, captions)
    found = {"image": huggingface.run_graph(root / "visual" / GRAPH, {"image": images})}
    return {**found, "text": huggingface.run_graph(root / "textual" / GRAPH, {"text": tokens})}
