"""Streams over tar shards: their order, where they go on, and what they survive."""

import gc
import io
import itertools
import json
import shlex
import tarfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from protoclip.data import stream as streams
from protoclip.data.access import Access
from protoclip.data.pairs import BadSample, Sample, SampleStream
from protoclip.data.sampler import BLOCK_STREAM, SHARD_STREAM, generator
from protoclip.data.shards import open_shards
from protoclip.data.stream import ShardStream, read_ahead

SIZES = (5, 3, 7, 4, 6)
COMMANDS, OWN_HOST = Access(commands=True), Access(private_hosts=True)


def tar(keys: list[str], *, size: int = 40) -> bytes:
    """A tar of samples with random bytes for pictures."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for key in keys:
            image = np.random.default_rng(int(key)).bytes(size)
            for kind, data in (("jpg", image), ("txt", f"caption {key}".encode())):
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of 3 to 7 samples: 25 in all."""
    numbers = itertools.count()
    for shard, size in enumerate(SIZES):
        keys = [f"{next(numbers):03d}" for _ in range(size)]
        (tmp_path / f"{shard}.tar").write_bytes(tar(keys))
    return tmp_path


def stream(source, **options) -> ShardStream:
    return ShardStream(source, **{"seed": 3, "shuffle": 4, **options})


def take(source: ShardStream, count: int, first: int = 0) -> list[Sample | BadSample]:
    found = source.samples(first)
    items = list(itertools.islice(found, count))
    found.close()
    return items


def ids(items: list[Sample | BadSample]) -> list[str]:
    return [item.sample_id for item in items]


def restated(folder: Path, count: int, *, seed: int, rank: int, world: int, shuffle: int):
    """The order by its definition: deal permuted shards, then permute blocks of what they hold in
    one pass."""
    passes: dict[int, list[str]] = {}
    shards = sorted(folder.glob("*.tar"))
    for position in range(rank, world * count, world):
        turn, place = divmod(position, len(shards))
        order = generator(seed, SHARD_STREAM, turn).permutation(len(shards))
        with tarfile.open(shards[order[place]]) as opened:
            names = [name for name in opened.getnames() if name.endswith(".jpg")]
        stem = shards[order[place]].stem
        passes.setdefault(turn, []).extend(f"{stem}/{name[:-4]}" for name in names)
    found: list[str] = []
    start = 0
    for samples in passes.values():
        for first in range(0, len(samples), shuffle):
            block = samples[first : first + shuffle]
            draw = generator(seed, BLOCK_STREAM, start * world + rank).permutation(len(block))
            found += [block[offset] for offset in draw]
            start += len(block)
    assert len(found) >= count
    return found[:count]


@pytest.mark.parametrize("shuffle", [1, 4, 64])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 3), (6, 7)])
def test_the_order_is_its_definition(folder: Path, shuffle: int, rank: int, world: int) -> None:
    """Over several passes, for any number of processes and any size of block."""
    found = take(stream(str(folder), rank=rank, world_size=world, shuffle=shuffle), 90)
    assert ids(found) == restated(folder, 90, seed=3, rank=rank, world=world, shuffle=shuffle)


def test_a_stream_keeps_the_contract_and_gives_what_an_index_gives(folder: Path) -> None:
    """One pass of one process holds every sample once, as the index has it."""
    source = stream(str(folder), shuffle=25)
    assert isinstance(source, SampleStream)
    assert source.name == str(folder)
    streamed = {s.sample_id: (s.image, s.captions) for s in take(source, 25)}
    pairs = open_shards(str(folder), cache=folder / "cache")
    indexed = {s.sample_id: (s.image, s.captions) for s in map(pairs.sample, range(25))}
    assert streamed == indexed
    assert len(streamed) == 25


@pytest.mark.parametrize("world", [2, 3, 5])
def test_a_pass_over_all_processes_holds_every_sample_once(folder: Path, world: int) -> None:
    """For `world` passes together: each sample comes `world` times, whatever process it meets."""
    counts: Counter[str] = Counter()
    for rank in range(world):
        # Five times `world` positions, five for each process: `world` whole passes.
        source = stream(str(folder), rank=rank, world_size=world, shuffle=1)
        shards = [source._shard(turn * world + rank) for turn in range(len(SIZES))]
        number = sum(SIZES[int(Path(shard).stem)] for shard in shards)
        counts.update(ids(take(source, number)))
    assert set(counts.values()) == {world}
    assert len(counts) == 25


