"""`protoclip align` on tar shards that are streamed: encoded as they pass, and never again."""

import gzip
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip.data import shards as reading
from protoclip.data.pairs import ImageTextPairs, Sample
from protoclip.data.tools import pack
from protoclip.encode import encoder as encoders
from protoclip.encode import run as running
from protoclip.encode import stream as streamed
from protoclip.files import lock_path
from protoclip.training import plan as planning
from testing import run_distributed, tiny_pairs
from tiny_align import align_on_a_rank, assert_near, changed, rows_of

EPISODES = {"size": 16, "batch_size": 8, "count": 2}


@pytest.fixture(scope="module")
def shards(given, tmp_path_factory) -> Path:
    """The 96 pairs in three shards, one of them compressed, and 30 others in a fourth, one with an
    id of the former."""
    folder = tmp_path_factory.mktemp("streams")
    more = tiny_pairs(30, seed=5)
    ids = pa.array(["tiny/0", *(f"more/{number}" for number in range(29))])
    more = more.set_column(more.column_names.index("sample_id"), "sample_id", ids)
    tables = {"plain": pq.read_table(given["data"]["train"]), "more": more}
    for name, table in tables.items():
        pack(ImageTextPairs(table, name=name), folder / name, samples_per_shard=40)
    (folder / "more" / "00000.tar").rename(folder / "more" / "00009.tar")
    (folder / "mixed").mkdir()
    for number, path in enumerate(sorted((folder / "plain").glob("*.tar"))):
        content = path.read_bytes()
        kind, content = (".gz", gzip.compress(content)) if number == 1 else ("", content)
        (folder / "mixed" / f"{path.name}{kind}").write_bytes(content)
    return folder


def of(given: dict[str, Any], train: Path | str, **more: Any) -> dict[str, Any]:
    """Settings of a run over shards that are streamed."""
    data = {**given["data"], "train": str(train), "read": "streaming", **more.pop("data", {})}
    return changed({**given, "data": data}, **{"episodes": EPISODES, **more})


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of images that are encoded from now on."""
    names, make = list[str](), encoders.image_side

    def watched(*given: Any, **more: Any) -> Any:
        encoder = make(*given, **more)
        prepare = encoder.prepare

        def and_note(sample: Sample) -> Any:
            names.append(sample.sample_id)
            return prepare(sample)

        encoder.prepare = and_note
        return encoder

    for module in (encoders, planning):
        monkeypatch.setattr(module, "image_side", watched)
    return names


def by_id(settings: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What the store holds of each pair, by its id in the shards."""
    plan, encoded, _ = rows_of(settings)
    every = np.arange(len(plan.samples))
    ids = plan.samples.sample_ids()
    images, texts = encoded.image_rows(every), encoded.mean_text_rows(every)
    return {name: (*images[row].tolist(), *texts[row].tolist()) for row, name in enumerate(ids)}


def test_a_stream_gives_the_rows_that_its_shards_give(given, shards, store, monkeypatch):
    """Also compressed and filtered. A second run encodes nothing, and reads the first samples
    alone; a larger stream encodes what is new."""
    plain = of(given, shards / "plain")
    # A stream gives several layers however few its pairs are; a small table the last unless told.
    towers = {name: {**plain["model"][name], "joined_layers": "last"} for name in ("image", "text")}
    indexed = by_id(changed(plain, data={"read": "auto"}, model=towers))
    names = encoded(monkeypatch)
    stream = by_id(plain)
    assert len(stream) == 96
    assert len(names) == len({*names}) == 96
    for name, row in indexed.items():
        np.testing.assert_allclose(stream[name], row, atol=2e-3, rtol=2e-3)
    with monkeypatch.context() as patch:
        read, shown = reading.read_shard, list[Any]()

        def show(*given: Any, **more: Any) -> Any:
            for item in read(*given, **more):
                shown.append(item)
                yield item

        patch.setattr(reading, "read_shard", show)
        assert by_id(plain) == stream
        assert len(shown) < len(stream)
        patch.setattr(streamed, "WAIT", 0.0)
        with ExitStack() as stack:  # reading disturbs nobody, and nobody it
            for path in [path for path in store.glob("**/*") if path.is_dir()]:
                stack.enter_context(lock_path(path))
            assert by_id(plain) == stream
    larger = of(given, shards / "{plain,more}/*.tar")
    assert len(by_id(larger)) == 96 + 29
    assert "the same sample id as in a shard before" in "".join(rows_of(larger)[0].notes)
    assert len(names) == 96 + 30
    left_out = shards / "left_out.json"
    left_out.write_text(json.dumps([next(iter(rows_of(plain)[0].samples.sample_ids()))]))
    fewer = of(given, shards / "mixed/*.tar*", data={"without": str(left_out)})
    assert len(by_id(fewer)) == 95


