"""The same pairs in every form a user may have them in."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from protoclip.config import Config
from protoclip.data import sampler, sources
from protoclip.data.loader import EpisodeLoader
from protoclip.data.transforms import EvaluationTransform
from protoclip.testing import tiny_config, tiny_pairs

NUMBER = 5000
PER_SHARD = 700


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 5,000 pairs as TSV and files, Parquet, tar shards, and a folder."""
    root = tmp_path_factory.mktemp("forms")
    table = tiny_pairs(NUMBER, side=12)
    ids = [f"{row:05}" for row in range(NUMBER)]
    # Captions that are all different, so that a mix-up would show.
    captions = [f"{text} {i}" for text, i in zip(table["caption"].to_pylist(), ids, strict=True)]
    images = table.column("image").to_pylist()
    table = table.set_column(1, "caption", [captions]).set_column(2, "sample_id", [ids])
    pq.write_table(table, root / "pairs.parquet", row_group_size=1000)

    files, folder = root / "files", root / "folder"
    files.mkdir()
    folder.mkdir()
    lines = ["sample_id\tfilepath\ttitle"]
    for name, image, caption in zip(ids, images, captions, strict=True):
        (files / f"{name}.png").write_bytes(image)
        (folder / f"{name}.png").write_bytes(image)
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
        lines.append(f"{name}\tfiles/{name}.png\t{caption}")
    (root / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    (root / "shards").mkdir()
    for first in range(0, NUMBER, PER_SHARD):
        with tarfile.open(root / "shards" / f"{first // PER_SHARD:03}.tar", "w") as shard:
            for row in range(first, min(first + PER_SHARD, NUMBER)):
                facts = json.dumps({"sample_id": ids[row], "caption": captions[row]})
                add(shard, f"{ids[row]}.png", images[row])
                add(shard, f"{ids[row]}.json", facts.encode())
    return root


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


def config(root: Path, train: str, *, read: str = "auto") -> Config:
    base = tiny_config(str(root / train), out="")
    data = replace(base.data, cache_folder=str(root / "cache"), read=read, shuffle_buffer=300)
    episodes = replace(base.episodes, size=1000, batch_size=100, replacement=False)
    return replace(base, data=data, episodes=episodes)


FORMS: dict[str, Callable[[Path], Config]] = {
    "TSV and files": lambda root: config(root, "pairs.tsv"),
    "Parquet": lambda root: config(root, "pairs.parquet"),
    "folder": lambda root: config(root, "folder"),
    "shards, indexed": lambda root: config(root, "shards"),
    "shards, streaming": lambda root: config(root, "shards", read="streaming"),
}
Seen = set[tuple[str, str, bytes]]


def one_pass(settings: Config) -> Seen:
    """Sample id, caption and pixels of everything that five episodes of a fifth each show."""
    samples = sources.pairs(settings)
    captions: dict[int, str] = {}

    def remember(texts: list[str]) -> torch.Tensor:
        for text in texts:
            captions[int(text.split()[-1])] = text
        return torch.tensor([[int(text.split()[-1])] for text in texts])

    loader = EpisodeLoader(
        pairs=samples,
        tokenizer=remember,
        transform=EvaluationTransform(size=12, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        batch_size=100,
        seed=0,
        device=torch.device("cpu"),
    )
    episode = sampler.episodes(settings, samples)
    seen: Seen = set()
    for index in range(NUMBER // 1000):
        for batch in loader.batches(episode(index)):
            for i, sample_id in enumerate(batch.sample_id):
                pixels = (batch.image[i] * 255).round().byte().numpy().tobytes()
                seen.add((sample_id, captions[int(batch.text[i])], pixels))
    return seen


@pytest.fixture(scope="module")
def expected(forms: Path) -> Seen:
    return one_pass(FORMS["Parquet"](forms))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_pass_shows_the_same_pairs(form: str, forms: Path, expected: Seen) -> None:
    """Every pair once, with the same id, caption and pixels in whatever form it is stored."""
    seen = one_pass(FORMS[form](forms))
    assert len(seen) == NUMBER
    assert seen == expected
