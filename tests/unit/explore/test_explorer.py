"""What an explorer answers, of which pairs, and what it keeps."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from worded import WordModel, distinct_pairs, explorers

from protoclip.config import Config, DataConfig, SourceConfig
from protoclip.data import sources
from protoclip.explore import explorer as explorer_module
from protoclip.explore.explorer import Explorer, open_explorer, projection_heads
from protoclip.explore.pages import Pages
from protoclip.explore.pairs import ExploredPairs, explore_pairs
from protoclip.models import loading
from protoclip.training.run import train
from testing import tiny_config


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pairs; row 7 has no caption, row 9 no image."""
    path = tmp_path_factory.mktemp("explored") / "pairs.parquet"
    rows = distinct_pairs(60)
    rows[7]["caption"], rows[9]["image"] = "", b"no image"
    for row in rows:
        row["kind"] = row["caption"].split()[1] if row["caption"] else None
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def one(table: Path) -> Explorer:
    """An explorer of all pairs."""
    (explorer,) = explorers(DataConfig(train=str(table)))
    return explorer


def test_search_by_text_and_image_and_neighbours(one: Explorer) -> None:
    def captions(near: list[tuple[int, float]]) -> set[str]:
        return {one.pairs.caption(one.row(position)) for position, _ in near}

    found = one.search_text("a red square", 3)
    assert captions(found.images) == captions(found.texts) == {"a red square"}
    first = found.images[0][0]
    by_image = one.search_image(one.pairs.read_encoded(one.row(first)), 3)
    assert captions(by_image.images) == {"a red square"}
    near = one.nearest(first, "image", 3)
    assert captions(near.images) == {"a red square"}
    assert first not in [position for position, _ in near.images]
    assert [value for _, value in near.images] == sorted((v for _, v in near.images), reverse=True)


def test_a_damaged_map_is_made_again(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    (first,) = explorers(DataConfig(train=str(table)))
    (path,) = tmp_path.glob("atlas/*.npz")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + bytes(99) + whole[299:], b""):
        path.write_bytes(damaged)
        (again,) = explorers(DataConfig(train=str(table)))
        assert np.array_equal(again.atlas.map_position["text"], first.atlas.map_position["text"])
        assert path.read_bytes()[:1000] == whole[:1000]


