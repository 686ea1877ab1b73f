"""A mixture never takes one sample for another, whatever kind its sources are."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tars import write_tar

from protoclip.config import Config, DataConfig, EpisodeConfig, SourceConfig
from protoclip.data import loader as data_loader
from protoclip.data import sampler, sources
from protoclip.data.loader import EpisodeLoader, Pass
from protoclip.data.pairs import BadSample, ImageTextPairs, Pairs
from protoclip.data.sampler import Episode
from protoclip.data.transforms import EvaluationTransform
from protoclip.encode import teachers
from protoclip.encode.teachers import TeacherFeatures
from testing import save_to_bytes

NUMBER, SIDE = 6, 32
NAMES = ("a", "b")
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def colour(source: int, number: int) -> tuple[int, int, int]:
    """Each image's own: red of the first source, blue of the second."""
    return (200 * (1 - source), 30 * number, 200 * source)


def image(source: int, number: int) -> bytes:
    return save_to_bytes(Image.new("RGB", (40, 40), colour(source, number)))


def write(kind: str, folder: Path, source: int) -> Path:
    """The samples of a source, with the ids that the other source has too."""
    names = [f"{number:04}" for number in range(NUMBER)]
    captions = [f"{source} {number}" for number in range(NUMBER)]
    images = [image(source, number) for number in range(NUMBER)]
    table = pa.table({"image": images, "caption": captions, "sample_id": names})
    if kind in ("shards", "stream"):  # as img2dataset writes them
        files: list[tuple[str, bytes]] = []
        for name, content, text in zip(names, images, captions, strict=True):
            facts = json.dumps({"key": name, "caption": text}).encode()
            files += [(f"{name}.png", content), (f"{name}.txt", text.encode())]
            files += [(f"{name}.json", facts)]
        write_tar(folder / "00000.tar", files)
    elif kind == "folder":
        for name, content, text in zip(names, images, captions, strict=True):
            (folder / f"{name}.png").write_bytes(content)
            (folder / f"{name}.txt").write_text(text)
    elif kind == "saved":
        datasets.Dataset(table).save_to_disk(folder)
    else:
        columns = table.drop(["sample_id"]) if kind == "rows" else table
        pq.write_table(columns, folder / "pairs.parquet")
        return folder / "pairs.parquet"
    return folder


KINDS = ("folder", "table", "rows", "saved", "shards", "stream")
# The samples' own ids: of a source in a mixture they follow its name.
OWN = {"rows": "{}", "shards": "00000/{:04}", "stream": "00000/{:04}"}
MIXTURES = [
    *((kind, kind) for kind in KINDS),
    *(("folder", "table"), ("table", "saved"), ("shards", "rows")),
]


def mixture(kinds: tuple[str, str], root: Path, **data: object) -> Config:
    """Two sources with equal ids, each named after its folder."""
    entries = []
    for source, kind in enumerate(kinds):
        folder = root / NAMES[source]
        folder.mkdir()
        path = write(kind, folder, source)
        weight = 1.0 if "stream" in kinds else None
        entries.append(SourceConfig(path=str(path), name=NAMES[source], weight=weight))
    settings = {"shuffle_buffer": 4, **data}
    read = "streaming" if "stream" in kinds else "auto"
    return Config(
        data=DataConfig(sources=entries, read=read, **settings),  # type: ignore[arg-type]
        episodes=EpisodeConfig(size=2 * NUMBER, batch_size=4, replacement=False),
    )


def read_caption(texts: list[str]) -> torch.Tensor:
    """Stands in for a tokenizer: the numbers of a caption."""
    return torch.tensor([[int(word) for word in text.split()] for text in texts])


def loader_of(config: Config) -> EpisodeLoader:
    return data_loader.loader(
        config,
        sources.open_samples(config),
        tokenizer=read_caption,
        transform=EvaluationTransform(size=SIDE, **PLAIN),
        device=torch.device("cpu"),
        on_read=lambda number, bad: None,
    )


