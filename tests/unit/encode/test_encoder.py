"""Frozen models of one modality: what they open, how they read, and by which engine."""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import protoclip
from protoclip.config import ModelConfig, TextTowerConfig
from protoclip.data.access import cache_folder
from protoclip.data.pairs import Sample
from protoclip.data.transforms import EvaluationTransform, MiddleTransform
from protoclip.encode import engine as module
from protoclip.encode.encoder import Encoder, freeze, image_encoder, open_encoder, text_encoder
from protoclip.encode.engine import PACKAGES, accelerate
from protoclip.encode.run import encode_missing
from protoclip.encode.store import FULL, Store, hash_ids
from protoclip.models.loading import MAX_TOKENS
from protoclip.models.open_clip import open_clip_tokenizer
from protoclip.models.start import resolve_start
from testing import save_to_bytes, tiny_pairs
from tiny_hugging_face import save_bert, save_dual_encoder, save_mpnet, save_roberta
from tiny_starts import CLIP

CAPTIONS = ["a dog", "a", "the red fox jumps over a lazy dog and over the river"]
CPU = torch.device("cpu")


def opened(teacher: str, modality: str = "auto", pooling: Any = "mean") -> Encoder:
    return open_encoder(teacher, modality=modality, pooling=pooling, device=CPU)


def prepared(encoder: Encoder, image: Image.Image) -> Tensor:
    """The input of an image."""
    sample = Sample(sample_id="a", image=save_to_bytes(image), captions=(), where="")
    pixels: Tensor = encoder.prepare(sample)
    return pixels


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a BERT of random weights that reads letters."""
    return str(save_bert(tmp_path_factory.mktemp("bert"), max_position_embeddings=64))


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_padding_does_not_change_a_feature(bert, pooling):
    """In a batch each caption gets the unit-norm feature that it gets alone in float64."""
    model = transformers.BertModel.from_pretrained(bert).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    expected = []
    for caption in CAPTIONS:
        with torch.no_grad():
            out = model(tokenizer(caption, return_tensors="pt")["input_ids"])
        states = out.last_hidden_state[0]
        one = {"mean": states.mean(0), "cls": states[0], "pooler": out.pooler_output[0]}[pooling]
        expected.append(one / one.norm())
    encoder = opened(f"hf:{bert}", pooling=pooling)
    assert (encoder.width, encoder.reads) == (32, "text")
    long, longer = encoder.encode(["dog " * 30 + "a", "dog " * 30 + "a fox"])  # the model's limit
    torch.testing.assert_close(long, longer)
    found = encoder.encode(CAPTIONS).double()
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=0)


def test_a_model_without_pooler_is_refused(bert, tmp_path):
    """Weights that the files lack would be random. Other poolings do not need them."""
    model = transformers.BertModel.from_pretrained(bert, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pooling 'pooler' needs pooler.*files do not hold"):
        opened(f"hf:{tmp_path}", pooling="pooler")
    first, second = opened(f"hf:{tmp_path}"), opened(f"hf:{tmp_path}")
    torch.testing.assert_close(first.encode(CAPTIONS), opened(f"hf:{bert}").encode(CAPTIONS))
    assert first.checksum() == second.checksum()
    next(second.module.parameters()).data[0, 0] += 1e-3
    assert first.checksum() != second.checksum()


def test_timm_models_give_pooled_features(tmp_path):
    """With the model's own transform and without its classifier. The weights may be in a file."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    encoder = opened(f"timm:resnet10t/{tmp_path}/weights.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    inputs = transform(Image.fromarray(pixels))
    expected = model.forward_features(inputs[None]).mean((2, 3))[0]
    assert (encoder.width, encoder.reads) == (512, "image")
    found = encoder.encode([prepared(encoder, Image.fromarray(pixels))])[0]
    torch.testing.assert_close(found, expected / expected.norm())
    long = Image.fromarray(np.tile(pixels, (1, 9, 1)))
    torch.testing.assert_close(prepared(encoder, long), MiddleTransform(transform)(long))
    assert encoder.facts() == repr(transform)  # or all would be encoded anew


