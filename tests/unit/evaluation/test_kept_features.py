"""Features: bad images, ranks, worker processes, and what is kept on disk."""

import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image
from solid import Guessing, Knowing, Solid, tokenizer, transform
from torch import nn

from protoclip.data.pairs import Sample
from protoclip.data.transforms import EvaluationTransform, PillowTransform
from protoclip.distributed import collectives
from protoclip.distributed.parallel import load_whole, shard
from protoclip.encode.encoder import image_encoder
from protoclip.encode.features import Encoder
from protoclip.encode.run import encode_numbers
from protoclip.encode.store import FULL, Store
from protoclip.models.protoclip import ProtoCLIP
from testing import run_distributed

NUMBERS = list(range(23))


def encoder(model=None, **settings):
    given = {"transform": transform, "tokenizer": tokenizer, "batch_size": 4, "workers": 0}
    return Encoder(model=model or Guessing(), **{**given, **settings})


def encoded(bad, workers=0):
    own = encoder(workers=workers)
    found = own.encode_images(Solid("x", NUMBERS, bad), stage="x")
    return found.features, found.bad, own.encode_texts([f"number {n}" for n in NUMBERS], stage="y")


@pytest.mark.parametrize("bad", [(0, 4, 5, 6, 7, 22), tuple(range(1, 23))])
def test_bad_images_are_left_out_and_ranks_agree(bad):
    """Wherever they are: in some batches, the whole of one, or all but one image."""
    good = torch.tensor([n for n in NUMBERS if n not in bad])
    for found, left_out, texts in (encoded(bad), *run_distributed(encoded, 2, bad)):
        assert torch.equal(found, Guessing().table[good])
        assert torch.equal(texts, Guessing().text_table[: len(NUMBERS)])
        assert [row for row, _ in left_out] == list(bad)
        assert all(why == f"sample 'x/{row}' (x): broken" for row, why in left_out)


def test_threads_change_nothing():
    alone, (rows, _, _) = encoded((3,)), encoded((3,), workers=2)
    assert torch.equal(rows, alone[0])


@pytest.mark.parametrize("kind", [EvaluationTransform, PillowTransform])
@pytest.mark.parametrize("size", [(40, 64), (64, 40), (33, 47)])
def test_decoding_from_bytes_equals_the_transform(size, kind):
    """To the last bit, for files that are not decoded at a fraction of their size."""
    own = kind(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    files = []
    for seed in range(6):
        pixels = np.random.default_rng(seed).integers(256, size=(*size, 3)).astype(np.uint8)
        files.append(io.BytesIO())
        Image.fromarray(pixels).save(files[-1], ["PNG", "WebP", "JPEG"][seed % 3])
    made = image_encoder(nn.Identity(), torch.device("cpu"), lambda images: images, own)
    samples = [
        Sample(sample_id="x", image=file.getvalue(), captions=(), where="x") for file in files
    ]
    batch = [made.prepare(sample) for sample in samples]
    assert batch[0].dtype == made.examples[0].dtype == torch.uint8
    assert batch[0].shape == made.examples[0].shape
    expected = torch.stack([own(Image.open(file)) for file in files])
    assert torch.equal(made.forward(made.collate(batch)), expected)


class TinyTowers(nn.Module):
    """The least that can be sharded."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.7))

    def encode_image(self, images, normalize=False):
        return self.visual(images.flatten(1))


def encode_some_items(model, number, broken=None):
    """Features of the first items, of which one cannot be read."""

    def read(item):
        if item == broken:
            raise OSError(f"image {broken}: gone")
        return item, torch.tensor(item).float().expand(3, 1, 2)

    def blank(*_):
        return torch.zeros(3, 1, 2)

    cpu = torch.device("cpu")
    encoder = image_encoder(model, cpu, model.encode_image, blank, unit_norm=False)
    store = Store(None, dtype=FULL, is_optional=True)
    encode_numbers(store, encoder, np.arange(number), read, label="", unit=2)
    return torch.from_numpy(store.read(np.arange(len(store)))).view(-1, 4)


def sharded_features(numbers):
    """Features by a model of which each rank has a shard, and the error for an unreadable image."""
    torch.manual_seed(0)
    model = whole = ProtoCLIP(TinyTowers(), nn.Linear(4, 4))
    if collectives.world_size() > 1:
        model = copy.deepcopy(whole)
        shard(model, torch.device("cpu"))
        load_whole(model, whole if collectives.rank() == 0 else None)
    found = [encode_some_items(model, number) for number in numbers]
    with pytest.raises((OSError, ValueError)) as error:
        encode_some_items(model, 8, broken=3)
    return found, str(error.value)


def test_every_rank_enters_every_forward_of_a_sharded_model():
    """Without rows, with fewer batches than ranks, and with a last round that only one rank has.
    An error on one rank ends all ranks before the forward."""
    numbers = [0, 1, 3, 9, 10]
    ((expected, _),) = run_distributed(sharded_features, 1, numbers)
    assert [len(rows) for rows in expected] == numbers
    for found, error in run_distributed(sharded_features, 2, numbers):
        for rows, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(rows, wanted)
        assert error == "image 3: gone"


def test_features_are_computed_once_and_kept(tmp_path):
    """With what is bad; as long as model, images and texts are the same."""
    images, texts = Solid("x", NUMBERS, bad=(2,)), ["number 1"]
    first = encoder(Knowing(), cache=tmp_path)
    rows, text = first.encode_images(images, stage="x"), first.encode_texts(texts, stage="x")
    again = encoder(Knowing(), cache=tmp_path)
    found = again.encode_images(images, stage="x")
    assert torch.equal(found.features, rows.features)
    assert found.bad == list(rows.bad)
    assert torch.equal(again.encode_texts(texts, stage="x"), text)
    assert again.model.calls == {"image": 1, "text": 1}  # of the key alone
    again.encode_images(Solid("x", NUMBERS), stage="x")
    again.encode_texts(["number 2"], stage="x")
    assert again.model.calls == {"image": 1 + 1, "text": 2}  # the one that was bad
    images.key = ""
    again.encode_images(images, stage="x")
    assert again.model.calls["image"] == 1 + 1 + 6


def some_images(cache):
    """What is encoded of some images after others, and their features."""
    encoder(cache=cache).encode_images(Solid("x", [5, 1, 2, 2, 3]), stage="x")
    own = encoder(cache=cache)
    features = own.encode_images(Solid("y", [3, 4, 9, 1, 1], bad=(2,)), stage="y").features
    return own.model.calls["image"], features


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_image_is_encoded_once_whoever_asks_for_it_among_others(ranks, tmp_path):
    found = run_distributed(some_images, ranks, tmp_path)
    assert all(torch.equal(features, Guessing().table[[3, 4, 1, 1]]) for _, features in found)
    assert sum(calls for calls, _ in found) == ranks + 1  # that of each key, and one image


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    found = encoder(cache=tmp_path / "file").encode_images(Solid("x", NUMBERS), stage="x")
    assert len(found.features) == len(NUMBERS)
    assert "features are not kept" in capsys.readouterr().err


def test_the_key_is_the_content():
    """Weights, activations, the transform, how much is read of a caption; not the object."""
    plain = encoder().key
    assert encoder().key == plain

    def darker(image):
        return transform(image) // 2

    wider = Guessing()
    wider.activation = nn.GELU()

    def longer(texts):
        return torch.nn.functional.pad(tokenizer(texts), (0, 1))

    others = [encoder(Guessing(1)), encoder(transform=darker), encoder(wider)]
    others.append(encoder(tokenizer=longer))
    assert len({plain, *(other.key for other in others)}) == 5
