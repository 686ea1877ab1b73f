"""One byte of a file changes: it is noticed, or what is read is the same."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import protoclip
from interrupting import with_changes
from protoclip.config import Config
from protoclip.data.pairs import ImageTextPairs
from protoclip.data.split import hold_out_rows
from protoclip.data.tables import ROWS, build_index
from protoclip.encode.store import FULL, Store, hash_ids
from protoclip.encode.teachers import read_teacher, write_folder
from protoclip.evaluation.metrics import SampleResults
from protoclip.files import read_toml
from protoclip.training.folder import find_newest_intact, inspect_folder
from protoclip.training.plan import resolve_settings
from testing import tiny_config, tiny_pairs

IDS = [f"sample/{row}" for row in range(12)]
FLIPS = 50  # of each file
Read = Callable[[], object]


def flipped(path: Path) -> Iterator[None]:
    """Change one byte after the other, by one bit or all, and change it back."""
    content = path.read_bytes()
    generator = random.Random(path.name)
    places = range(len(content))
    for place in sorted(generator.sample(places, min(FLIPS, len(content)))):
        changed = bytearray(content)
        changed[place] ^= generator.choice([1, 2, 16, 128, 255])
        path.unlink()  # a map of the old content stays as it is
        path.write_bytes(changed)
        yield
    path.unlink()
    path.write_bytes(content)


def batches(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    facts["notes"] = ["as told"]
    for first in range(0, 12, 4):
        rows = range(first, first + 4)
        columns: list[list[Any]] = [
            [f"{row}.png" for row in rows],
            [[b"a", b"caption %d" % row] for row in rows],
            IDS[first : first + 4],
        ]
        arrays = [pa.array(values, kind.type) for values, kind in zip(columns, ROWS, strict=True)]
        yield pa.RecordBatch.from_arrays(arrays, schema=ROWS)


def index(folder: Path) -> Read:
    def never(facts: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        raise ValueError("damaged, and built again")
        yield

    def read() -> object:
        found = build_index("key", never, folder=folder, label="there", way_out="wait")
        pairs = ImageTextPairs(found, name="x")
        # Row by row, as in training.
        rows = [(pairs.sample_id(row), pairs.where(row)) for row in range(len(pairs))]
        captions = [pairs.sample_captions(row) for row in range(len(pairs))]
        return rows, captions, found.notes

    build_index("key", batches, folder=folder, label="there", way_out="wait")
    return read


def teacher(folder: Path) -> Read:
    features = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float16)
    write_folder(folder, IDS, np.array_split(features, 3), {"teacher": "test"})

    def read() -> object:
        found = read_teacher(folder)
        return found.count_missing(IDS), found.lookup(IDS).tolist()

    return read


def held_out(folder: Path) -> Read:
    pairs = ImageTextPairs(tiny_pairs(30), name="tiny")
    distinct = pairs.table.set_column(1, "caption", pa.array([str(row) for row in range(30)]))
    pairs = ImageTextPairs(distinct, name="tiny")
    return lambda: hold_out_rows([pairs], share=0.2, folder=folder).tolist()


def kept_features(folder: Path) -> Read:
    hashes = hash_ids(str(row) for row in range(5))
    store = Store(folder / "a", dtype=FULL, is_optional=True)
    store.add(hashes, np.eye(5, dtype=np.float32))
    hashes.tofile(folder / "a" / "mine.hashes")

    def read() -> object:
        again = Store(folder / "a", dtype=FULL, is_optional=True)
        listed = np.fromfile(folder / "a" / "mine.hashes", np.uint64)
        if not again.has(listed).all():
            raise ValueError("damaged, and made again")
        return listed.tolist(), again.read(again.find(listed)).tolist()

    return read


def sample_results(folder: Path) -> Read:
    ids = np.array(IDS, dtype=object)
    rank = np.arange(12)
    images = {"sample_id": ids, "group": ids, "zero_shot_rank": rank, "knn_correct": rank % 2 == 0}
    texts = {"sample_id": ids[:6], "group": ids[:6], "text_to_image_rank": rank[:6]}
    SampleResults(images=images, texts=texts).write(folder / "a.parquet")

    def read() -> object:
        found = SampleResults.read(folder / "a.parquet")
        parts = (found.images, found.texts)
        return [{name: list(values) for name, values in part.items()} for part in parts]

    return read


def outcome(read: Read) -> tuple[object, str]:
    """What was read, or the error's message."""
    try:
        return read(), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize(
    "make",
    [index, teacher, held_out, kept_features, sample_results],
    ids=["index", "teacher", "held out", "features", "samples"],
)
def test_a_flipped_byte_is_noticed(make: Callable[[Path], Read], tmp_path: Path) -> None:
    read = make(tmp_path)
    expected = read()
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    noticed = 0
    for path in files:
        for _ in flipped(path):
            found, said = outcome(read)
            if said:
                assert "damaged" in said or "not the results" in said, said
                assert "\n" not in said
                noticed += 1
            else:
                assert found == expected, path.name
    assert noticed > 20 or make is held_out  # those are chosen again
    assert read() == expected


def test_a_byte_in_each_file_of_a_run_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a run goes on, or a model, results or settings are used. People read the logs."""
    folder = tmp_path / "run"
    for name, rows in (("pairs", 48), ("held_out", 24)):
        pq.write_table(tiny_pairs(rows, seed=rows), tmp_path / f"{name}.parquet")
    config = tiny_config(f"{tmp_path}/pairs.parquet", out=str(folder))
    sections = {
        "data": {"validation": f"{tmp_path}/held_out.parquet"},
        "episodes": {"size": 16, "count": 2, "warm_up": 1, "locked_image": 0},
    }
    protoclip.train(with_changes(config, sections))
    config = Config.from_dict(read_toml(folder / "config.toml"))
    logs = ("metrics.jsonl", "events.out")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not path.name.startswith(logs)]
    # Bytes that mean nothing may change there, such as the last digit of a float.
    places = {"config.toml": b"seed = 0", "results.json": b'"samples_seen": 32'}

    def said() -> str:
        notes: list[str] = []
        errors = []
        for use in (
            lambda: find_newest_intact(folder, notes),
            lambda: inspect_folder(resolve_settings(config), resume=True),
            lambda: [SampleResults.read(path) for path in folder.glob("results/*.parquet")],
        ):
            try:
                use()
            except ValueError as error:
                errors.append(str(error))
        return "\n".join([*notes, *errors, capsys.readouterr().err])

    capsys.readouterr()
    assert said() == ""
    generator = random.Random(0)
    for path in files:
        content = path.read_bytes()
        place = generator.randrange(len(content))
        if path.name in places:
            place = content.index(places[path.name]) + len(places[path.name]) - 1
        if path.suffix == ".parquet":  # in its footer are bytes that mean nothing; these are ids
            place = pq.read_metadata(path).row_group(0).column(1).data_page_offset - 1
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        expected = "run.seed" if path.name == "config.toml" else path.name
        assert expected in said(), path.name
        path.write_bytes(content)
    kinds = {path.suffix for path in files}
    assert kinds == {".json", ".safetensors", ".toml", ".parquet"}
    assert said() == ""
