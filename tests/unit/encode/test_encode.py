"""Frozen models as teachers, and passes over a data set, with models that are made up."""

import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import protoclip
from protoclip.config import Config, DataConfig, TeacherConfig
from protoclip.data import sources
from protoclip.data.pack import pack
from protoclip.data.pairs import BadSample, ImageTextPairs, Sample, SampleStream
from protoclip.data.transforms import EvaluationTransform, OfMiddle
from protoclip.distributed import collectives
from protoclip.encode import encoder as encode
from protoclip.encode import parts, teachers
from protoclip.encode.encoder import Encoder, embed_teacher, open_encoder, text_encoder
from protoclip.encode.halves import image_half
from protoclip.encode.store import StoredFeatures
from protoclip.encode.teachers import read_teacher
from protoclip.encode.whiten import fit_pca
from protoclip.models.batch_norm import synchronise
from protoclip.models.projections import FrozenEncoders
from protoclip.models.protoclip import image_normalisation
from protoclip.models.tokenizers import open_clip_tokenizer
from testing import run_distributed, tiny_pairs

sys.path.append(str(Path(__file__).parents[2]))
from tiny_hugging_face import save_dual_encoder
from tiny_starts import CLIP

CAPTIONS = ["a dog", "a", "the red fox jumps over a lazy dog and over the river"]
CPU = torch.device("cpu")


def opened(teacher: str, modality: str = "auto", pooling: Any = "mean") -> Encoder:
    return open_encoder(teacher, modality=modality, pooling=pooling, device=CPU)


def prepared(encoder: Encoder, image: Image.Image) -> Tensor:
    """The input of an image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    sample = Sample(sample_id="a", image=file.getvalue(), captions=(), where="")
    pixels: Tensor = encoder.prepare(sample)
    return pixels


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a BERT of random weights and a vocabulary of a dozen words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models") / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*" ".join(CAPTIONS).split()})]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary, model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_padding_does_not_change_a_feature(bert, pooling):
    """In a batch each caption gets the unit-norm feature that it gets alone in float64."""
    transformers = pytest.importorskip("transformers")
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
    assert (encoder.width, encoder.reads) == (16, "text")
    long, longer = encoder.encode(["dog " * 30 + "a", "dog " * 30 + "a fox"])  # the model's limit
    torch.testing.assert_close(long, longer)
    found = encoder.encode(CAPTIONS).double()
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=0)


def test_a_model_without_pooler_is_refused(bert, tmp_path):
    """Weights that the files lack would be random. Other poolings do not need them."""
    transformers = pytest.importorskip("transformers")
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
    torch.testing.assert_close(prepared(encoder, long), OfMiddle(transform)(long))
    assert encoder.facts() == repr(transform)  # or all would be encoded anew
    save_file({"fc.weight": torch.ones(3)}, tmp_path / "others.safetensors")
    with pytest.raises(ValueError, match=r"cannot be opened: .*others.safetensors lacks conv1"):
        opened(f"timm:resnet10t/{tmp_path}/others.safetensors")


def test_open_clip_models_give_either_tower(tmp_path, monkeypatch):
    """The image tower unless text is asked. The weights may be in a file."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
    towers = protoclip.load("open_clip:tiny")[0].towers
    tokenizer = open_clip_tokenizer(open_clip.get_model_config("tiny")["text_cfg"])
    torch.save(towers.state_dict(), tmp_path / "weights.pt")
    image = opened(f"open_clip:tiny/{tmp_path}/weights.pt")
    text = opened(f"open_clip:tiny/{tmp_path}/weights.pt", modality="text")
    assert (image.reads, text.reads) == ("image", "text")
    pixels = prepared(image, Image.new("RGB", (300, 260), (200, 30, 90)))
    tokens = tokenizer(CAPTIONS)
    expected = towers.encode_image(pixels[None], normalize=True)
    torch.testing.assert_close(image.encode([pixels]), expected)
    mean, std = image_normalisation(towers)
    assert pixels[0, 0, 0].item() == pytest.approx((200 / 255 - mean[0]) / std[0], rel=1e-5)
    torch.testing.assert_close(text.encode(CAPTIONS), towers.encode_text(tokens, normalize=True))