@pytest.fixture(scope="module", params=["by path", "in the table"])
def twice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images, each with two captions on rows that follow each other."""
    folder, rows = tmp_path_factory.mktemp("twice"), []
    for number, row in enumerate(distinct_pairs(20)):
        (folder / f"{number}.png").write_bytes(row["image"])
        image = f"{number}.png" if request.param == "by path" else row["image"]
        rows += [
            {"image": image, "caption": f"{more}{row['caption']}"} for more in ("", "one more ")
        ]
    table = pa.Table.from_pylist(rows)
    if request.param == "by path":
        pa_csv.write_csv(table, folder / "pairs.csv")
        return folder / "pairs.csv"
    pq.write_table(table, folder / "pairs.parquet")
    return folder / "pairs.parquet"


def test_an_image_of_several_pairs_is_found_once_with_all_its_captions(twice: Path) -> None:
    """It is not near to itself, and not its own near-duplicate; texts are all found."""
    (one,) = explorers(DataConfig(train=str(twice)))
    assert {a // 2 - b // 2 for a, b in one.atlas.duplicates.tolist()}.isdisjoint({0})
    found = one.search_text("a red square", 10)
    positions = [position for position, _ in found.images]
    assert len({position // 2 for position in positions}) == len(positions) == 10
    assert len(found.texts) == 10
    assert all(one.pairs_of_image(position) == [position + 1] for position in positions)
    near = one.nearest(6, "image", 10)
    assert 3 not in {position // 2 for position, _ in near.images}
    assert 7 in dict(one.nearest(6, "text", 40).texts)
    site = Pages([one]).sites[0]
    assert site.answer("a red square", lambda: found).count("> select <bdi>one more ") == 10
    for card in re.findall("<article.*?</article>", site.duplicates(least=0.0), re.DOTALL):
        ((first, more),) = re.findall(r"""data-id="(.*?)" data-more='(.*?)'""", card)
        numbers = [int(sample_id.rpartition("/")[2]) for sample_id in (first, *json.loads(more))]
        assert numbers == [numbers[0], numbers[0] + 1]  # one tick is for both
    odd = site.odd("distance")
    assert odd.count('class="card"') == 40  # the pair is what is odd, and not its image
    assert ("<bdi>7.png</bdi>" in odd) == (twice.suffix == ".csv")  # ids are rows' numbers
    for modality, pairs_of_an_image in (("image", 2), ("text", 1)):
        for number, prototype in enumerate(site.prototypes[modality]):
            page = site.prototype(modality, number)
            assert page.count('class="card"') == prototype.size / pairs_of_an_image
            assert page.count("data-id=") == prototype.size
        # Thumbnails of a prototype are of different images.
        for row in re.split("<tr[^>]*>", site.prototype_list(modality))[2:]:
            images = [int(number) // 2 for number in re.findall(r"images/(\d+)\.webp", row)]
            assert len({*images}) == len(images)


def test_an_article_before_everything_else_is_left_out(one: Explorer) -> None:
    for text in ("a red square", " The  red square", "an red square"):
        assert one.search_text(text, 3) == one.search_text("red square", 3)
    assert len(one.search_text("the", 3).images) == 3


def test_answers_say_which_words_are_near(one: Explorer) -> None:
    """Those near to the query; and of each result, those near to it and to the query."""
    answer = one.search_text("a red square", 5)
    assert {"red", "square"} <= {*answer.words} <= {*one.words[0]}
    for modality, near in (("image", answer.images), ("text", answer.texts)):
        assert len(answer.shared[modality]) == len(near) == 5
        assert {"red", "square"} <= {*answer.shared[modality][0]}
    by_image = one.search_image(one.pairs.read_encoded(one.row(answer.images[0][0])), 5)
    assert {*answer.words} == {*by_image.words}


def test_what_fits_nothing_is_said_where_words_about_other_things_find_as_much(
    one: Explorer,
) -> None:
    site = Pages([one]).sites[0]
    for text, fits in (("a red square", True), ("quarterly tax report", False), ("tax red", True)):
        assert one.search_text(text, 3).fits == fits
        assert ("Perhaps nothing here fits" in site.search(text)) != fits
    assert one.search_image(one.pairs.read_encoded(one.row(0)), 3).fits


def test_any_question_is_answered_and_an_empty_one_is_one_line(one: Explorer) -> None:
    for text in ("\ud800 red", "x" * 10**6, "<script>", "\u202ered"):
        assert len(one.search_text(text, 2).images) == 2
    for text in ("", " \n", "\0"):
        with pytest.raises(ValueError, match=r"the search is empty"):
            one.search_text(text)
    with pytest.raises(ValueError, match=r"image"):
        one.search_image(b"no image")


def test_a_mixture_has_sources_and_classes(table: Path) -> None:
    entries = [SourceConfig(path=str(table), name=name) for name in "ab"]
    (one,) = explorers(DataConfig(sources=entries, class_column="kind"))
    rows = one.atlas.rows
    assert len(rows) == 116
    assert [one.pairs.source_name(row) for row in (0, 59, 60, 119)] == ["a", "a", "b", "b"]
    assert one.pairs.sample_id(61) == "b/tiny/1"
    for row in (0, 1, 61):
        assert one.pairs.read_class(row) == one.pairs.caption(row).split()[1]
    assert one.pairs.read_class(7) == ""


def test_the_next_start_encodes_nothing(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    (before,) = explorers(DataConfig(train=str(table)))

    def fail(*arguments: object, **settings: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(explorer_module, "make_atlas", fail)
    monkeypatch.setattr(
        WordModel,
        "encode_image",
        lambda self, images, normalize=False: torch.ones(len(images), len(self.place)),
    )
    with pytest.raises(AssertionError, match="computed again"):  # another model
        explorers(DataConfig(train=str(table)))
    monkeypatch.undo()
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(explorer_module, "make_atlas", fail)
    monkeypatch.setattr(explorer_module, "encode_pairs", fail)
    (after,) = explorers(DataConfig(train=str(table)))
    before_map, after_map = (one.atlas.map_position["image"] for one in (before, after))
    assert np.array_equal(before_map, after_map)
    # Features are opened without reading an image.
    monkeypatch.undo()
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    for name in ("read_encoded", "find_captioned"):
        monkeypatch.setattr(ExploredPairs, name, fail)
    for modality in ("image", "text"):
        first, again = (one.spaces[modality].features for one in (before, after))
        assert torch.equal(first, again)


def test_a_missing_class_column_is_refused(table: Path) -> None:
    samples = sources.open_samples(Config(data=DataConfig(train=str(table))))
    with pytest.raises(ValueError, match="no column 'nothing'; it has "):
        explore_pairs(samples, class_column="nothing")
    mixed = [SourceConfig(path=str(table)), SourceConfig(path="emoji")]  # of which one has it
    samples = sources.open_samples(Config(data=DataConfig(sources=mixed)))
    pairs = explore_pairs(samples, class_column="kind")
    assert (pairs.read_class(0) != "", pairs.read_class(len(pairs) - 1)) == (True, "")
    with pytest.raises(ValueError, match="no column 'nothing'; it has "):
        explore_pairs(samples, class_column="nothing")


@pytest.mark.parametrize(("prototypical", "space"), [(1.0, "projections"), (0.0, "features")])
def test_a_run_is_grouped_by_what_it_trained(
    prototypical: float, space: str, table: Path, tmp_path: Path
) -> None:
    """Heads that nothing trains are not used. The run's own dead prototypes are counted."""
    config = tiny_config(str(table), out=str(tmp_path / "run"))
    config = replace(
        config,
        loss=replace(config.loss, prototypical=prototypical),
        data=replace(config.data, validation=0.0),
        episodes=replace(config.episodes, size=32, count=2, locked_image=0),
        run=replace(config.run, evaluate=False, save_steps=3),
    )
    train(config)
    samples = sources.open_samples(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000003"  # within an episode
    one = open_explorer(str(checkpoint), explore_pairs(samples), device=torch.device("cpu"))
    assert one.atlas.space == space
    assert {modality: counts[0] for modality, counts in one.atlas.run_prototypes.items()} == (
        {"image": 8, "text": 8} if prototypical else {}
    )
    found = one.search_text("a red square", 5)
    assert len(found.images) == len(found.texts) == 5
    model = loading.load(tmp_path / "run")[0]
    assert (projection_heads(model, config) is None) == (prototypical == 0)
