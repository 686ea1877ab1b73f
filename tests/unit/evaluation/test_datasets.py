"""Every reference to evaluation data: what is read."""

import json
import shutil

import open_clip
import pytest
import torch
from timm.data.imagenet_info import ImageNetInfo
from written import (
    CAPTIONS,
    CLASSES,
    NAMES,
    REDS,
    as_class_label,
    open_data,
    png,
    write,
    write_table,
    write_wds,
)

from protoclip.config import DataConfig
from protoclip.data.pairs import BadSample
from protoclip.encode.features import Images
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import emoji, sort_names
from protoclip.evaluation.readers import read_templates


def reds(images: Images) -> list[int]:
    return [images.image(row).getpixel((0, 0))[0] for row in range(len(images))]


def as_wds(folder):
    return {"reference": f"wds:{write_wds(folder / 'wds_pets')}"}, "pets"


def as_plain_wds(folder):
    return {"reference": str(write_wds(folder / "wds_pets"))}, "pets"


def as_folder(folder):
    for split in ("val", "test"):
        for name, red in (("big_dog", 10), ("cat", 20), ("big_dog", 30)):
            write(folder / "pets" / split / name / f"{red}.png", png(red))
    write(folder / "pets/test/cat/._20.png", b"left by a Mac")
    write(folder / "pets/test/.thumbs/20.png", png(20))
    return {"reference": str(folder / "pets")}, "pets"


def as_csv(folder):
    write_wds(folder / "tars")
    rows = [f"{red}.png,{NAMES[label]}" for red, label in zip(REDS, CLASSES, strict=True)]
    for red in REDS:
        write(folder / f"{red}.png", png(red))
    path = write(folder / "pets.csv", "\n".join(["filepath,kind", *rows]))
    return {"reference": str(path), "class_column": "kind"}, "pets"


@pytest.mark.parametrize("write_form", [as_wds, as_plain_wds, as_folder, as_csv, as_class_label])
def test_images_and_classes_are_read_from(write_form, tmp_path):
    arguments, name = write_form(tmp_path)
    data = open_data(**arguments)
    split = data.splits["test"]
    found = [data.class_names[label] for label in split.labels]
    assert data.name == name
    assert isinstance(split.images, Images)
    assert split.images.key
    assert split.captions is None
    assert sorted(zip(reds(split.images), found, strict=True)) == [
        *((10, "big dog"), (20, "cat"), (30, "big dog"))
    ]
    ids = [split.images.sample_id(row) for row in range(3)]
    assert len(set(ids)) == 3
    if write_form in (as_wds, as_plain_wds):
        assert list(data.templates) == ["a {c}", "the {c}."]
        assert ids == ["0/s00", "0/s01", "1/s10"]
    else:
        assert list(data.templates) == ["a photo of a {c}."]


def as_pairs(folder):
    """A row for each caption; a row without one is left out."""
    for red in REDS:
        write(folder / f"{red}.png", png(red))
    rows = ["10.png,one", "20.png,two", "40.png,", "20.png,a second", "30.png,three"]
    return {"reference": str(write(folder / "my pairs.csv", "\n".join(["file,title", *rows])))}


def as_pairs_in_files(folder):
    """A folder below it holds images alone."""
    for red, texts in zip(REDS, CAPTIONS, strict=True):
        write(folder / "shop" / f"{red}.png", png(red))
        write(folder / "shop" / f"{red}.JSON", json.dumps({"caption": texts}))
    write(folder / "shop/small/10.png", png(10))
    return {"reference": str(folder / "shop")}


def as_captions_of_tars(folder):
    return {"reference": f"wds:{write_wds(folder / 'wds_flickr', 'txt')}"}


def as_karpathy(folder):
    images = [
        {
            "filepath": "val2014",
            "filename": f"{red}.png",
            "split": "test",
            "sentences": [{"raw": text} for text in texts],
        }
        for red, texts in zip(REDS, CAPTIONS, strict=True)
    ]
    images += [{**images[0], "filename": f"{split}.png", "split": split} for split in ("val",)]
    for red in REDS:
        write(folder / "images/val2014" / f"{red}.png", png(red))
    content = {"images": images, "dataset": "org/coco"}
    path = write(folder / "dataset_coco.json", json.dumps(content))
    return {"reference": f"karpathy:{path}", "root": str(folder / "images")}


def as_coco(folder):
    images = [{"id": red, "file_name": f"{red}.png"} for red in REDS]
    annotations = [
        {"image_id": red, "caption": text}
        for red, texts in zip(REDS, CAPTIONS, strict=True)
        for text in texts
    ]
    for red in REDS:
        write(folder / f"{red}.png", png(red))
    images.append({"id": 0, "file_name": "none.png"})  # cannot be retrieved
    annotations.append({"image_id": 0, "caption": " "})
    content = json.dumps({"images": images, "annotations": annotations})
    return {"reference": f"karpathy:{write(folder / 'captions_val2017.json', content)}"}