def test_a_model_of_transformers_with_two_towers_gives_either(tmp_path):
    folder = save_dual_encoder(tmp_path)
    image, text = opened(f"hf:{folder}"), opened(f"hf:{folder}", modality="text")
    assert (image.reads, text.reads) == ("image", "text")
    model, _, tokenizer = protoclip.load(f"hf:{folder}")
    expected = model.encode_text(tokenizer(CAPTIONS), normalize=True)
    torch.testing.assert_close(text.encode(CAPTIONS), expected)


@pytest.mark.parametrize(
    ("teacher", "modality", "message"),
    [
        ("hf:", "auto", "'hf:' cannot be opened: no run folder, and none of hf:"),
        ("open_clip:RN50", "auto", "name the weights too, as in open_clip:RN50/openai"),
        ("open_clip:RN51/openai", "auto", "open_clip has no model 'RN51'"),
        ("open_clip:RN50/mine", "auto", "open_clip has no weights 'mine'"),
        ("timm:resnet10t,weights=x.pt", "auto", "is named as in timm:resnet50/FILE"),
        ("timm:resnet10x", "auto", "'timm:resnet10x' cannot be opened: Unknown model"),
        ("hf:{folder}", "auto", "Unrecognized model"),
        ("minilm", "auto", r"'minilm' cannot be opened: pip install 'protoclip\[teachers\]'"),
        ("hf:{bert}", "image", "cannot be opened: reads text only"),
        ("timm:resnet10t", "text", "--modality text: timm:resnet10t reads image only"),
    ],
)
def test_what_cannot_be_opened_is_named(teacher, modality, message, bert, tmp_path, monkeypatch):
    if teacher == "minilm":
        monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        opened(teacher.format(folder=tmp_path, bert=bert), modality)


WIDTH = 12


def letters(caption: str) -> np.ndarray:
    """The feature of the model that is made up: counts of letters."""
    return 1 + np.bincount([ord(letter) % WIDTH for letter in caption], minlength=WIDTH)


def stop() -> None:
    raise KeyboardInterrupt


class Letters:
    """A model that records the batches it reads, and may do something at one of them."""

    def __init__(self, at: int | None = None, then: Callable[[], None] = stop) -> None:
        self.at, self.then = at, then
        self.batches: list[list[str]] = []
        self.encoder = text_encoder(nn.Identity(), CPU, self.tokenize, lambda counts: counts)
        assert self.encoder.width == WIDTH
        self.batches.clear()

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        self.batches.append(captions)
        if self.at is not None and len(self.batches) > self.at:
            self.then()
        return torch.from_numpy(np.stack([letters(caption) for caption in captions]))

    @property
    def captions(self) -> list[str]:
        return [caption for batch in self.batches for caption in batch]