def test_a_stream_goes_on_after_an_interruption(given, shards, store, monkeypatch):
    names = encoded(monkeypatch)
    write, left = streamed.write_atomically, [2]

    def full(path: Path, *rest: Any, **more: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device", path.name)
        write(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(running, "BLOCK_ROWS", 8)
        patch.setattr(streamed, "write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            rows_of(of(given, shards / "plain"))
    names.clear()
    assert len(by_id(of(given, shards / "plain"))) == 96
    assert len(names) == len({*names}) < 40  # what had been written is not encoded again


def test_a_mixture_of_streams_trains_by_ranks_and_goes_on(given, shards, tmp_path):
    """Each with its weight; a finished run is found again. It stays a stream, also unsaid."""
    sources = [
        {"path": str(shards / "mixed/*.tar*"), "name": "one", "weight": 0.75},
        {"path": str(shards / "more"), "name": "two", "weight": 0.25},
    ]
    data = {"sources": sources, "validation": given["data"]["validation"]}
    settings = of(given, "emoji", data=data)
    for ranks in (1, 2):
        settings = changed(settings, tmp_path / f"{ranks}")
        cache = str(tmp_path / f"cache{ranks}")
        first = run_distributed(align_on_a_rank, ranks, settings, cache)[0]
        assert first["steps"] == 4
        (tmp_path / f"{ranks}" / "results.json").unlink()
        unsaid = changed(settings, data={"read": "auto"})
        again = run_distributed(align_on_a_rank, 1, unsaid, cache, "auto")[0]
        assert again["metrics"] == first["metrics"]
    assert_near(tmp_path / "2", tmp_path / "1")


def test_what_is_bad_of_a_stream_is_said_and_left_out(given, shards, tmp_path, store):
    """A broken shard is read again until the run may go on without the rest of it."""
    whole = (shards / "more").glob("*.tar")
    content = next(whole).read_bytes()
    broken = tmp_path / "more.tar"
    broken.write_bytes(content[: len(content) // 2])
    settings = of(given, tmp_path / "*.tar", data={"max_bad_share": 0.5})
    with pytest.raises(
        ValueError, match=r"1 of 1 shards were not read to their end, such as .*; that is more than"
    ):
        rows_of(settings)
    with pytest.raises(ValueError, match="1 of 1 shards"):
        rows_of(settings)
    plan, encoded, _ = rows_of(changed(settings, data={"max_bad_share": 1.0}))
    assert 0 < len(plan.samples) == len(encoded) < 30
    assert sum("they are left out" in note for note in plan.notes) == 2
    broken.write_bytes(content)
    assert len(rows_of(settings)[0].samples) == 30


def test_shards_may_move(given, shards, store, tmp_path, monkeypatch):
    """As a job copies them to its own disk. Other content under a name is read."""
    settings = of(given, shards / "plain")
    before, names = by_id(settings), encoded(monkeypatch)
    moved = tmp_path / "scratch" / "plain"
    shutil.copytree(shards / "plain", moved, copy_function=shutil.copyfile)
    assert by_id(of(given, moved)) == before
    assert not names
    shutil.copy(next((shards / "more").glob("*.tar")), moved / "00000.tar")
    assert len(by_id(of(given, moved))) == 96 - 40 + 30
    assert len(names) == 30


def test_a_store_that_fails_for_long_ends_a_pass(given, shards, store, bucket, monkeypatch):
    """The same call reads all shards that were lost."""
    settings = of(given, f"{bucket}/a/{{0..2}}.tar")
    with monkeypatch.context() as patch:
        patch.setattr(streamed, "MAX_FAILED", 2)
        line = r"2 shards in a row .*s3://bucket/a/.\.tar: no such.* again \(.*\)$"
        with pytest.raises(ValueError, match=line):
            rows_of(settings)
    for number, path in enumerate(sorted((shards / "plain").glob("*.tar"))):
        fsspec.filesystem("s3").pipe(f"{bucket}/a/{number}.tar", path.read_bytes())
    assert len(rows_of(settings)[0].samples) == 96