@pytest.mark.parametrize(
    ("write_form", "name"),
    [
        (as_pairs, "my-pairs"),
        (as_pairs_in_files, "shop"),
        (as_captions_of_tars, "flickr"),
        (as_karpathy, "org-coco"),
        (as_coco, "captions_val2017"),
    ],
)
def test_images_and_captions_are_read_from(write_form, name, tmp_path):
    data = open_data(**write_form(tmp_path))
    split = data.splits["test"]
    assert data.name == name
    assert split.images.key
    assert split.labels is None
    assert not data.class_names
    assert reds(split.images) == list(REDS)
    assert list(split.captions) == CAPTIONS
    assert any("left out" in note for note in data.notes) == (
        write_form in (as_pairs, as_pairs_in_files)
    )


def test_several_classes_an_image(tmp_path):
    split = open_data(f"wds:{write_wds(tmp_path, 'npy')}").splits["test"]
    assert torch.equal(split.labels, torch.tensor([[0, 1], [1, 1], [0, 0]]).bool())


def test_a_table_may_have_captions_and_classes(tmp_path):
    path = write_table(tmp_path / "t.parquet", caption=["a", "", "c"], kind=[7, 8, 9])
    split = open_data(str(path), class_column="kind", split="validation").splits["validation"]
    assert split.labels.tolist() == [0, 1]
    assert list(split.captions) == [("a",), ("c",)]
    assert reds(split.images) == [10, 30]
    assert open_data(str(path), class_column="kind").class_names == ["7", "9"]
    empty = write_table(tmp_path / "e.parquet", caption=["", None, " "], kind=[7, 8, 9])
    data = open_data(str(empty), class_column="kind")
    assert data.splits["test"].labels.tolist() == [0, 1, 2]
    assert data.splits["test"].captions is None
    assert data.notes == [f"{empty}: no image has a caption, so only the classes are used"]


@pytest.mark.parametrize(("least", "rows"), [(1, [[10, 30], [10, 30]]), (3, [[10, 30], REDS])])
def test_columns_of_captions_are_measured_on_common_images(least, rows, tmp_path, monkeypatch):
    """Each on its own where they are fewer than `FEWEST_COMMON`."""
    monkeypatch.setattr(datasets, "FEWEST_COMMON", least)
    path = write_table(tmp_path / "t.parquet", of_de=["a", "", "c"], of_en=["d", "e", "f"])
    whole = open_data(f"{path},caption_column=of_de,caption_column=of_en")
    _, *columns = datasets.split_columns(whole, "test")
    assert [data.language for data in columns] == ["de", "en"]
    assert [reds(data.splits["test"].images) for data in columns] == [[*some] for some in rows]


def test_each_data_set_may_have_its_own_class_column_and_root(tmp_path):
    """Which win over those for all."""
    path = write_table(tmp_path / "t.parquet", caption=["a", "b", "c"], kind=[7, 8, 9])
    data = open_data(f"{path},class_column=kind", class_column="none", root="none")
    assert data.class_names == ["7", "8", "9"]
    path = write_table(
        tmp_path / "u.parquet", caption=["a"] * 3, name=["d", "e", "f"], number=[1, 2, 3]
    )
    usual = DataConfig(image_column="none", caption_column="caption")
    reference = f"{path},image_column=image,caption_column=name,id_column=number"
    split = datasets.open_data(reference, config=usual).splits["test"]
    assert list(split.captions or ()) == [("d",), ("e",), ("f",)]
    assert split.images.sample_id(2) == "3"
    given = as_karpathy(tmp_path / "k")
    data = open_data(f"{given['reference']},root={given['root']}", root="none")
    assert reds(data.splits["test"].images) == [10, 20, 30]


def test_a_url_is_read_once(tmp_path, serve, monkeypatch):
    folder = write_wds(tmp_path / "wds_pets")
    reference = f"wds:{serve('ranges', tmp_path)}/wds_pets"
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "other"))
    at_root = serve("ranges", folder).replace("://", "://me:passw0rd@")
    assert open_data(f"wds:{at_root}").name == "127.0.0.1"
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    first = open_data(reference)
    shutil.rmtree(folder)
    again = open_data(reference)
    assert reds(again.splits["test"].images) == list(REDS)
    assert again.splits["test"].images.key == first.splits["test"].images.key
    assert again.name == "pets"
    with pytest.raises(ValueError, match=r"train/0.tar: no such file$"):
        again.splits["train"]


