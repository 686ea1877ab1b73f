"""`data.only` and `data.without`: the samples that lists of ids choose, in every kind of source."""

import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tars import write_tar

from protoclip.config import Config, DataConfig, SourceConfig
from protoclip.data import sources
from protoclip.data.pairs import Pairs, SampleStream
from protoclip.data.sampler import episodes
from protoclip.data.split import read_ids
from protoclip.evaluation.validation import split_validation
from testing import save_to_bytes


def png(number: int) -> bytes:
    return save_to_bytes(Image.new("RGB", (8, 8), (number, 0, 0)))


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs as a table with ids, a table without, a folder, and tar shards."""
    top = tmp_path_factory.mktemp("chosen")
    images = [png(number) for number in range(12)]
    captions = [f"caption {number}" for number in range(12)]
    table = pa.table({"image": images, "caption": captions})
    pq.write_table(
        table.append_column("sample_id", [[f"id {n}" for n in range(12)]]), top / "ids.parquet"
    )
    pq.write_table(table, top / "plain.parquet")
    (top / "folder").mkdir()
    lines = ["filepath\ttitle"]
    for number in range(12):
        (top / "folder" / f"{number:02d}.png").write_bytes(images[number])
        (top / "folder" / f"{number:02d}.txt").write_text(captions[number])
        lines.append(f"folder/{number:02d}.png\t{captions[number]}")
    (top / "table.tsv").write_text("\n".join(lines))
    for shard in range(3):
        files: dict[str, bytes] = {}
        for number in range(4 * shard, 4 * shard + 4):
            files |= {
                f"{number:03d}.png": images[number],
                f"{number:03d}.txt": captions[number].encode(),
            }
        write_tar(top / "shards" / f"{shard}.tar", files)
    return top


IDS = {
    "ids.parquet": "id {}",
    "plain.parquet": "plain.parquet/{}",
    "folder": "{:02d}",
    "table.tsv": "table.tsv/{}",
    "shards": None,
}


def id_of(source: str, number: int) -> str:
    form = IDS[source]
    return f"{number // 4}/{number:03d}" if form is None else form.format(number)


def listed(folder: Path, ids: list[str], name: str = "list.json") -> str:
    (folder / name).write_text(json.dumps(ids))
    return str(folder / name)


def opened(**data: object) -> Pairs | SampleStream:
    return sources.open_samples(Config(data=DataConfig(**data)))


def captions_in(pairs: Pairs | SampleStream) -> list[str]:
    assert isinstance(pairs, Pairs)
    return [pairs.sample(row).captions[0] for row in range(len(pairs))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'x,sample_id\n,1\n"q,q",b/c\n'),
        ("a.csv", "\ufeffcaption;sample_id\r\n;1\r\n;b/c\r\n\r\n"),
        ("a.tsv", "1\nb/c"),
        ("a.json", '[{"sample_id": 1, "x": 2}, {"sample_id": "b/c"}]'),
    ],
)
def test_forms_of_a_list(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_ids("only", str(tmp_path / name)) == {"1", "b/c"}


@pytest.mark.parametrize("source", IDS)
def test_every_source_is_filtered(source, top, tmp_path):
    """Samples keep their ids; `without` wins; unknown ids are counted."""
    only = listed(tmp_path, [id_of(source, n) for n in (2, 5, 9, 11)] + ["no such"])
    without = listed(tmp_path, [id_of(source, 5)], "without.json")
    pairs = opened(train=str(top / source), only=only, without=without)
    assert captions_in(pairs) == ["caption 2", "caption 9", "caption 11"]
    assert list(pairs.sample_ids()) == [id_of(source, n) for n in (2, 9, 11)]
    assert [pairs.sample_id(row) for row in range(3)] == list(pairs.sample_ids())
    assert pairs.notes[-2:] == [
        "data.only and data.without: 3 of 12 samples are used",
        f"data.only: {only}: 1 of 5 ids are of no sample, such as 'no such'",
    ]
    again = pickle.loads(pickle.dumps(pairs))
    assert captions_in(again) == captions_in(pairs)


def mixture(top: Path, **settings: object) -> dict[str, object]:
    entries = [
        SourceConfig(path=str(top / name), name=short, **settings)
        for name, short in (("ids.parquet", "a"), ("plain.parquet", "b"))
    ]
    return {"sources": entries}


def test_a_mixture_is_filtered_by_ids_with_the_source_name(top, tmp_path):
    pairs = opened(**mixture(top), only=listed(tmp_path, ["a/id 3", "b/7", "id 4"]))
    assert list(pairs.sample_ids()) == ["a/id 3", "b/7"]
    assert captions_in(pairs) == ["caption 3", "caption 7"]
    assert "1 of 3 ids are of no sample, such as 'id 4'" in sources.list_notes(pairs)[-1]


def test_a_source_without_samples_needs_to_have_no_weight(top, tmp_path):
    only = listed(tmp_path, ["b/1", "b/7"])
    pairs = opened(**mixture(top), only=only)
    assert captions_in(pairs) == ["caption 1", "caption 7"]
    config = Config(data=DataConfig(**mixture(top), only=only))
    config = replace(config, episodes=replace(config.episodes, size=4))
    assert set(episodes(config, pairs)(0).rows.tolist()) <= {0, 1}
    with pytest.raises(ValueError, match="no sample is left in 'a', which has a weight"):
        opened(**mixture(top, weight=1.0), only=only)


def test_held_out_pairs_are_among_the_chosen(top, tmp_path):
    """With the captions and classes of their rows."""
    table = pq.read_table(top / "ids.parquet").append_column("kind", [["even", "odd"] * 6])
    pq.write_table(table, tmp_path / "a.parquet")
    only = listed(tmp_path, [f"id {row}" for row in range(10)])
    path = str(tmp_path / "a.parquet")
    data = DataConfig(train=path, only=only, validation=0.5, class_column="kind")
    found = split_validation(Config(data=data), sources.open_samples(Config(data=data)))
    (held_out,) = found.data
    split = held_out.splits["validation"]
    ids = [split.images.sample_id(row) for row in range(len(split.images))]
    assert len(ids) == 5
    assert sorted([*ids, *found.training.sample_ids()]) == [f"id {row}" for row in range(10)]
    for row, number in enumerate(int(name.removeprefix("id ")) for name in ids):
        assert split.captions[row] == (f"caption {number}",)
        assert held_out.class_names[int(split.labels[row])] == ("even", "odd")[number % 2]


def test_held_out_pairs_without_a_class_are_measured_by_their_captions_alone(top, tmp_path):
    kinds = ["" if row % 3 == 0 else ("even", "odd")[row % 2] for row in range(12)]
    table = pq.read_table(top / "ids.parquet").append_column("kind", [kinds])
    pq.write_table(table, tmp_path / "a.parquet")
    data = DataConfig(train=str(tmp_path / "a.parquet"), validation=0.5, class_column="kind")
    found = split_validation(Config(data=data), sources.open_samples(Config(data=data)))
    whole, known = (one.splits["validation"] for one in found.data)
    assert [one.name for one in found.data] == ["validation", "validation-with_class"]
    assert len(whole.images) == 6
    assert whole.labels is None
    assert known.captions is None  # their recall is that of all
    rows = [
        int(known.images.sample_id(row).removeprefix("id ")) for row in range(len(known.images))
    ]
    assert 0 < len(rows) < 6
    names = found.data[1].class_names
    assert [names[label] for label in known.labels.tolist()] == [kinds[row] for row in rows]


def test_a_validation_source_is_not_filtered(top, tmp_path):
    only = listed(tmp_path, [f"id {n}" for n in range(6)])
    data = DataConfig(
        train=str(top / "ids.parquet"), only=only, validation=str(top / "plain.parquet")
    )
    found = split_validation(Config(data=data), sources.open_samples(Config(data=data)))
    assert len(found.data[0].splits["validation"].images) == 12
    assert len(found.training) == 6


def streamed(top: Path, **data: object) -> SampleStream:
    stream = opened(train=str(top / "shards"), read="streaming", shuffle_buffer=3, **data)
    assert isinstance(stream, SampleStream)
    return stream


def ids(stream: SampleStream, number: int, first: int = 0) -> list[str]:
    items = stream.samples(first)
    found = [item.sample_id for item in itertools.islice(items, number)]
    items.close()  # type: ignore[attr-defined]
    return found


def test_a_stream_of_which_nothing_is_left_ends(top, tmp_path):
    with pytest.raises(ValueError, match=r"no sample is left by data.only"):
        ids(streamed(top, only=listed(tmp_path, ["x"])), 1)


def test_a_mixture_of_streams_is_filtered(top, tmp_path):
    entries = [SourceConfig(path=str(top / "shards"), name=name, weight=1.0) for name in "ab"]
    only = listed(tmp_path, ["a/0/001", "b/2/009"])
    stream = opened(sources=entries, read="streaming", only=only)
    assert set(ids(stream, 40)) == {"a/0/001", "b/2/009"}
    assert any("not counted" in note for note in sources.list_notes(stream))