def test_open_clip_models_give_either_tower(tmp_path, monkeypatch):
    """The image tower unless text is asked. The weights may be in a file."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
    model, transform, _ = protoclip.load("open_clip:tiny")
    towers: Any = model.towers
    tokenizer = open_clip_tokenizer(open_clip.get_model_config("tiny")["text_cfg"])
    torch.save(towers.state_dict(), tmp_path / "weights.pt")
    image = opened(f"open_clip:tiny/{tmp_path}/weights.pt")
    text = opened(f"open_clip:tiny/{tmp_path}/weights.pt", modality="text")
    assert (image.reads, text.reads) == ("image", "text")
    pixels = prepared(image, Image.new("RGB", (300, 260), (200, 30, 90)))
    tokens = tokenizer(CAPTIONS)
    assert pixels.tolist()[0][0] == [200, 30, 90]
    whole = transform(Image.new("RGB", (300, 260), (200, 30, 90)))
    expected = towers.encode_image(whole[None], normalize=True)
    torch.testing.assert_close(image.encode([pixels]), expected)
    torch.testing.assert_close(text.encode(CAPTIONS), towers.encode_text(tokens, normalize=True))


def test_a_model_of_transformers_with_two_towers_gives_either(tmp_path):
    folder = save_dual_encoder(tmp_path)
    image, text = opened(f"hf:{folder}"), opened(f"hf:{folder}", modality="text")
    assert (image.reads, text.reads) == ("image", "text")
    model, _, tokenizer = protoclip.load(f"hf:{folder}")
    expected = model.encode_text(tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(text.encode(CAPTIONS), expected)


def test_a_tokenizer_that_reads_otherwise_is_another_encoder():
    """Over the same weights: as with capitals kept that were not before."""

    def key(tokenizer: Callable[[str], str]) -> str:
        def collate(texts: list[str]) -> Tensor:
            codes = [[ord(letter) % 97 for letter in tokenizer(text)[:60]] for text in texts]
            return torch.tensor([(code + 60 * [0])[:60] for code in codes], dtype=torch.float32)

        torch.manual_seed(0)
        encoder = text_encoder(nn.Linear(60, 4), CPU, collate, lambda x: x[:, :4])
        return encoder.key()

    def plain(text: str) -> str:
        return text

    assert len({key(plain), key(str.lower), key(lambda text: text.replace("ï", "i"))}) == 3
    assert key(plain) == key(plain)


@pytest.mark.parametrize("save", [save_bert, save_mpnet, save_roberta])
def test_a_long_caption_is_cut_to_the_positions_of_the_model(save, tmp_path):
    """RoBERTa and MPNet have two more, which no token gets."""
    folder = save(tmp_path)
    teacher = open_encoder(
        f"hf:{folder}", modality="auto", pooling="mean", device=torch.device("cpu")
    )
    long, longer = teacher.encode(["a dog " * 11, "a dog " * MAX_TOKENS])  # 24 tokens of both
    torch.testing.assert_close(long, longer)
    assert teacher.encode(["a dog " * MAX_TOKENS]).isfinite().all()
    section = ModelConfig(text=TextTowerConfig(name=str(folder)))
    assert resolve_start(section).context_length == 24


NUMBER, SIZE = 30, 16


class Model(nn.Module):
    """A small convolutional net; a `fixed` one can only be traced for batches of one size."""

    def __init__(self, *, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.last = nn.Linear(8 * 49, 12)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.norm(self.first(images)).relu()
        return self.last(rows.reshape(len(rows), -1) if self.fixed else rows.flatten(1))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    for name in ("SECONDS_TO_OPEN", "LEAST_PASSES"):
        monkeypatch.setattr(module, name, 0)
    monkeypatch.setattr(module, "SECONDS_FOR_TRIALS", dict.fromkeys(("image", "text"), 0))


def make_encoder(engine: Any, *, fixed: bool = False, **settings: Any) -> Encoder:
    torch.manual_seed(0)
    model = freeze(Model(fixed=fixed), CPU)
    transform = EvaluationTransform(size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    return image_encoder(model, CPU, model, transform, engine=engine, **settings)


def encode_pairs(encoder: Encoder, folder: Path | None = None) -> np.ndarray:
    """Features of tiny pairs, in batches of 4 of which the last is smaller."""
    folder = folder or Path(tempfile.mkdtemp(dir=cache_folder().parent))
    images = tiny_pairs(NUMBER)["image"].to_pylist()
    store, hashes = Store(folder, dtype=FULL), hash_ids(map(str, range(NUMBER)))

    def read(row: int) -> Sample:
        return Sample(sample_id=str(row), image=images[row], captions=(), where="")

    assert encode_missing(store, encoder, hashes, read, batch_size=4) == {}
    return store.read(store.find(hashes))


def needs(engine: str) -> None:
    if not all(map(find_spec, PACKAGES[engine])):  # nothing is imported
        pytest.skip(f"needs {PACKAGES[engine]}")


def list_cache() -> list[str]:
    """The names of files except locks."""
    return sorted(path.name for path in cache_folder().rglob("*.*") if path.suffix != ".lock")


@pytest.mark.parametrize("engine", PACKAGES)
@pytest.mark.parametrize("unit_norm", [True, False])
def test_an_engine_gives_the_features_of_pytorch(engine, unit_norm, tmp_path):
    """By the same key; the store says what made them."""
    needs(engine)
    plain, fast = (make_encoder(name, unit_norm=unit_norm) for name in ("torch", engine))
    expected = encode_pairs(plain, tmp_path / "torch")
    np.testing.assert_allclose(encode_pairs(fast, tmp_path / "fast"), expected, atol=1e-5)
    assert plain.key() == fast.key()
    assert not (tmp_path / "torch" / "engines.txt").exists()
    assert (tmp_path / "fast" / "engines.txt").read_text().startswith(PACKAGES[engine][-1])
    assert sys.modules.get("openvino_telemetry") is None  # nothing is sent


def test_the_fastest_is_taken_once_and_for_all(monkeypatch, capsys):
    """Later passes time nothing. If PyTorch is nearly as fast it stays, and nothing is kept."""
    needs("onnx")
    monkeypatch.setattr(module, "PACKAGES", {"onnx": PACKAGES["onnx"]})
    rates = iter([100.0, 120.0])
    monkeypatch.setattr(module, "measure_rate", lambda *_: next(rates))
    first = encode_pairs(make_encoder("auto"))
    said = capsys.readouterr().err
    assert "compares engines once" in said
    assert "engine onnx (images a second: torch 100, onnx 120)" in said
    assert np.array_equal(encode_pairs(make_encoder("auto")), first)
    assert "note" not in capsys.readouterr().err
    folder = next((cache_folder() / "engines").iterdir())
    assert list_cache() == ["choice.json", "model.onnx"]
    assert json.loads((folder / "choice.json").read_text())["engine"] == "onnx"

    (folder / "choice.json").unlink()
    rates = iter([100.0, 109.0])
    assert np.array_equal(encode_pairs(make_encoder("auto")), encode_pairs(make_encoder("torch")))
    assert list_cache() == ["choice.json"]


@pytest.mark.parametrize(
    ("fixed", "reason"), [(False, "it differs from PyTorch by"), (True, "[ONNXRuntimeError]")]
)
def test_an_engine_that_differs_or_fails_is_not_used(fixed, reason, monkeypatch, capsys):
    """With a note, also where the setting names the engine, and with the same bits."""
    needs("onnx")
    expected = encode_pairs(make_encoder("torch"))

    def open_wrong(*arguments: Any) -> Any:
        run = module.open_onnx(*arguments)
        return lambda inputs: run(inputs) + 1e-3

    monkeypatch.setitem(module.OPENERS, "onnx", open_wrong)
    encoder = make_encoder("onnx", fixed=fixed, name="mine")
    assert np.array_equal(encode_pairs(encoder), expected)
    assert f"note: mine: engine onnx is not used ({reason}" in capsys.readouterr().err


def test_little_work_stays_with_pytorch(monkeypatch):
    """By the seconds that it takes; an engine that was chosen before opens for less work."""
    needs("onnx")
    monkeypatch.setitem(module.SECONDS_FOR_TRIALS, "image", 1e9)
    expected = encode_pairs(make_encoder("torch"))
    assert np.array_equal(encode_pairs(make_encoder("auto")), expected)
    assert list_cache() == []
    encode_pairs(make_encoder("onnx"))  # which is named, so it is used
    assert list_cache() == ["model.onnx"]
    rates = count(100, 50)  # PyTorch comes first
    monkeypatch.setattr(module, "measure_rate", lambda *_: next(rates))
    monkeypatch.setitem(module.SECONDS_FOR_TRIALS, "image", 0)
    encode_pairs(make_encoder("auto"))
    monkeypatch.setitem(module.SECONDS_FOR_TRIALS, "image", 1e9)
    encoder = accelerate(make_encoder("auto"), NUMBER)
    encoder.encode([*encoder.examples])
    assert encoder.forward.chosen != "torch"
    monkeypatch.setattr(module, "SECONDS_TO_OPEN", 1e9)
    encoder = accelerate(make_encoder("auto"), NUMBER)
    encoder.encode([*encoder.examples])
    assert encoder.forward.chosen == "torch"


class TextModel(nn.Module):
    """Means of embeddings, through attention; padding is 0."""

    ignores_padding = True

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(300, 32)
        self.layer = nn.Linear(32, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        words, mask = self.words(tokens), (tokens != 0).unsqueeze(1)
        scores = (words @ words.transpose(1, 2)).masked_fill(~mask, -1e4)
        return (self.layer(scores.softmax(-1) @ words) * mask.transpose(1, 2)).sum(1)


def tokenize(texts: list[str]) -> Tensor:
    rows = torch.zeros(len(texts), 40, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor([*map(ord, text)])
    return rows


@pytest.mark.parametrize("engine", PACKAGES)
def test_captions_of_any_length_pass_an_engine(engine):
    needs(engine)
    torch.manual_seed(0)
    model = freeze(TextModel(), CPU)
    captions = [[("a bird " * 5)[:length]] for length in range(30, 1, -3)]
    exact = text_encoder(model, CPU, tokenize, model, engine="torch")
    encoder = accelerate(text_encoder(model, CPU, tokenize, model, engine=engine), len(captions))
    expected = torch.cat([exact.encode(texts) for texts in captions])
    features = torch.cat([encoder.encode(texts) for texts in captions])
    assert encoder.forward.chosen == engine
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_models_on_a_card_or_in_bfloat16_stay_with_pytorch():
    encoder = make_encoder("onnx")
    encoder.device = torch.device("cuda")
    assert accelerate(encoder, 10**9) is encoder
    assert accelerate(plain := make_encoder("torch"), 10**9) is plain
    encoder = make_encoder("onnx")
    encoder.autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    assert accelerate(encoder, 10**9) is encoder


def test_an_engine_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    encoder = make_encoder("auto")
    assert accelerate(encoder, 10**9) is encoder
    with pytest.raises(ValueError, match=r"^encode\.engine: openvino needs: pip install onnx"):
        accelerate(make_encoder("openvino"), 1)
