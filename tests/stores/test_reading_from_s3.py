"""Tables, shards and evaluation data in an S3 bucket: what is read, also when the server fails."""

import io
import itertools
import re
import tarfile
from collections.abc import Callable
from typing import Any

import pyarrow.parquet as pq
import pytest
from fsspec.config import conf, set_conf_env
from PIL import Image

from interrupting import assert_equal_ends, config_for
from protoclip.config import Config, DataConfig
from protoclip.data import shards as streams
from protoclip.data import sources
from protoclip.data.access import describe_error, read_file
from protoclip.data.pairs import BadSample, ImageTextPairs, Sample
from protoclip.data.shards import ShardStream, expand_shards
from protoclip.evaluation.datasets import open_data
from protoclip.training import run
from testing import save_to_bytes, tiny_pairs

SHORT: dict[str, Any] = {"evaluate": False}


def opened(train: str, **settings: Any) -> Any:
    return sources.open_samples(Config(data=DataConfig(train=train, **settings)))


def images_of(pairs: ImageTextPairs) -> list[bytes]:
    return [pairs.sample(row).image for row in range(len(pairs))]


def put_table(store: Any, rows: int = 12) -> list[bytes]:
    """A CSV table beside the images that it names, which are returned."""
    table = tiny_pairs(rows).to_pylist()
    lines = ["image,caption,sample_id"]
    for number, row in enumerate(table):
        store.put(f"table/images/{number}.png", row["image"])
        lines.append(f"images/{number}.png,{row['caption']} {number},{number}")
    store.put("table/pairs.csv", "\n".join(lines).encode())
    return [row["image"] for row in table]


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


def put_shards(
    store: Any, *, number: int = 4, per_shard: int = 5, mode: str = "w"
) -> dict[str, bytes]:
    """Shards of tiny pairs; returns the images by sample id."""
    table, images = tiny_pairs(number * per_shard).to_pylist(), dict[str, bytes]()
    for shard in range(number):
        files = dict[str, bytes]()
        for row in range(shard * per_shard, (shard + 1) * per_shard):
            caption = f"{table[row]['caption']} {row}".encode()
            files |= {f"{row}.png": table[row]["image"], f"{row}.txt": caption}
            images[f"{shard:02}/{row}"] = table[row]["image"]
        end = ".gz" if mode == "w:gz" else ""
        store.put(f"shards/{shard:02}.tar{end}", tar_of(files, mode))
    return images


def streamed(pattern: str, number: int) -> dict[str, bytes]:
    samples = ShardStream(pattern, seed=3, shuffle=4).samples()
    items = list(itertools.islice(samples, number))
    samples.close()
    assert [item.reason for item in items if isinstance(item, BadSample)] == []
    return {item.sample_id: item.image for item in items if isinstance(item, Sample)}


def test_tables_are_read_with_the_images_that_they_name(store, tmp_path):
    """CSV and Parquet; one request an image."""
    images = put_table(store)
    pairs = opened(f"{store.url}/table/pairs.csv")
    store.requests.clear()
    assert images_of(pairs) == images
    assert len(store.requests) == len(images)
    pq.write_table(tiny_pairs(12), tmp_path / "pairs.parquet")
    url = store.put("pairs.parquet", (tmp_path / "pairs.parquet").read_bytes())
    assert images_of(opened(url)) == images


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_shards_are_streamed(store, mode):
    """Named by braces, by a star, or as a folder; compressed or not."""
    images = put_shards(store, mode=mode)
    end = ".tar.gz" if mode == "w:gz" else ".tar"
    for pattern in (f"{{00..03}}{end}", f"*{end}", *([""] if mode == "w" else [])):
        assert streamed(f"{store.url}/shards/{pattern}", len(images)) == images
    assert isinstance(opened(f"{store.url}/shards/*{end}"), ShardStream)


def put_evaluation_data(store: Any) -> list[bytes]:
    """Three images of two classes; returns their bytes."""
    files = dict[str, bytes]()
    for red in (10, 20, 30):
        image = save_to_bytes(Image.new("RGB", (4, 4), (red, 0, 0)))
        files |= {f"{red}.png": image, f"{red}.cls": b"%d" % (red == 20)}
    store.put("wds_pets/test/0.tar", tar_of(files))
    store.put("wds_pets/test/nshards.txt", b"1")
    store.put("wds_pets/classnames.txt", b"cat\ndog\n")
    store.put("wds_pets/zeroshot_classification_templates.txt", b"a {c}\n")
    return [data for name, data in files.items() if name.endswith("png")]