def run(model: Letters, samples: Any, out: Path, *, part: int = 10, **settings: Any) -> Any:
    """A pass in parts of ten samples and batches of four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "open_encoder", lambda *_, **__: model.encoder)
        patch.setattr(encode, "PART_ROWS", {"text": part})
        chosen: dict[str, Any] = {"teacher": "letters", "batch_size": 4, "device": CPU, **settings}
        return embed_teacher(samples=samples, out=out, **chosen)


def pairs(captions: list[Any], name: str = "made", **columns: list[str]) -> ImageTextPairs:
    """Pairs whose images are not there: whoever reads one finds a bad sample."""
    paths = ["nowhere.png"] * len(captions)
    return ImageTextPairs(pa.table({"caption": captions, "path": paths, **columns}), name=name)


def words(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    alphabet = list("abcdefghijklm")
    return [f"{''.join(generator.choice(alphabet, generator.integers(30)))}x" for _ in range(count)]


def unit(feature: np.ndarray) -> np.ndarray:
    return feature / np.linalg.norm(feature, axis=-1, keepdims=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_each_caption_is_read_once_without_its_image(tmp_path):
    """Batches hold captions of similar length. Several captions of a sample count alike."""
    captions = [[word] for word in words(47)]
    captions[5] = ["aaa", "bbbb", "cc"]
    flat, model = [word for own in captions for word in own], Letters()
    facts = run(model, pairs(captions), tmp_path / "t")
    assert sorted(model.captions) == sorted(flat)
    assert max(map(len, model.batches)) == 4
    assert model.captions[:12] == sorted(flat[:12], key=len, reverse=True)
    assert (facts["rows"], facts["width"], facts["bad"]) == (47, WIDTH, 0)
    assert (facts["modality"], facts["source"]) == ("text", "made")
    means = [sum(unit(letters(word)) for word in own) for own in captions]
    found = read_teacher(tmp_path / "t").lookup([f"made/{row}" for row in range(47)])
    np.testing.assert_allclose(found.numpy(), unit(np.stack(means)), atol=1e-3)
    assert sorted(content(tmp_path / "t")) == [
        *("checksums.npy", "facts.json", "features.npy", "index.npy"),
    ]


def test_bad_samples_have_no_row(tmp_path):
    """They are counted and listed with the reason; a source of nothing else is refused."""
    captions = words(24)
    captions[3] = captions[20] = " "
    facts = run(Letters(), pairs(captions), tmp_path / "t")
    assert (facts["rows"], facts["bad"]) == (22, 2)
    teacher = read_teacher(tmp_path / "t")
    assert teacher.missing(f"made/{row}" for row in range(24)) == 2
    assert teacher.lookup(["made/3"]).isnan().all()
    lines = (tmp_path / "t" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["sample_id"] for line in lines] == ["made/3", "made/20"]
    assert json.loads(lines[0])["reason"] == "empty caption"
    with pytest.raises(ValueError, match="no sample could be read"):
        run(Letters(), pairs([" "] * 3), tmp_path / "none")


def test_a_killed_pass_goes_on_after_its_last_part(tmp_path):
    """After SIGKILL in the third of five parts the first two are not encoded again, and the result
    is, byte for byte, that of a pass that was not interrupted."""
    captions = words(47)
    run(Letters(), pairs(captions), tmp_path / "whole", width=5)

    def interrupted() -> None:
        # Three batches a part: the eighth is in the middle of the third.
        model = Letters(at=7, then=lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(model, pairs(captions), tmp_path / "t", width=5)

    process = multiprocessing.get_context("fork").Process(target=interrupted)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "t" / "parts").glob("*.npz"))) == 2
    # A kill in the middle of writing leaves this.
    (tmp_path / "t" / "parts" / ".000002.npz.1.tmp").write_bytes(b"half of a part")
    with pytest.raises(ValueError, match="the same command again"):
        read_teacher(tmp_path / "t")
    resumed, again = Letters(), Letters()
    run(resumed, pairs(captions), tmp_path / "t", width=5)
    assert sorted(resumed.captions) == sorted(captions[20:])
    assert content(tmp_path / "t") == content(tmp_path / "whole")
    (tmp_path / "t" / "parts").mkdir()  # as a kill leaves it that comes at the very end
    (tmp_path / "t" / "parts" / "000000.npz").write_bytes(b"a part")
    run(again, pairs(captions), tmp_path / "t", width=5)
    assert again.captions == []
    assert content(tmp_path / "t") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": pairs(words(20), name="other")}, "source made, not other"),
        ({"samples": pairs(words(21))}, "samples 20, not 21"),
        ({"samples": pairs(words(20)[::-1])}, "other data, or before these were changed"),
        ({"width": 3}, "reduced_to None, not 3"),
        ({"teacher": "others"}, "teacher letters, not others"),
    ],
)
def test_a_folder_of_another_pass_is_kept(changed, message, tmp_path):
    """Neither a begun nor a finished pass goes on with something else."""
    with pytest.raises(KeyboardInterrupt):
        run(Letters(at=4), pairs(words(20)), tmp_path / "t")
    for _ in ("begun", "finished"):
        with pytest.raises(ValueError, match=message):
            run(Letters(), out=tmp_path / "t", **{"samples": pairs(words(20)), **changed})
        run(Letters(), pairs(words(20)), tmp_path / "t")


def test_what_cannot_work_is_refused_before_anything_is_encoded(tmp_path):
    """A width above the model's, duplicate ids, a folder that holds something else."""
    model, out = Letters(), tmp_path / "t"
    with pytest.raises(ValueError, match=r"--width: 13 is not between 1 and 12, letters's own"):
        run(model, pairs(words(5)), out, width=13)
    with pytest.raises(ValueError, match="made: 1 duplicate sample ids, such as 'i'"):
        run(model, pairs(["a", "b", "c"], sample_id=["i", "j", "i"]), out)
    with pytest.raises(ValueError, match="made is no stream"):
        run(model, pairs(words(5)), out, num_samples=3)
    with pytest.raises(ValueError, match="a stream needs --num_samples"):
        run(model, Stream(), out)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds notes.txt; choose a new or empty folder"):
        run(model, pairs(words(5)), tmp_path)
    assert model.batches == []
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_features_that_are_not_finite_stop_the_pass(tmp_path):
    """When they occur, with their number and an example."""
    model = Letters()
    counts = model.encoder.forward
    model.encoder.forward = lambda texts: counts(texts) / (counts(texts).sum(1, keepdim=True) < 17)
    with pytest.raises(ValueError, match=r"letters: 2 of 4 features are not finite.*'made/1'"):
        run(model, pairs(["a", "aaaaaa", "bb", "cccccccc"]), tmp_path / "t")


