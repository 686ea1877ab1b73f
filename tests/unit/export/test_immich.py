"""What Immich's machine-learning service computes from an export, by the steps of its code.

They are those of `OpenClipVisualEncoder` and `OpenClipTextualEncoder`, in its folder
`machine-learning/immich_ml/models/clip`, and what these call.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import save_run
from PIL import Image

import protoclip
from testing import tiny_model
from tiny_hugging_face import save_bert, save_dual_encoder, save_siglip
from tiny_starts import CLIP, save_encoders, save_open_clip

ort = pytest.importorskip("onnxruntime")
tokenizers = pytest.importorskip("tokenizers")
NOISE = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
IMAGES = [
    Image.fromarray(NOISE).resize((96, 64), Image.Resampling.BICUBIC),
    Image.fromarray(NOISE).resize((50, 121), Image.Resampling.BICUBIC),
]
TEXTS = ["a red square", "It’s  a “DOG”, & 2 cats!", "a photo of two green corners " * 20, ""]


class Service:
    """The steps of Immich's service on one folder of its model cache."""

    def __init__(self, folder: Path) -> None:
        def read(path: str) -> Any:
            return json.loads((folder / path).read_text(encoding="utf-8"))

        text, images = read("config.json")["text_cfg"], read("visual/preprocess_cfg.json")
        self.images, size = images, images["size"]
        self.size = size[0] if isinstance(size, list) else size
        self.mean, self.std = (np.array(images[name], dtype=np.float32) for name in ("mean", "std"))
        self.resampling = Image.Resampling[images["interpolation"].upper()]
        self.canonicalize = text.get("tokenizer_kwargs", {}).get("clean") == "canonicalize"
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
        padding = read("textual/tokenizer_config.json")["pad_token"]
        length, number = text.get("context_length", 77), self.tokenizer.token_to_id(padding)
        self.tokenizer.enable_padding(length=length, pad_token=padding, pad_id=number)
        self.tokenizer.enable_truncation(max_length=length)
        self.visual, self.textual = (
            ort.InferenceSession(folder / name / "model.onnx") for name in ("visual", "textual")
        )

    def prepare(self, image: Image.Image) -> np.ndarray:
        size = self.size
        if self.images.get("resize_mode", "shortest") == "squash":
            image = image.resize((size, size), resample=self.resampling)
        else:
            shape = (size, int((image.height / image.width) * size))
            if image.width >= image.height:
                shape = (int((image.width / image.height) * size), size)
            image = image.resize(shape, resample=self.resampling)
            left, top = (int(side / 2 - size / 2) for side in image.size)
            image = image.crop((left, top, left + size, top + size))
        pixels = np.asarray(image, dtype=np.float32) / 255.0
        pixels = pixels * (1.0 / self.std) - self.mean / self.std
        return pixels.transpose(2, 0, 1)[None]

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        return self.visual.run(None, {"image": pixels})[0][0]

    def encode_text(self, text: str) -> np.ndarray:
        assert not self.canonicalize  # which the tokenizer does itself
        tokens = self.tokenizer.encode(" ".join(text.split())).ids
        return self.textual.run(None, {"text": np.array([tokens], dtype=np.int32)})[0][0]


def save_text_tower(folder: Path) -> str:
    """A model of open_clip with a BERT, which cleans captions in another way than CLIP does."""
    bert = str(save_bert(folder.with_name("bert")))
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "context_length": 12}
    text["tokenizer_kwargs"] = {"clean": "canonicalize"}
    save_open_clip(folder, {**CLIP, "text_cfg": {**text, "hf_proj_type": "linear"}})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(bert) / file, folder)
    return str(folder)


def save_masked(folder: Path) -> str:
    """A run of two encoders, whose text tower masks what its tokenizer pads."""
    given = save_encoders(folder.with_name("encoders"), size=32)
    return str(save_run(folder, replace(given, text=replace(given.text, pooling="last"))))


# Together they have each way to resize, each kind of tower, and each tokenizer.
MODELS = {
    "a run": lambda folder: str(save_run(folder, tiny_model())),
    "canonical": save_text_tower,
    "masked": save_masked,
    "dual encoder": lambda folder: f"hf:{save_dual_encoder(folder)}",
    "SigLIP": lambda folder: f"hf:{save_siglip(folder)}",
}


@pytest.mark.parametrize("kind", MODELS)
def test_immich_computes_what_the_model_does(kind, tmp_path):
    """From images and captions; from equal pixels up to rounding. The width is one of Immich's."""
    torch.manual_seed(0)  # how far the roundings of pixels carry depends on the weights
    reference = MODELS[kind](tmp_path / "model")
    facts = protoclip.export(reference, tmp_path / "out", "immich")
    assert facts["formats"] == {"immich": "in place of ViT-B-32__openai"}
    service = Service(tmp_path / "out" / "immich")
    model, transform, tokenizer = protoclip.load(reference)
    with torch.inference_mode():
        pixels = torch.stack([transform(image) for image in IMAGES])
        images = model.encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(tokenizer(TEXTS), normalize=True).numpy()
    width = images.shape[1]
    same = np.stack([service.encode_pixels(image.numpy()[None]) for image in pixels])
    found = np.stack([service.encode_pixels(service.prepare(image)) for image in IMAGES])
    queries = np.stack([service.encode_text(text) for text in TEXTS])
    assert {vectors.shape[1] for vectors in (same, found, queries)} == {512}
    np.testing.assert_allclose(same[:, :width], images, atol=1e-4)
    np.testing.assert_allclose(queries[:, :width], texts, atol=1e-4)
    assert ((found[:, :width] * images).sum(1) > 0.999).all()
    assert not same[:, width:].any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"embed_dim": 1600}, "its vectors have 1600 numbers, and Immich's at most 1536"),
        ({}, r"Immich resizes no images as it does \(longest, bicubic\)"),
    ],
)
def test_what_immich_cannot_hold_is_left_out(changes, reason, tmp_path):
    how = {} if changes else {"resize_mode": "longest"}
    model = save_open_clip(tmp_path / "model", {**CLIP, **changes}, **how)
    with pytest.raises(ValueError, match=f"not as immich: {reason}; choose other formats$"):
        protoclip.export(str(model), tmp_path / "out", ["immich"])
    facts = protoclip.export(str(model), tmp_path / "out", ["immich", "open_clip"])
    assert [*facts["formats"]] == ["open_clip"]
    assert not (tmp_path / "out" / "immich").exists()