def test_workers_read_what_one_process_reads(store, tmp_path):
    """Forked, after this process has used the store; the same run bit for bit."""
    put_table(store, 48)
    train = f"{store.url}/table/pairs.csv"
    for workers in (0, 2):
        config = config_for(
            train,
            tmp_path / str(workers),
            run=SHORT,
            data={"workers": workers, "validation": 0.0},
            episodes={"size": 16, "count": 2},
        )
        assert run.train(config)["steps"] == 2
    assert_equal_ends(tmp_path / "0", tmp_path / "2", 2)
    assert not (tmp_path / "2" / "skipped.jsonl").exists()


READS: dict[str, Callable[[str], Any]] = {
    "table": lambda url: opened(f"{url}/table/pairs.csv"),
    "image": lambda url: read_file(f"{url}/table/images/0.png"),
    "list": lambda url: expand_shards(f"{url}/shards/*.tar"),
    "stream": lambda url: streams.ShardStream(f"{url}/shards/00.tar", seed=0).samples(),
    "wds": lambda url: open_data(f"wds:{url}/wds_pets"),
}


def failure(what: str, url: str) -> str:
    """What is said of something that cannot be read: one line, without a secret."""
    with pytest.raises(Exception, match=r"^[^\n]+$") as error:  # s3fs has some of its own
        next(READS[what](url))
    is_ours = isinstance(error.value, ValueError)
    text = str(error.value) if is_ours else describe_error(error.value)
    assert "secret" not in text
    return text


WAY_OUT = "; check the credentials that its client finds .of s3: AWS_PROFILE, or AWS_ACCESS_KEY_ID"


@pytest.mark.parametrize("what", READS)
def test_credentials_are_asked_for_in_one_line(store, keys, what):
    """Without any, or with wrong ones; with the right ones all is read."""
    put_table(store)
    put_shards(store)
    keys(found=False)
    assert re.search(f"Unable to locate credentials{WAY_OUT}", failure(what, store.url))
    keys(right=False)
    assert re.search(f"(Forbidden|signature).*{WAY_OUT}", failure(what, store.url))
    keys()
    if what != "wds":  # there is none
        READS[what](store.url)


def test_a_public_bucket_is_read_without_credentials(store, monkeypatch):
    """By FSSPEC_S3_ANON=true, as the message says that a user without any gets."""
    images, shards, settings = put_table(store), put_shards(store), dict[str, Any]()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "FSSPEC_S3_ANON=true reads what is public" in failure("table", store.url)
    store.publish()
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    set_conf_env(settings)  # as fsspec does when it is imported
    monkeypatch.setitem(conf, "s3", settings["s3"])
    assert images_of(opened(f"{store.url}/table/pairs.csv")) == images
    assert streamed(f"{store.url}/shards/*.tar", len(shards)) == shards


def test_a_server_that_fails_for_a_while_loses_no_sample(store):
    """While a table, its images, a listing, shards and evaluation data are read."""
    images, shards, faults = put_table(store), put_shards(store), ("500", "503", "reset", "cut")
    encoded = put_evaluation_data(store)
    store.fail(*faults, on="GET", times=2)
    pairs = opened(f"{store.url}/table/pairs.csv")
    store.fail(*faults, "slow", on="GET", times=5)
    assert images_of(pairs) == images
    store.fail("reset", "cut", "503", "slow", "500", on="GET", times=5)
    assert streamed(f"{store.url}/shards/*.tar", len(shards)) == shards
    assert store.times == 0
    store.fail("503", "reset", "cut", "500", on="GET", times=4)
    split = READS["wds"](store.url).splits["test"]
    assert [split.images.read_encoded(row) for row in range(3)] == encoded
    assert split.labels.tolist() == [0, 1, 0]
    assert store.times == 0


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_run_whose_network_goes_ends_in_one_line_and_goes_on(store, hasty, tmp_path, kind):
    """Bit for bit as one that lost nothing."""
    put_table(store, 32)
    put_shards(store, number=8, per_shard=4)
    is_table = kind == "table"
    train = f"{store.url}/" + ("table/pairs.csv" if is_table else "shards/*.tar")
    settings: dict[str, Any] = {
        "run": {**SHORT, "save_steps": 1},
        "data": {"workers": 0, "validation": 0.0, "shuffle_buffer": 8},
        "episodes": {"size": 16, "count": 2, "batch_size": 8},
    }
    config = config_for(train, tmp_path / "run", **settings)
    store.fail("reset", after=20 if is_table else 10)
    place = f"{store.url}/table/images/" if is_table else f"{store.url}/shards/"
    go_on = r"check the network, and give the same command again \(a run: with --resume auto\)"
    with pytest.raises(ValueError, match=rf"^(?=[^\n]*{place})[^\n]*{go_on}[^\n]*$"):
        run.train(config)
    store.fail()
    assert run.train(config, resume="auto")["steps"] == 4
    run.train(config_for(train, tmp_path / "whole", **settings))
    assert_equal_ends(tmp_path / "run", tmp_path / "whole", 4)