@pytest.mark.parametrize("kinds", MIXTURES, ids="+".join)
@pytest.mark.parametrize("cache", [0.0, 4.0])
def test_a_mixture_serves_the_right_image(kinds, cache, tmp_path):
    """Image, caption, id and teacher features belong together, with the cache cold and warm.

    An episode of that size shows every sample once.
    """
    workers = 2 if kinds[0] == kinds[1] and cache == 0 else 0
    config = mixture(kinds, tmp_path, cache_gb=cache, workers=workers)
    own = [OWN.get(kind, "{:04}") for kind in kinds]
    samples = [(source, number) for source in range(2) for number in range(NUMBER)]
    ids = [f"{NAMES[s]}/{own[s].format(n)}" for s, n in samples]
    features = np.array(samples, dtype=np.float32)
    teacher = TeacherFeatures.of_array(name="teacher", sample_ids=ids, features=features)
    loader = loader_of(config)
    if isinstance(loader.pairs, Pairs):
        assert list(loader.pairs.sample_ids()) == ids
        assert [loader.pairs.sample_id(row) for row in range(len(ids))] == ids
    episode = sampler.episodes(config, loader.pairs)(0)
    for _ in ("cold", "warm"):
        met = []
        for batch in loader.batches(Pass(episode)):
            said = [(int(source), int(number)) for source, number in batch.text]
            met += said
            colours = (batch.image.mean((2, 3)) * 255).round().int().tolist()
            assert colours == [list(colour(*numbers)) for numbers in said]
            assert batch.sample_id == [f"{NAMES[s]}/{own[s].format(n)}" for s, n in said]
            assert torch.equal(teacher.lookup(batch.sample_id), batch.text.float())
        if "stream" not in kinds:  # these are drawn by weight
            assert sorted(met) == samples
        assert {source for source, _ in met} == {0, 1}


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_key_changes_with_the_content(kind, tmp_path):
    """Of images and captions, wherever they are."""

    def key(source: int) -> str:
        write(kind, tmp_path / "data", source)
        found = tmp_path / "data" / ("pairs.parquet" if kind in ("table", "rows") else "")
        data = DataConfig(train=str(found))
        samples = sources.open_samples(Config(data=data))
        assert isinstance(samples, ImageTextPairs)
        return samples.key

    (tmp_path / "data").mkdir()
    assert len({key(0), key(1)}) == 2


def test_equal_bad_samples_of_two_sources_are_two(tmp_path):
    """A skip list has both."""
    config = mixture(("folder", "folder"), tmp_path)
    for name in NAMES:
        (tmp_path / name / "0003.png").write_bytes(b"nonsense")
    bad: list[BadSample] = []
    loader = replace(loader_of(config), on_read=lambda number, found: bad.extend(found))
    list(loader.batches(Pass(Episode(index=0, rows=torch.arange(2 * NUMBER)))))
    assert {sample.sample_id for sample in bad} == {"a/0003", "b/0003"}


def test_the_bundled_teacher_knows_the_emoji_of_a_mixture(tmp_path):
    """By the ids that they have there."""
    config = mixture(("table", "table"), tmp_path)
    three = [*config.data.sources, SourceConfig(path="emoji", name="drawn")]
    config = replace(
        config,
        data=replace(config.data, sources=three),
        teacher=replace(config.teacher, features="emoji"),
    )
    samples = sources.open_samples(config)
    assert isinstance(samples, Pairs)
    notes: list[str] = []
    teacher = teachers.open_teachers(config, samples, notes.append)["teacher"]
    assert len(notes) == 1
    assert f"no features of {2 * NUMBER} of" in notes[0]
    first = samples.sample_id(2 * NUMBER)
    assert first.startswith("drawn/")
    assert bool(teacher.lookup([first]).isfinite().all())
