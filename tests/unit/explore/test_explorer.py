"""What an explorer answers, of which pairs, and what it keeps."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from threading import Event
from time import monotonic, sleep
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from worded import WordModel, distinct_pairs, explorers, loaded

from protoclip.config import Config, DataConfig, SourceConfig
from protoclip.data import sources
from protoclip.data.pairs import ImageTextPairs
from protoclip.evaluation.features import Encoder
from protoclip.explore import atlas as atlas_module
from protoclip.explore import explorer as explorer_module
from protoclip.explore import map as map_module
from protoclip.explore.atlas import Atlas, Features
from protoclip.explore.explorer import Explorer, heads_of, of_rows, open_explorer
from protoclip.explore.pairs import ExploredPairs, explored
from protoclip.explore.render import Pages
from protoclip.explore.thumbnails import likeness
from protoclip.models import loading
from protoclip.training.run import train
from testing import tiny_config, tiny_pairs


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


def test_rows_that_cannot_be_read_are_left_out(one: Explorer) -> None:
    assert one.atlas.rows.tolist() == [row for row in range(60) if row not in (7, 9)]
    assert one.pairs.sample_id(one.row(7)) == "tiny/8"
    assert [one.position(row) for row in (0, 7, 8, 9, 59, 60)] == [0, None, 7, None, 57, None]


def test_an_image_that_can_be_read_again_moves_no_other() -> None:
    """The map was made without it; one that was lost since then is told."""
    given = torch.arange(12.0).reshape(6, 2)
    rows = torch.tensor([0, 1, 2, 3, 5, 6])
    features = Features(captioned=torch.arange(7), rows=rows, image=given, text=-given)
    found = of_rows(features, np.array([0, 2, 5, 6]))
    assert found.rows.tolist() == [0, 2, 5, 6]
    assert found.image.tolist() == given[[0, 2, 4, 5]].tolist() == (-found.text).tolist()
    with pytest.raises(ValueError, match=r"^2 images of the map cannot be read any more"):
        of_rows(features, np.array([3, 4, 6, 7]))


def test_a_text_table_has_the_classes_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("image,caption,label\n" + "a.png,a cat,cat\nb.png,a dog,dog\n")
    samples = sources.pairs(Config(data=DataConfig(train=str(path), class_column="label")))
    assert explored(samples, class_column="label").has_classes


def test_search_by_text_and_image_and_neighbours(one: Explorer) -> None:
    def captions(near: list[tuple[int, float]]) -> set[str]:
        return {one.pairs.caption(one.row(position)) for position, _ in near}

    found = one.search_text("a red square", 3)
    assert captions(found.images) == captions(found.texts) == {"a red square"}
    first = found.images[0][0]
    by_image = one.search_image(one.pairs.encoded(one.row(first)), 3)
    assert captions(by_image.images) == {"a red square"}
    near = one.nearest(first, "image", 3)
    assert captions(near.images) == {"a red square"}
    assert first not in [position for position, _ in near.images]
    assert [value for _, value in near.images] == sorted((v for _, v in near.images), reverse=True)


@pytest.mark.parametrize("held", ["by path", "in the table"])
def test_an_image_of_several_pairs_is_found_once_with_all_its_captions(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as what is near to itself either, and not as its own near-duplicate; texts are all
    found. Nothing but their content tells that images in a table are equal, for which none is read
    a second time. Those that may be near-duplicates are, to be compared."""
    read, reads, compare = ImageTextPairs.encoded, list[int](), Mock(wraps=likeness)

    def counted(pairs: ImageTextPairs, row: int, part: slice | None = None) -> bytes:
        reads.append(row)
        return read(pairs, row, part)

    monkeypatch.setattr(ImageTextPairs, "encoded", counted)
    monkeypatch.setattr(explorer_module, "likeness", compare)
    rows, path = [], tmp_path / ("pairs.csv" if held == "by path" else "pairs.parquet")
    for number, row in enumerate(distinct_pairs(20)):
        (tmp_path / f"{number}.png").write_bytes(row["image"])
        image = f"{number}.png" if held == "by path" else row["image"]
        rows += [
            {"image": image, "caption": f"{more}{row['caption']}"} for more in ("", "one more ")
        ]
    table = pa.Table.from_pylist(rows)
    if held == "by path":
        pa_csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    (one,) = explorers(DataConfig(train=str(path)))
    assert {a // 2 - b // 2 for a, b in one.atlas.duplicates.tolist()}.isdisjoint({0})
    found = one.search_text("a red square", 10)
    shown = [position for position, _ in found.images]
    assert len({position // 2 for position in shown}) == len(shown) == len(found.texts) == 10
    assert found.sharing == {position: [position + 1] for position in shown}
    near = one.nearest(6, "image", 10)
    assert 3 not in {position // 2 for position, _ in near.images}
    assert 7 in dict(one.nearest(6, "text", 40).texts)
    page = Pages([one]).site(1).answer("a red square", found)
    assert page.count("> select <bdi>one more ") == 10
    site = Pages([one]).site(1)
    twins = re.findall("<article.*?</article>", site.duplicates(least=0.0), re.DOTALL)
    assert len(twins) == 2 * len(one.atlas.duplicates) > 0
    for card in twins:  # one tick is for both pairs
        ((first, more),) = re.findall(r"""data-id="(.*?)" data-more='(.*?)'""", card)
        numbers = [int(each.rpartition("/")[2]) for each in (first, *json.loads(more))]
        assert numbers == [numbers[0], numbers[0] + 1]
        assert numbers[0] % 2 == 0
        assert " and 1 more of this image</label>" in card
    pair = site.pair(6).partition("<section>")[0]
    assert re.findall('data-id="(.*?)"', pair) == [one.pairs.sample_id(6), one.pairs.sample_id(7)]
    prototype = int(one.atlas.image_prototype[6])
    assert f"{prototype}</a>: <bdi>{site.name('image', prototype)}</bdi>" in pair
    odd = site.odd("distance")
    assert odd.count('class="card"') == 40  # the pair is what is odd, and not its image
    if held == "by path":  # ids are rows' numbers
        assert all(f"<bdi>{number}.png</bdi>" in odd for number in range(20))
    for modality, pairs_of_an_image in (("image", 2), ("text", 1)):
        for number, prototype in enumerate(site.prototypes[modality]):
            page = site.prototype(modality, number)
            assert page.count('class="card"') == prototype.size / pairs_of_an_image
            assert page.count("data-id=") == prototype.size
        # At most four thumbnails, all of them of different images, and three different captions.
        for row in re.split("<tr[^>]*>", site.prototype_list(modality))[2:]:
            shown_rows = [int(each) // 2 for each in re.findall(r"images/(\d+)\.webp", row)]
            assert len({*shown_rows}) == len(shown_rows)
            (number,) = re.findall(rf"prototype-{modality}-(\d+)\.html", row)[:1]
            nearest = site.members(modality, int(number))[:20].tolist()
            captions = [*dict.fromkeys(one.pairs.caption(one.row(each)) for each in nearest)][:3]
            assert re.findall(r'"caption"><bdi>(.*?)</bdi>', row) == captions
    # By `WordModel`, to be encoded, and to be compared.
    compared = [row for call in compare.call_args_list for row in call.args[1:]]
    assert sorted(reads) == sorted([*range(40), *range(40), *compared])
    pairs = explored(one.pairs.sources[0])  # of which nothing was encoded
    assert len({pairs.image_key(row) for row in 2 * [*range(40)]}) == 20
    assert len(reads) == 80 + len(compared) + (40 if held == "in the table" else 0)


def test_all_pairs_of_an_image_can_be_ticked_however_many(tmp_path: Path) -> None:
    """Those beyond the first ones are folded away, and ticked by the button all the same."""
    one_image, other = (row["image"] for row in distinct_pairs(2))
    rows = [{"image": one_image, "caption": f"a red square {number}"} for number in range(15)]
    rows.append({"image": other, "caption": "a green square"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (one,) = explorers(DataConfig(train=str(tmp_path / "pairs.parquet")))
    page = Pages([one]).site(1).answer("a red square", one.search_text("a red square", 2))
    images_of_answer = page.split("<section>")[1]
    assert images_of_answer.count("data-id=") == 16
    assert "<summary>5 more of this image</summary>" in images_of_answer


def test_a_tick_is_for_every_pair_of_an_image_however_many(tmp_path: Path) -> None:
    """More than are looked for at first, among images whose features differ and do not."""
    for name, colour in (("none", "red"), ("alike", "blue"), ("other", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    names = ["none.png"] * 1500 + ["alike.png", "other.png", "alike.png"]
    columns = {"path": names, "caption": [f"word {number}" for number in range(len(names))]}
    source = ImageTextPairs(pa.table(columns), name="t", root=str(tmp_path))
    images = torch.ones(len(names), 4)
    images[-2] = torch.tensor([1.0, 0, 0, 0])
    rows = torch.arange(len(names))
    features = Features(captioned=rows, rows=rows, image=images, text=images)
    many = Explorer(
        name="m",
        pairs=explored(source),
        encoder=Mock(spec=Encoder),
        atlas=Mock(spec=Atlas, rows=np.arange(len(names))),
        features=lambda: features,
    )
    shown = many.sharing([0, 1500, 1501])
    assert shown == {0: [*range(1, 1500)], 1500: [1502], 1501: []}


def test_what_moved_shows_an_image_once_with_all_its_captions(tmp_path: Path) -> None:
    """Of texts, each is one."""
    rows = [
        {"image": row["image"], "caption": f"{more}{row['caption']}"}
        for row in distinct_pairs(20)
        for more in ("", "one more ")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    swaps = {row: (row + 6) % 40 for row in range(12)}
    both = Pages(explorers(DataConfig(train=str(tmp_path / "pairs.parquet")), {}, swaps))
    for modality, pairs_of_an_image in (("image", 2), ("text", 1)):
        moved, page = both.moved(modality).pairs, both.site(1).moved(modality)
        assert page.count('class="card"') == len(moved) / pairs_of_an_image
        assert page.count("data-id=") == len(moved)
    assert len(both.moved("image").pairs) > 0


def test_rows_of_equal_content_that_are_copies_are_ticked_each_by_itself(tmp_path: Path) -> None:
    rows = distinct_pairs(20)
    rows.append({**rows[3], "sample_id": "copy"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (one,) = explorers(DataConfig(train=str(tmp_path / "pairs.parquet")))
    assert one.sharing([3, 4, 20]) == {3: [20], 4: [], 20: [3]}
    assert [3, 20] in one.atlas.duplicates.tolist()
    assert "data-more" not in Pages([one]).site(1).duplicates()


def test_all_but_the_first_of_a_chain_of_near_duplicates_are_marked(one: Explorer) -> None:
    """Also where two are near to a later one alone; but only by those that are listed."""
    chain = {"duplicates": np.array([[2, 4], [0, 4]]), "duplicate_likeness": np.array([1.0, 0.9])}
    pages = Pages([replace(one, atlas=replace(one.atlas, **chain))])
    again = {0.9: [True, True, False, True], 0.95: [False, True]}
    for least, marked in again.items():
        page = pages.site(1).duplicates(least)
        cards = re.findall('<article class="card(.*?)".*?data-id="(.*?)"', page, re.DOTALL)
        ids = [one.pairs.sample_id(row) for row in (2, 4, 0, 4)[: len(marked)]]
        assert cards == [
            (" again" * is_again, id) for is_again, id in zip(marked, ids, strict=True)
        ]


def test_an_article_before_everything_else_is_left_out(one: Explorer) -> None:
    for text in ("a red square", " The  red square", "an red square"):
        assert one.search_text(text, 3) == one.search_text("red square", 3)
    assert len(one.search_text("the", 3).images) == 3


def test_answers_say_which_words_are_near(one: Explorer) -> None:
    """Those near to the query; and of each result, those near to it and to the query."""
    answer = one.search_text("a red square", 5)
    assert {"red", "square"} <= {*answer.words} <= {*one.words()[0]}
    for modality, near in (("image", answer.images), ("text", answer.texts)):
        assert len(answer.shared[modality]) == len(near) == 5
        assert {"red", "square"} <= {*answer.shared[modality][0]}
    by_image = one.search_image(one.pairs.encoded(one.row(answer.images[0][0])), 5)
    assert {*answer.words} == {*by_image.words}


def test_any_question_is_answered_and_an_empty_one_is_one_line(one: Explorer) -> None:
    for text in ("\ud800 red", "x" * 10**6, "<script>", "\u202ered"):
        assert len(one.search_text(text, 2).images) == 2
    for text in ("", " \n", "\0"):
        with pytest.raises(ValueError, match=r"an empty text finds nothing"):
            one.search_text(text)
    with pytest.raises(ValueError, match=r"image"):
        one.search_image(b"no image")


def test_swapped_captions_are_found_in_the_data(table: Path) -> None:
    pairs = sources.pairs(Config(data=DataConfig(train=str(table))))
    captions = tiny_pairs(60)["caption"].to_pylist()
    other = next(
        row for row in range(60) if not set(captions[row].split()) & set(captions[3].split()[1:])
    )
    (one,) = explorers(DataConfig(train=str(table)), {3: other})
    assert pairs.sample_id(one.row(int(np.argmax(one.atlas.distance)))) == "tiny/3"


def test_a_mixture_has_sources_and_classes(table: Path) -> None:
    entries = [SourceConfig(path=str(table), name=name) for name in "ab"]
    (one,) = explorers(DataConfig(sources=entries, class_column="kind"))
    rows = one.atlas.rows
    assert len(rows) == 116
    assert [one.pairs.source_of(row) for row in (0, 59, 60, 119)] == [0, 0, 1, 1]
    assert one.pairs.sample_id(61) == "b/tiny/1"
    for row in (0, 1, 61):
        assert one.pairs.class_of(row) == one.pairs.caption(row).split()[1]
    assert one.pairs.class_of(7) == ""


def test_numbers_of_classes_have_their_names() -> None:
    features = {"info": {"features": {"kind": {"names": ["square", "stripe"]}}}}
    table = tiny_pairs(4).append_column("kind", pa.array([0, 1, 2, None]))
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pairs = explored(ImageTextPairs(table, name="tiny"), class_column="kind")
    assert [pairs.class_of(row) for row in range(4)] == ["square", "stripe", "2", ""]


def test_a_class_of_a_million_characters_is_cut() -> None:
    """It takes no more memory than itself, however many other pairs there are."""
    data, ways = dict[str, Any](), dict[str, Any]()
    map_module.add_categories(data, ways, "class", ["x" * 10**6] + ["y"] * 10_000)
    assert ways["class"]["labels"] == ["y", "x" * 39 + "…"]
    assert data["by class"].tolist() == [1] + [0] * 10_000


def test_only_chosen_samples_are_explored(table: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text('["tiny/3", "tiny/4", "tiny/50"]')
    (one,) = explorers(DataConfig(train=str(table), only=str(tmp_path / "ids.json")))
    ids = [one.pairs.sample_id(row) for row in one.atlas.rows.tolist()]
    assert ids == ["tiny/3", "tiny/4", "tiny/50"]


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
    monkeypatch.setattr(explorer_module, "encoded", fail)
    (after,) = explorers(DataConfig(train=str(table)))
    assert np.array_equal(before.atlas.image_map_position, after.atlas.image_map_position)
    # Features are opened without reading a caption or an image.
    monkeypatch.undo()
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    for name in ("caption", "encoded", "with_captions"):
        monkeypatch.setattr(ExploredPairs, name, fail)
    for modality in ("image", "text"):
        first, again = before.space(modality).features, after.space(modality).features
        assert torch.equal(first, again)


def test_the_map_by_umap_takes_the_place_of_that_by_pca(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made once, while the other pages work, and a failure leaves the map that there is."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    settings: Any = {"layout": "umap", "umap_later": True}
    half, go_on = Event(), Event()

    def slow(rows: Any, *, seed: int, done: Any) -> Any:
        done(0.5)
        half.set()
        assert go_on.wait(60)
        return np.random.default_rng(seed).normal(size=(len(rows), 2)).astype(np.float32)

    def failing(rows: Any, *, seed: int, done: Any) -> Any:
        raise ValueError("no room")

    def state(pages: Pages) -> dict[str, Any]:
        return dict(json.loads(pages.site(1).map_state()))

    for by_umap in (failing, slow):
        monkeypatch.setattr(atlas_module, "by_umap", by_umap)
        pages = Pages(explorers(DataConfig(train=str(table)), **settings))
        before, positions = pages.site(1).map, pages.site(1).atlas.image_map_position
        assert pages.make_umaps()
        if by_umap is slow:
            assert half.wait(60)
            assert state(pages) == {"layout": "pca", "done": 0.5, "failed": ""}
            assert 'data-waits="yes"' in pages.site(1).index()
            go_on.set()
        end = monotonic() + 60
        while state(pages)["done"] is not None:
            assert monotonic() < end
            sleep(0.01)
        if by_umap is failing:
            assert state(pages) == {"layout": "pca", "done": None, "failed": "no room"}
            assert pages.site(1).map == before
    assert state(pages) == {"layout": "umap", "done": None, "failed": ""}
    assert pages.site(1).map != before
    assert 'data-waits="yes"' not in pages.site(1).index()
    monkeypatch.setattr(atlas_module, "by_umap", failing)
    (again,) = explorers(DataConfig(train=str(table)), **settings)
    assert again.make_umap is None
    assert np.array_equal(again.atlas.image_map_position, pages.site(1).atlas.image_map_position)
    assert not np.array_equal(again.atlas.image_map_position, positions)


def test_umap_may_end_while_the_map_by_pca_is_drawn(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That by PCA is kept as such, and that by UMAP is shown from then on."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    data, draw = DataConfig(train=str(table)), map_module.map_json
    site = Pages(explorers(data, layout="umap", umap_later=True)).site(1)

    def by_umap(rows: Any, *, seed: int, done: Any) -> Any:
        return np.random.default_rng(seed).normal(size=(len(rows), 2)).astype(np.float32)

    def overtaken(shown: Any, pairs: Any) -> Any:
        if shown.layout == "pca":
            site.make_umap()
        return draw(shown, pairs)

    monkeypatch.setattr(atlas_module, "by_umap", by_umap)
    with monkeypatch.context() as patch:
        patch.setattr(map_module, "map_json", overtaken)
        by_pca = site.map
    assert site.map != by_pca
    assert Pages(explorers(data, layout="pca")).site(1).map == by_pca


def test_the_map_is_kept_until_what_it_shows_changes(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    made = Mock(side_effect=map_module.map_json)
    monkeypatch.setattr(map_module, "map_json", made)

    def ways(**settings: Any) -> list[str]:
        (one,) = explorers(DataConfig(train=str(table)), **settings)
        return list(json.loads(Pages([one]).site(1).map)["ways"])

    first = ways()
    assert ways() == first
    assert made.call_count == 1
    assert "class" in ways(class_column="kind")
    assert "class" not in ways(cache=False)
    assert made.call_count == 3
    for path in tmp_path.rglob("*.map.json"):
        path.write_text(path.read_text().replace("distance", "distanCe"))
    assert ways() == first
    assert made.call_count == 4


def test_data_whose_images_are_gone_is_one_line(tmp_path: Path) -> None:
    rows = [f"{n}.png,a {n}" for n in range(5)]
    (tmp_path / "a.csv").write_text("\n".join(["image,caption", *rows]))
    with pytest.raises(ValueError, match=r"^images: no image can be used, .*0.png.*no such file"):
        explorers(DataConfig(train=str(tmp_path / "a.csv")))


def test_a_stream_and_a_missing_class_column_are_refused(table: Path) -> None:
    stream = sources.pairs(Config(data=DataConfig(train="https://host/0.tar")))
    with pytest.raises(ValueError, match="a stream cannot be explored; copy the shards here"):
        explored(stream)
    samples = sources.pairs(Config(data=DataConfig(train=str(table))))
    with pytest.raises(ValueError, match="no column 'nothing'; it has "):
        explored(samples, class_column="nothing")
    mixed = [SourceConfig(path=str(table)), SourceConfig(path="emoji")]  # of which one has it
    samples = sources.pairs(Config(data=DataConfig(sources=mixed)))
    pairs = explored(samples, class_column="kind")
    assert (pairs.class_of(0) != "", pairs.class_of(len(pairs) - 1)) == (True, "")
    with pytest.raises(ValueError, match="no column 'nothing'; it has "):
        explored(samples, class_column="nothing")


def test_more_prototypes_than_pairs_are_refused_before_anything_is_encoded(one: Explorer) -> None:
    with pytest.raises(ValueError, match=r"^--groups: 61 is too large; at most 60 for these"):
        open_explorer("no model", one.pairs, device=torch.device("cpu"), number=61)


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
    samples = sources.pairs(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000003"  # within an episode
    one = open_explorer(str(checkpoint), explored(samples), device=torch.device("cpu"))
    assert one.atlas.space == space
    assert {modality: counts[0] for modality, counts in one.atlas.run_prototypes.items()} == (
        {"image": 8, "text": 8} if prototypical else {}
    )
    found = one.search_text("a red square", 5)
    assert len(found.images) == len(found.texts) == 5
    model = loading.load(tmp_path / "run")[0]
    assert (heads_of(model, config) is None) == (prototypical == 0)


def test_models_need_not_be_modules_of_ours(table: Path) -> None:
    samples = sources.pairs(Config(data=DataConfig(train=str(table))))
    with loaded(WordModel(samples)) as (name,):
        assert heads_of(loading.load(name)[0], None) is None


def test_an_image_that_can_be_read_again_is_shown(tmp_path: Path, monkeypatch: Any) -> None:
    """Though its file has the size and the time that it had."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    rows = ["image,caption"]
    for number, row in enumerate(tiny_pairs(40).to_pylist()):
        (tmp_path / f"{number}.png").write_bytes(row["image"])
        rows.append(f"{number}.png,{row['caption']}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    path = tmp_path / "3.png"
    whole, status = path.read_bytes(), path.stat()
    data = DataConfig(train=str(tmp_path / "pairs.csv"))
    for content, number in ((bytes(len(whole)), 39), (whole, 40)):
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        (found,) = explorers(data, cache=True)
        assert len(found.atlas) == number