def test_seeds_passes_and_processes_have_orders_of_their_own(folder: Path) -> None:
    """No two of them are equal."""
    orders = [ids(take(stream(str(folder), seed=seed, shuffle=25), 25)) for seed in range(3)]
    orders.append(ids(take(stream(str(folder), seed=0, shuffle=25), 25, first=25)))
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("shuffle", [1, 4, 10])
def test_samples_from_any_number_on_are_those_of_the_whole(folder: Path, shuffle: int) -> None:
    """Asked for in any order, of a new stream or of one that has been read."""
    whole = ids(take(stream(str(folder), shuffle=shuffle), 120))
    used = stream(str(folder), shuffle=shuffle)
    for first in (57, 0, 3, 80, 4, 79, 81, 25):
        expected = whole[first : first + 30]
        assert ids(take(used, 30, first)) == expected
        assert ids(take(stream(str(folder), shuffle=shuffle), 30, first)) == expected


def test_blocks_that_end_by_their_bytes_keep_the_order_exact(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of three samples by bytes: any beginning, and a landmark, still fit."""
    monkeypatch.setattr(streams, "BLOCK_BYTES", 100)
    source = stream(str(folder), shuffle=64)
    whole = ids(take(source, 100))
    assert whole == restated(folder, 100, seed=3, rank=0, world=1, shuffle=3)
    other = stream(str(folder), shuffle=64)
    other.learn(source.landmark(50))
    for first in (50, 7, 72):
        assert ids(take(other, 20, first)) == whole[first : first + 20]


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are opened from now on."""
    names: list[str] = []
    original = stream.read_shard

    def read(shard: str, *rest):
        names.append(shard)
        return original(shard, *rest)

    monkeypatch.setattr(streams, "read_shard", read)
    return names


def test_a_landmark_saves_reading_what_came_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is small and JSON-able; with it a new stream opens only what it needs."""
    source = stream(str(folder))
    whole = ids(take(source, 200))
    landmark = source.landmark(170)
    text = json.dumps(landmark)
    assert len(text) < 200
    read = opened(monkeypatch)
    other = stream(str(folder))
    other.learn(json.loads(text))
    assert ids(take(other, 4, 170)) == whole[170:174]
    # A block of four, the rest of its shard, and what is read ahead: a few shards of 3 to 7.
    assert len(read) <= 5
    assert ids(take(stream(str(folder)), 4, 170)) == whole[170:174]
    assert len(read) > 30


def test_going_back_in_the_same_stream_reads_no_more_than_a_shard_and_a_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the second pass over an episode does."""
    source = stream(str(folder))
    whole = ids(take(source, 200))
    read = opened(monkeypatch)
    assert ids(take(source, 1, 170)) == whole[170:171]
    assert len(read) <= 5


def test_foreign_landmarks(folder: Path) -> None:
    """Other shards, seed or blocks are an error; another rank's is passed over."""
    whole = ids(take(source := stream(str(folder)), 100))
    landmark = source.landmark(90)
    assert landmark["sample"] > 0
    for other in (stream(str(folder), seed=4), stream(str(folder), shuffle=5)):
        with pytest.raises(ValueError, match="the stream cannot go on; restore them"):
            other.learn(landmark)
    (folder / "9.tar").write_bytes(tar(["900"]))
    with pytest.raises(ValueError, match=r"the shards, the seed or data\.shuffle are not those"):
        stream(str(folder)).learn(landmark)
    (folder / "9.tar").unlink()
    second = stream(str(folder), rank=1, world_size=2)
    expected = ids(take(second, 5, 90))
    third = stream(str(folder), rank=1, world_size=2)
    third.learn(landmark)
    assert ids(take(third, 5, 90)) == expected != whole[90:95]


def test_landmarks_at_the_beginning(folder: Path) -> None:
    """A stream that was not read has one, and it changes nothing."""
    source = stream(str(folder))
    other = stream(str(folder))
    other.learn(source.landmark(1000))
    assert ids(take(other, 10)) == ids(take(source, 10))


# Sources.


@pytest.mark.parametrize("handler", ["ranges", "whole"])
def test_shards_of_a_web_server(folder: Path, serve: Callable[..., str], handler: str) -> None:
    """The samples of the files, over requests of ranges or of the whole; a missing one is bad."""
    server = serve(handler, folder)
    local = take(stream(str(folder)), 60)
    remote = take(stream(server + "/{0..4}.tar", access=OWN_HOST), 60)
    assert [(s.sample_id, s.image, s.captions) for s in remote] == [
        (s.sample_id, s.image, s.captions) for s in local
    ]
    found = take(stream(server + "/{0..5}.tar", shuffle=1, access=OWN_HOST), 30)
    (bad,) = {b.where: b for b in found if isinstance(b, BadSample)}.values()
    assert (bad.sample_id, bad.where, bad.reason) == ("5", f"{server}/5.tar", "no such file")


def test_shards_of_a_file_system_of_fsspec(folder: Path, bucket: str) -> None:
    """The samples of the files, by a glob."""
    for path in folder.glob("*.tar"):
        with fsspec.open(f"{bucket}/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    remote = take(stream(f"{bucket}/*.tar"), 60)
    assert ids(remote) == ids(take(stream(str(folder)), 60))


def test_shards_of_commands(folder: Path) -> None:
    """The samples of the files, though the command writes on behind the tar's end."""
    place = shlex.quote(str(folder))
    command = f"pipe:cat {place}/{{0..4}}.tar; head -c 3000000 /dev/zero"
    assert ids(take(stream(command, access=COMMANDS), 60)) == ids(take(stream(str(folder)), 60))


# Faults.


def reasons(items: list[Sample | BadSample]) -> set[tuple[str, str]]:
    return {(b.sample_id, b.reason) for b in items if isinstance(b, BadSample)}


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("false", "the command ended with status 1"),
        ("no-such-program 2>/dev/null", "the command ended with status 127"),
        ("true", "not a tar file"),
        (
            "head -c 3000 {folder}/0.tar; exit 3",
            "the command ended with status 3 after 1 samples; what follows is lost, at least 1",
        ),
        (
            "head -c 3000 {folder}/0.tar",
            "cut short after 1 samples; what follows is lost, at least 1",
        ),
    ],
)
def test_commands_that_fail(folder: Path, command: str, reason: str) -> None:
    """One bad sample says why; the other shards, and what came before, are read."""
    good = [str(folder / f"{shard}.tar") for shard in (1, 2)]
    command = "pipe:" + command.format(folder=folder)
    found = take(stream([*good, command], shuffle=1, access=COMMANDS), 60)
    assert {reason for _, reason in reasons(found)} == {reason}
    whole = {s.sample_id for s in found if isinstance(s, Sample)}
    assert len(whole) == 10 + ("head" in command)


def test_truncated_and_foreign_files_do_not_end_a_stream(folder: Path) -> None:
    """What is whole is read, the rest is named, and the next shard follows."""
    cut = folder / "2.tar"
    cut.write_bytes(cut.read_bytes()[: 2 * 2048 + 700])
    (folder / "4.tar").write_bytes(b"nothing of the kind")
    found = take(stream(str(folder), shuffle=1), 60)
    cut_short = "cut short after 2 samples; what follows is lost, at least 1"
    assert reasons(found) == {("2/010", cut_short), ("4", "not a tar file")}
    assert len({s.sample_id for s in found if isinstance(s, Sample)}) == 5 + 3 + 2 + 4


def test_a_shard_that_vanishes_is_a_bad_sample(folder: Path) -> None:
    """Files are looked for when the stream is made; later it goes on without them."""
    source = stream(str(folder), shuffle=1)
    (folder / "3.tar").unlink()
    assert reasons(take(source, 60)) == {("3", "no such file")}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"garbage", "not a tar file"),
        (tar([]), "it holds no sample"),
    ],
)
def test_a_stream_without_a_single_sample_ends(tmp_path: Path, content: bytes, reason) -> None:
    """With a line that names the last reason, rather than never."""
    for shard in range(3):
        (tmp_path / f"{shard}.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"3 shards in a row without a sample .*: " + reason):
        take(stream(str(tmp_path), shuffle=1), 1000)


def test_a_stream_whose_captions_are_all_missing_ends(folder: Path) -> None:
    """Bad samples alone do not go on for ever either."""
    with pytest.raises(ValueError, match=r"5 shards in a row without a sample .*: empty caption"):
        take(stream(str(folder), caption_key="nothing"), 1000)


def test_a_stream_of_many_shards_ends_before_trying_all(folder: Path, monkeypatch) -> None:
    """Where a place cannot be reached, thousands of attempts tell nothing new."""
    monkeypatch.setattr(streams, "MAX_FAILED", 3)
    for path in folder.glob("*.tar"):
        path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="3 shards in a row without a sample"):
        take(stream(str(folder), shuffle=1), 100)


def test_failing_shards_among_good_ones_go_on(folder: Path) -> None:
    """Many in a row, over several passes, are no reason to stop while one can be read."""
    for shard in range(1, 5):
        (folder / f"{shard}.tar").write_bytes(b"garbage")
    found = take(stream(str(folder), shuffle=1, rank=1, world_size=3), 200)
    assert {s.sample_id for s in found if isinstance(s, Sample)} == {f"0/00{n}" for n in range(5)}


def test_a_block_has_a_size() -> None:
    with pytest.raises(ValueError, match=r"data\.shuffle: 0 is not a number of samples"):
        stream("https://host/0.tar", shuffle=0)


# Reading ahead.


def alive() -> int:
    return sum(t.name == "protoclip-read-ahead" for t in threading.enumerate())


def settle(count: int) -> bool:
    """Whether so many threads of ours are left, within a few seconds."""
    end = time.monotonic() + 5
    while alive() != count and time.monotonic() < end:
        time.sleep(0.01)
    return alive() == count


@pytest.mark.parametrize("end", ["close", "drop"])
def test_the_thread_ends_with_its_iterator(folder: Path, end: str) -> None:
    """Closed or dropped in the middle, while it waits for room."""
    assert settle(0)
    items = stream(str(folder)).samples()
    next(items)
    assert alive() == 1
    if end == "close":
        items.close()
    else:
        del items
        gc.collect()
    assert settle(0)


def test_a_thread_in_the_middle_of_a_block_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of a million samples, of a shard without end, is given up once nobody waits."""

    def endless(shard: str, *rest: object) -> Iterator[BadSample]:
        while True:
            time.sleep(0.001)
            yield BadSample("some", shard, "made to last")

    monkeypatch.setattr(streams, "read_shard", endless)
    source = stream(str(folder), shuffle=10**6)
    started: list[threading.Event] = []

    def make(stopped: threading.Event):
        started.append(stopped)
        return source._blocks(0, stopped)

    waiting = threading.Thread(target=lambda: next(read_ahead(make, slots=2), None))
    waiting.start()
    while not started:
        time.sleep(0.01)
    assert alive() == 1
    started[0].set()
    waiting.join(5)
    assert settle(0)


def test_no_more_is_read_ahead_than_there_are_slots() -> None:
    """With two slots, one item beyond the one in use."""
    made: list[int] = []

    def make(stopped: threading.Event):
        for number in range(100):
            made.append(number)
            yield number

    ahead = read_ahead(make, slots=2)
    for number in range(5):
        assert next(ahead) == number
        end = time.monotonic() + 5
        while len(made) < number + 2 and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(made) == number + 2
    assert list(ahead) == list(range(5, 100))
    assert settle(0)


def test_what_a_thread_raises_is_raised_to_the_reader() -> None:
    """After the items before it, with its own type, and without a hang."""

    def make(stopped: threading.Event):
        yield 1
        raise LookupError("gone")

    ahead = read_ahead(make, slots=2)
    assert next(ahead) == 1
    with pytest.raises(LookupError, match="gone"):
        next(ahead)
    assert settle(0)


def test_memory_is_that_of_two_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are given up as they are handed out: few of a long stream are alive at once."""
    made: list[weakref.ref] = []
    original = stream._sample

    def remember(*args):
        sample = original(*args)
        made.append(weakref.ref(sample))
        return sample

    monkeypatch.setattr(streams, "_sample", remember)
    items = stream(str(folder), shuffle=10).samples()
    most = 0
    for _ in range(100):
        next(items)
        most = max(most, sum(ref() is not None for ref in made))
    items.close()
    assert len(made) >= 100
    assert 10 <= most <= 22  # with one that is being read and one that is in use