class Stream(SampleStream):
    """Seven samples over and over, one of them bad."""

    name, lanes = "stream", 1

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.learned: list[dict[str, Any]] = []

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Sample | BadSample]:
        self.asked.append(first)
        for place in itertools.count(first):
            turn, within = divmod(place, 7)
            number = (within * 3 + turn) % 7  # another order each time
            good = Sample(sample_id=f"s/{number}", image=b"", captions=("a" * number,), where="")
            yield BadSample("s/2", "a.tar", "no image") if number == 2 else good

    def state_dict(self, first: int, lane: int = 0) -> dict[str, Any]:
        return {"at": first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learned.append(state)


def test_each_sample_of_a_stream_is_encoded_once(tmp_path):
    """Neither repeats nor a restart encode it again."""
    # The first four samples are numbers 0, 3, 6 and the bad one: a batch of three.
    with pytest.raises(KeyboardInterrupt):
        run(Letters(at=1), Stream(), tmp_path / "t", num_samples=18, part=4)
    stream, model = Stream(), Letters()
    facts = run(model, stream, tmp_path / "t", num_samples=18, part=4)
    assert (stream.asked, stream.learned[-1]) == ([4], {"at": 4})
    assert sorted(map(len, model.captions)) == [1, 4, 5]
    assert (facts["rows"], facts["bad"]) == (6, 1)
    found = read_teacher(tmp_path / "t").lookup([f"s/{number}" for number in range(7)])
    assert found.isnan().all(1).tolist() == [number == 2 for number in range(7)]


def test_images_are_read_while_the_model_is_at_those_before():
    """One batch ahead, and no more of them."""
    number, size = 12, 4
    read = [threading.Event() for _ in range(number)]
    seen: list[int] = []

    def prepare(sample: Sample) -> int:
        row = int(sample.sample_id.partition("/")[2])
        read[row].set()
        return row

    def forward(rows: list[int]) -> Tensor:
        assert all(each.wait(10) for each in read[: rows[-1] + 1 + size]), "it waits for the model"
        seen.append(sum(each.is_set() for each in read))
        return torch.zeros(len(rows), WIDTH)

    encoder = Letters().encoder
    encoder.prepare, encoder.encode = prepare, forward
    samples = ImageTextPairs(tiny_pairs(number), name="tiny")
    encode.encode_images(encoder, samples, range(number), size, lambda done: None, 2)
    assert seen == [8, 12, 12]


def make(out: Path, width: int | None) -> dict[str, Any]:
    captions = words(47)
    captions[13] = " "  # a bad sample
    return run(Letters(), pairs(captions), out, part=5, width=width)


@pytest.mark.parametrize("width", [None, 3])
def test_several_ranks_make_the_folder_of_one_process(width, tmp_path):
    """Byte for byte, with ten parts over two ranks, and the facts on each."""
    one = make(tmp_path / "one", width)
    assert run_distributed(make, 2, tmp_path / "many", width) == [one, one]
    assert (one["rows"], one["bad"]) == (46, 1)
    assert content(tmp_path / "many") == content(tmp_path / "one")


def make_without_parts(out: Path, failing: int) -> str:
    """What a rank says of a pass in which one rank cannot make folders of parts."""
    mkdir = Path.mkdir

    def refused(folder: Path, *given: Any, **more: Any) -> None:
        if folder.name == encode.PARTS and collectives.rank() == failing:
            raise OSError("no room")
        mkdir(folder, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        try:
            make(out, None)
        except (OSError, ValueError) as error:
            return str(error)
    return "made"


def test_a_teacher_that_cannot_be_opened_is_reported_by_one_rank(tmp_path, monkeypatch):
    """The ranks open it together, so that the others know what the first one reports."""
    met: list[str] = []

    def on_all_ranks(function: Any) -> Any:
        try:
            return function()
        except ValueError as error:
            met.append(str(error))
            raise

    monkeypatch.setattr(encode, "raise_on_all_ranks", on_all_ranks)
    with pytest.raises(ValueError, match="'timm:no_such' cannot be opened") as raised:
        embed_teacher("timm:no_such", pairs(words(3)), tmp_path / "t", device=CPU)
    assert met == [str(raised.value)]


@pytest.mark.parametrize(("failing", "said"), [(0, "no room"), (1, "made")])
def test_no_rank_waits_for_one_that_cannot_make_a_folder(failing, said, tmp_path):
    """Only the first rank makes one; if it fails, both raise."""
    assert run_distributed(make_without_parts, 2, tmp_path / "t", failing) == [said] * 2


@pytest.mark.parametrize("form", ["npy", "npy with ids", "parquet"])
def test_features_of_ones_own_become_a_folder(form, tmp_path):
    """Those of the data's samples, in half precision; PCA of them is exact."""
    samples = pairs(words(20))
    ids = list(samples.sample_ids())
    features = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    file, known = tmp_path / f"own.{form.split()[0]}", ids
    if form == "parquet":
        known = ids[:15]
        rows = [*features[:15].tolist(), [0.0] * 6]
        pq.write_table(pa.table({"sample_id": [*known, "else"], "features": rows}), file)
    else:
        np.save(file, features)
    if form == "npy with ids":
        file.with_suffix(".ids.txt").write_text("\n".join(ids) + "\n")
    made = [
        embed_teacher(str(file), samples, tmp_path / str(width), width=width, device=CPU)
        for width in (None, 2)
    ]
    assert [(f["rows"], f["bad"], f["width"]) for f in made] == [
        (len(known), 20 - len(known), 6),
        (len(known), 20 - len(known), 2),
    ]
    found = read_teacher(tmp_path / "None").lookup(ids)
    np.testing.assert_allclose(found[: len(known)], features[: len(known)], atol=2e-3)
    assert found[len(known) :].isnan().all()
    mean, axes, _ = fit_pca([features[: len(known)]], 2)
    reduced = read_teacher(tmp_path / "2").lookup(known)
    np.testing.assert_allclose(reduced, (features[: len(known)] - mean) @ axes.T, atol=5e-3)
    with pytest.raises(ValueError, match=r"--width: 7 is not between 1 and 6"):
        embed_teacher(str(file), samples, tmp_path / "x", width=7, device=CPU)


NUMBERED = tiny_pairs(96).drop(["sample_id"])
NUMBERED = NUMBERED.set_column(1, "caption", [[f"number {row}" for row in range(96)]])
ROWS = {"all": np.arange(96), "turned": np.arange(96)[::-1], "some": np.arange(0, 96, 2)}


@pytest.mark.parametrize(
    ("modality", "rows", "change", "is_refused"),
    [
        ("text", "all", {}, False),
        ("text", "turned", {}, True),
        ("text", "some", {}, True),
        ("image", "turned", {}, True),
        ("text", "all", {"caption": ["other"] * 96}, True),
        ("image", "all", {"caption": ["other"] * 96}, False),
        # Ids that somebody gave stay with their rows.
        ("text", "turned", {"sample_id": [str(row) for row in range(96)]}, False),
    ],
)
def test_a_teacher_of_other_rows_under_the_same_numbers(modality, rows, change, is_refused):
    stored = read_teacher_of(ImageTextPairs(NUMBERED, name="made"), modality)
    table = NUMBERED.take(pa.array(ROWS[rows].copy()))
    for name, values in change.items():
        table = table.drop([name] if name in table.column_names else []).append_column(
            name, [values]
        )
    source = ImageTextPairs(table, name="made")
    refused = pytest.raises(ValueError, match=r"was made of another table .* column of ids")
    with refused if is_refused else nullcontext():
        teachers.require_same_rows(stored, source)
    teachers.require_same_rows(read_teacher_of(source, modality), source.subset(np.arange(9)))


def read_teacher_of(source: ImageTextPairs, modality: str) -> StoredFeatures:
    features = np.zeros((len(source), 2), np.float32)
    made = {"sample_ids": [*source.sample_ids()], "features": features}
    stored = StoredFeatures.in_memory(name="teacher", **made)
    teachers.require_same_rows(stored, source)  # of an earlier version, it says nothing
    stored.made_of = encode.read_content(source, modality)
    return stored


def test_a_tokenizer_that_reads_otherwise_is_another_half():
    """Over the same weights: as with capitals kept that were not before."""

    def key(tokenizer: Callable[[str], str]) -> str:
        def collate(texts: list[str]) -> Tensor:
            codes = [[ord(letter) % 97 for letter in tokenizer(text)[:60]] for text in texts]
            return torch.tensor([(each + 60 * [0])[:60] for each in codes], dtype=torch.float32)

        torch.manual_seed(0)
        encoder = text_encoder(nn.Linear(60, 4), CPU, collate, lambda x: x[:, :4])
        return encoder.key()

    def plain(text: str) -> str:
        return text

    assert len({key(plain), key(str.lower), key(lambda text: text.replace("ï", "i"))}) == 3
    assert key(plain) == key(plain)


@pytest.mark.parametrize(("own", "told"), [("tiny", 0), ("other", 1)])
def test_a_teacher_that_knows_none_of_a_stream_is_told(own, told, tmp_path):
    """Of pairs in a table it is refused, whose ids are all known at once."""
    table = tiny_pairs(20)
    pack(ImageTextPairs(table, name="tiny"), tmp_path / "shards")
    ids = [f"{own}/{row}" for row in range(20)]
    columns = {"sample_id": ids, "features": np.eye(20).tolist()}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    data = DataConfig(train=f"{tmp_path}/shards/*.tar", read="streaming")
    teacher = TeacherConfig(features=str(tmp_path / "t.parquet"), number=4)
    config, notes = Config(data=data, teacher=teacher), list[str]()
    teachers.teachers(config, sources.pairs(config), notes.append)
    assert ["has features of none of the first samples" in note for note in notes] == [True] * told


def test_parts_of_a_host_that_are_not_here_are_missed(tmp_path, monkeypatch):
    """Else their rows would be lost without a word."""
    monkeypatch.setattr(collectives, "UNSEEN", 0.2)
    (tmp_path / parts.PARTS).mkdir()
    facts = {"samples": 50, "part_rows": 20}
    for number in (0, 2):
        (tmp_path / parts.PARTS / f"{number:06d}.npz").touch()
    with pytest.raises(ValueError, match=r"2 of 3 parts are there; name a place that all hosts"):
        parts.require_all_parts(tmp_path, facts)
    (tmp_path / parts.PARTS / "000001.npz").touch()
    parts.require_all_parts(tmp_path, facts)


def test_ranks_that_see_other_samples_are_refused():
    seen = [[48, "a"], [48, "b"]]
    parts.require_same_for_all(seen, Path("out"))  # as rank 0 does
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "rank", lambda: 1)
        with pytest.raises(ValueError, match=r"out: .* sees other samples or weights than"):
            parts.require_same_for_all(seen, Path("out"))


def test_a_half_with_batch_norm_over_ranks_is_the_same_half():
    """Features that are kept beside such a run are found by its model, which has plain layers."""
    visual = SimpleNamespace(trunk=timm.create_model("test_resnet", num_classes=0))
    text = SimpleNamespace(
        pooler=nn.Identity(), transformer=nn.Identity(), config=SimpleNamespace(pad_token_id=0)
    )
    halves = FrozenEncoders(SimpleNamespace(visual=visual, text=text)).eval()
    transform = EvaluationTransform(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    encoder = image_half(halves, transform, max_pixels=10**6, autocast=nullcontext)
    plain = encoder.key()
    assert synchronise(halves, CPU) > 0
    assert encoder.key() == plain


class Twice(Stream):
    """A good sample whose id comes again, in another order: first the second one, which is bad."""

    def samples(self, first: int = 0, lane: int = 0) -> Iterator[Sample | BadSample]:
        good = Sample(sample_id="s/0", image=b"", captions=("a",), where="")
        return itertools.islice(itertools.cycle([BadSample("s/0", "", "twice"), good]), first, None)


@pytest.mark.parametrize("part", [1, 10])
def test_a_bad_sample_takes_no_row_from_a_good_one_of_its_id(part, tmp_path):
    facts = run(Letters(), Twice(), tmp_path / "t", num_samples=6, part=part)
    assert (facts["rows"], facts["bad"]) == (1, 0)