@pytest.mark.parametrize(
    ("classes", "files", "names"),
    [
        (["n01440764", "n01443537"], {}, ["tench", "goldfish"]),
        (["9", "10"], {"classnames.txt": "nine\nten\n"}, ["nine", "ten"]),
    ],
)
def test_class_names_of_folders(classes, files, names, tmp_path):
    for name in classes:
        write(tmp_path / "val" / name / "a.png", png(1))
    for file, text in files.items():
        write(tmp_path / file, text)
    is_imagenet = names == ["tench", "goldfish"]
    data = open_data(str(tmp_path), split="test" if is_imagenet else "validation")
    assert list(data.class_names) == names
    assert data.splits[next(iter(data.splits))].labels.tolist() == [0, 1]
    assert len(data.templates) == (80 if is_imagenet else 1)


def test_the_thousand_folders_of_imagenet(tmp_path):
    for number in range(1000):
        write(tmp_path / str(number) / "a.png", b"")
    assert tuple(open_data(str(tmp_path)).class_names) == open_clip.IMAGENET_CLASSNAMES


SYNSETS = ImageNetInfo("imagenet-1k")


class OfTorchvision:
    """As torchvision's ImageNet: tuples of synonyms, of which the two cranes have the same."""

    def __init__(self, root, split):
        assert split == "val"
        self.wnids, self.targets = SYNSETS.label_names(), [134, 517, 744]
        self.classes = [tuple(names.split(", ")) for names in SYNSETS.label_descriptions()]

    def __len__(self):
        return len(self.targets)


def as_torchvision(folder, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.ImageNet", OfTorchvision)
    return open_data("torchvision:ImageNet", root=str(folder))


def as_hub_table(folder, _):
    """Its names of the cranes differ, as `ClassLabel` wants it."""
    names = SYNSETS.label_descriptions()
    names[517] = "crane2"
    return open_data(**as_class_label(folder, [134, 517, 744], names)[0])


def as_tars(folder, _):
    write_wds(folder, beside=[b"134", b"517", b"744"], splits=("test",))
    write(folder / "classnames.txt", "\n".join(SYNSETS.label_names()))
    (folder / "zeroshot_classification_templates.txt").unlink()
    return open_data(f"wds:{folder}")


@pytest.mark.parametrize("read", [as_torchvision, as_hub_table, as_tars])
def test_imagenet_has_the_names_of_clip_wherever_it_is_read(read, tmp_path, monkeypatch):
    """A note says which names stand for two classes."""
    data = read(tmp_path, monkeypatch)
    assert tuple(data.class_names) == open_clip.IMAGENET_CLASSNAMES
    assert data.class_names[134] != data.class_names[517]
    assert len(data.templates) == 80
    assert data.splits["test"].labels.tolist() == [134, 517, 744]
    (note,) = [note for note in data.notes if "several classes" in note]
    assert "are called 'missile' and 1 more" in note


def test_torchvision_sets(tmp_path):
    for name, red in (("AnnualCrop", 10), ("River", 20)):
        write(tmp_path / "eurosat/2750" / name / f"{red}.png", png(red))
    write(tmp_path / "eurosat/2750/River/x.png", b"not an image")
    data = open_data("torchvision:EuroSAT", root=str(tmp_path))
    assert data.name == "eurosat"
    assert list(data.class_names) == ["AnnualCrop", "River"]
    split = data.splits["test"]
    assert split.labels.tolist() == [0, 1, 1]
    assert [split.images.image(row).getpixel((0, 0))[0] for row in (0, 1)] == [10, 20]
    assert split.images.key
    with pytest.raises(BadSample, match=r"eurosat/test/2.*cannot identify"):
        split.images.image(2)


@pytest.mark.usefixtures("all_emoji")
def test_the_emoji_have_classes_captions_and_a_name_an_image():
    data = open_data("emoji")
    assert data is emoji()
    classes = set()
    for split in data.splits.values():
        assert len(split.images) == len(split.labels) == len(split.captions) == len(split.groups)
        assert len(split.names) == len(split.images)
        assert len(set(split.names)) == len(set(split.groups))
        classes |= set(split.labels.tolist())
    assert classes == set(range(len(data.class_names)))


@pytest.mark.parametrize(
    ("reference", "number", "first"),
    [("openai", 80, "a bad photo of a {c}."), ("simple", 7, "itap of a {c}."), (None, 2, "a {c}")],
)
def test_templates(reference, number, first, tmp_path):
    file = write(tmp_path / "prompts.txt", "a {}\n\nno {c}, none\n")
    found = read_templates(reference or str(file))
    assert (len(found), found[0]) == (number, first)


def test_classes_are_in_one_order_whatever_it_was_before():
    """Numbers by their value, equal ones by their digits."""
    for names in (["1", "01", "10", "2"], ["2", "01", "1", "10"], ["001", "1", "01"]):
        given = [*names, *names[::-1]]
        assert sort_names(given) == sorted(names, key=lambda name: (int(name), name))
    assert sort_names(["10", "b", "2"]) == ["10", "2", "b"]
