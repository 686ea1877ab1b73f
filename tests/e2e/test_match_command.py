"""`protoclip match` on tiny data, with tiny encoders."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import save_file

from protoclip.cli import main
from protoclip.encode.encoder import Encoder
from testing import tiny_pairs

PAIRS, BAD = 120, 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes whose captions differ; one image is damaged, and another one is there twice."""
    table = tiny_pairs(PAIRS)
    images = table["image"].to_pylist()
    captions = [f"{text} {row}" for row, text in enumerate(table["caption"].to_pylist())]
    images[BAD], images[9] = b"no image", images[8]
    path = tmp_path_factory.mktemp("data") / "pairs.parquet"
    pq.write_table(pa.table({"image": images, "caption": captions}), path)
    return path


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A timm model in a file, and a BERT in a folder, of random weights."""
    pytest.importorskip("transformers")
    from tiny_hugging_face import save_bert

    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), folder / "weights.safetensors")
    return f"timm:test_resnet/{folder}/weights.safetensors", f"hf:{save_bert(folder / 'bert')}"


def test_every_pair_of_encoders_is_ranked_and_each_encodes_once(
    data, encoders, tiny_run, tmp_path, capsys, monkeypatch
):
    """Towers of a run are encoders too. What cannot be read is left out, and counted. Equal images
    and captions in another table are known."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    encoded: Counter[int] = Counter()

    def encode(self, inputs, before=Encoder.encode):
        encoded[id(self.prepare)] += len(inputs)  # which a faster copy shares
        return before(self, inputs)

    monkeypatch.setattr(Encoder, "encode", encode)
    image, text = encoders
    words = ["match", "--images", image, str(tiny_run), "--texts", text, str(tiny_run), text]
    words += ["--data", str(data), "--seed", "1", "--batch_size", "32"]
    main([*words, "--json"])
    out = capsys.readouterr()
    records = json.loads(out.out)
    assert {(one["image"], one["text"]) for one in records} == {
        (of_images, of_texts)
        for of_images in (image, str(tiny_run))
        for of_texts in (text, str(tiny_run))
    }
    assert [one["recall@10"] for one in records] == sorted(
        (one["recall@10"] for one in records), reverse=True
    )
    # An image or two captions more to see how wide features are, and as many for the key,
    # that tells an encoder from others.
    different = len({*pq.read_table(data)["image"].to_pylist()} - {b"no image"})
    assert sorted(encoded.values()) == sorted([different + 2] * 2 + [PAIRS + 2, PAIRS + 4])
    for one in records:
        assert (one["pairs"], one["skipped"]) == (PAIRS - 1, 1)
        assert one["recall@10"] == pytest.approx(
            (one["recall@10/text_to_image"] + one["recall@10/image_to_text"]) / 2
        )
        assert one["images_per_second"] > 0 < one["captions_per_second"]
        low, high = one["recall@10/interval"]
        assert 0 <= low <= one["recall@10"] <= high <= 1
        width = 96 if one["image"] == image else 16  # of the last layer, which may have another
        assert one["image_width"] == width or "last+" in one["image_layers"]
        assert one["text_width"] == (32 if one["text"] == text else 16)
        assert one["text_layers"] == ("last" if one["text"] == text else "")
    (of_run,) = (one for one in records if one["image"] == one["text"])
    assert of_run["recall@10"] > 1.5 * of_run["recall@10/by_chance"]
    assert "pairs.parquet: 1 of the pairs cannot be read; left out" in out.err
    encoded.clear()
    main(words)
    again = capsys.readouterr().out
    assert again.index(f"{100 * records[0]['recall@10']:.1f}%") > 0
    assert "Ordered by recall@10" in again
    assert "kept" in again
    pq.write_table(pq.read_table(data).take([*range(PAIRS)][::-1]), tmp_path / "other.parquet")
    words[words.index(str(data))] = str(tmp_path / "other.parquet")
    main([*words, "--json"])
    (one, *_) = json.loads(capsys.readouterr().out)
    assert (one["images_per_second"], one["captions_per_second"], one["skipped"]) == (None, None, 1)
    assert sum(encoded.values()) == 2 * (2 * 2 + 2 + 4)


def test_two_encoders_of_a_side_are_ranked_as_one_too(data, encoders, tmp_path, capsys):
    """With the layers that `align` would choose, and what another one costs in time."""
    from tiny_hugging_face import save_bert

    image, text = encoders
    deep = f"hf:{save_bert(tmp_path / 'deep', num_hidden_layers=3)}"
    words = ["match", "--images", image, "--texts", text, deep, "--data", str(data), "--no-cache"]
    main([*words, "--json"])
    records = {one["text"]: one for one in json.loads(capsys.readouterr().out)}
    assert records.keys() == {text, deep, f"{text} & {deep}"}
    joined = records[f"{text} & {deep}"]
    assert (joined["text_layers"], joined["text_width"]) == ("last & last", 64)
    assert records[deep]["text_layers"] in ("last", "last+2")
    assert joined["captions_per_second"] < records[text]["captions_per_second"]
