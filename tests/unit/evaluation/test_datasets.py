"""Every reference to evaluation data: what is read, and one line for what is wrong with it."""

import gzip
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import datasets as hugging_face
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from protoclip.data.pairs import BadSample
from protoclip.evaluation.datasets import DOWNLOADS, Images, emoji, open_data
from protoclip.evaluation.zero_shot import read_templates

# The images of every split below, by the red of their pixels, with class and captions.
REDS, NAMES, CLASSES = (10, 20, 30), ["cat", "big dog"], [1, 0, 1]
CAPTIONS = [("one",), ("two", "a second"), ("three",)]


def png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def reds(images: Images) -> list[int]:
    return [images.image(row).getpixel((0, 0))[0] for row in range(len(images))]


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_tar(path, files: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def npy(*present: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(present))
    return buffer.getvalue()


BESIDE = {
    "cls": [b"1", b"0\n", b"1"],
    "npy": [npy(0, 1), npy(1, 1), npy(0, 0)],
    "txt": ["\n".join(texts).encode() for texts in CAPTIONS],
}
KINDS = {"cls": "classification", "npy": "multilabel", "txt": "retrieval"}


def write_wds(folder, extension: str = "cls", beside=None, splits=("train", "test")):
    """Three samples in two tars a split."""
    for split in splits:
        write(folder / split / "nshards.txt", "2\n")
        samples = list(zip(REDS, beside or BESIDE[extension], strict=True))
        for shard, part in enumerate((samples[:2], samples[2:])):
            files: dict[str, bytes] = {}
            for number, (red, content) in enumerate(part):
                key = f"s{shard}{number}"
                files |= {f"{key}.{extension}": content, f"{key}.png": png(red), f"{key}.json": b""}
            write_tar(folder / split / f"{shard}.tar", files)
    write(folder / "classnames.txt", "cat\nbig dog\n")
    write(folder / "zeroshot_classification_templates.txt", "a {c}\nthe {c}.\n")
    if extension != "cls":
        write(folder / "dataset_type.txt", KINDS[extension] + "\n")
    return folder


def write_table(path, **columns):
    table = {"image": [png(red) for red in REDS], **columns}
    pq.write_table(pa.table(table), path)
    return path


def as_wds(folder):
    return {"reference": f"wds:{write_wds(folder / 'wds_pets')}"}, "pets"


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


def as_class_label(folder, labels=CLASSES):
    features = hugging_face.Features(
        image=hugging_face.Value("binary"), label=hugging_face.ClassLabel(names=NAMES)
    )
    data = {"image": [png(red) for red in REDS], "label": labels}
    path = str(folder / "pets.parquet")
    hugging_face.Dataset.from_dict(data, features=features).to_parquet(path)
    return {"reference": path, "class_column": "label"}, "pets"


@pytest.mark.parametrize("write_form", [as_wds, as_folder, as_csv, as_class_label])
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
    if write_form is as_wds:
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


def test_a_pattern_is_named_after_its_folder(tmp_path):
    (tmp_path / "my shop").mkdir()
    write_table(tmp_path / "my shop" / "0.parquet", caption=["a", "b", "c"])
    assert open_data(f"{tmp_path}/my shop/*.parquet").name == "my-shop"


def test_an_image_with_several_classes_in_its_rows_is_told(tmp_path):
    columns = {"caption": ["a", "b", "c"], "kind": ["cat", "dog", "dog"]}
    for images, number in ((["0.png", "0.png", "1.png"], 1), (["0.png", "1.png", "1.png"], 0)):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"image": images, **columns}), path)
        notes = open_data(str(path), class_column="kind").notes
        told = "1 image(s) have other classes in other rows, of which the first counts; give each"
        assert sum(f"{path}: {told}" in note for note in notes) == number


def test_each_data_set_may_have_its_own_class_column_and_root(tmp_path):
    """Which win over those for all."""
    path = write_table(tmp_path / "t.parquet", caption=["a", "b", "c"], kind=[7, 8, 9])
    data = open_data(f"{path},class_column=kind", class_column="none", root="none")
    assert data.class_names == ["7", "8", "9"]
    given = as_karpathy(tmp_path / "k")
    data = open_data(f"{given['reference']},root={given['root']}", root="none")
    assert reds(data.splits["test"].images) == [10, 20, 30]


def test_only_the_split_that_is_measured_is_read(tmp_path):
    folder = write_wds(tmp_path / "data")
    (folder / "train/1.tar").unlink()
    data = open_data(f"wds:{folder}")
    assert sorted(data.splits) == ["test", "train"]
    with pytest.raises(ValueError, match=r"train/1.tar: no such file$"):
        data.splits["train"]


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
    (layout,) = (tmp_path / "cache").rglob("layout.json")
    layout.write_text("{")
    with pytest.raises(ValueError, match=r"layout\.json: damaged"):
        open_data(reference)


@pytest.mark.parametrize(
    ("classes", "files", "names"),
    [
        (["n01440764", "n01443537"], {}, ["tench", "goldfish"]),
        (["n01440764", "n00000001"], {"LOC_synset_mapping.txt": "n00000001 thing, item\n"}, None),
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
    assert list(data.class_names) == (names or ["thing", "n01440764"])
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
    features = hugging_face.Features(
        image=hugging_face.Value("binary"), label=hugging_face.ClassLabel(names=names)
    )
    data = {"image": [png(red) for red in REDS], "label": [134, 517, 744]}
    path = str(folder / "imagenet.parquet")
    hugging_face.Dataset.from_dict(data, features=features).to_parquet(path)
    return open_data(path, class_column="label")


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
    os.mkfifo(tmp_path / "eurosat/2750/River/y.png")
    data = open_data("torchvision:EuroSAT", root=str(tmp_path))
    assert data.name == "eurosat"
    assert list(data.class_names) == ["AnnualCrop", "River"]
    split = data.splits["test"]
    assert split.labels.tolist() == [0, 1, 1, 1]
    assert [split.images.image(row).getpixel((0, 0))[0] for row in (0, 1)] == [10, 20]
    assert split.images.key
    for row, why in ((2, "cannot identify"), (3, "is a pipe, not a file")):
        with pytest.raises(BadSample, match=f"eurosat/test/{row}.*{why}"):
            split.images.image(row)


def test_the_classes_of_caltech256_have_no_numbers(tmp_path):
    for name in ("001.ak47", "145.motorbikes-101"):
        write(tmp_path / "caltech256/256_ObjectCategories" / name / "a.jpg", b"")
    data = open_data("torchvision:Caltech256", root=str(tmp_path))
    assert list(data.class_names) == ["ak47", "motorbikes"]


def test_torchvision_sets_in_memory(tmp_path):
    """The labels of USPS go from 1 to 10, its pixels from -1 to 1."""
    import bz2

    for name, digits in (("usps.t.bz2", (3, 10)), ("usps.bz2", (1,))):
        rows = (f"{digit} " + " ".join(f"{i}:-1" for i in range(1, 257)) for digit in digits)
        write(tmp_path / name, bz2.compress("\n".join(rows).encode()))
    data = open_data("torchvision:USPS", root=str(tmp_path))
    assert data.splits["test"].labels.tolist() == [2, 9]
    assert data.splits["train"].labels.tolist() == [0]
    assert data.class_names[9] == "9"
    assert data.splits["test"].images.image(0).mode == "RGB"
    assert data.splits["test"].images.key != data.splits["train"].images.key


@pytest.mark.usefixtures("all_emoji")
def test_the_emoji_have_classes_captions_and_a_name_an_image():
    data = open_data("emoji")
    assert data is emoji()
    classes = set()
    for name, split in data.splits.items():
        assert len(split.images) == len(split.labels) == len(split.captions) == len(split.groups)
        assert len(data.image_names[name]) == len(split.images)
        assert len(set(data.image_names[name])) == len(set(split.groups))
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


def folder_of(tmp_path, *files: str):
    for file in files:
        write(tmp_path / file, png(1))
    return {"reference": str(tmp_path)}


def wds_with(tmp_path, extension="cls", splits=("test",), beside=None, without=(), **files):
    write_wds(tmp_path, extension, beside, splits)
    for name in without:
        (tmp_path / name).unlink()
    for name, content in files.items():
        write(tmp_path / f"{name}.txt", content)
    return {"reference": f"wds:{tmp_path}"}


def tar_with(tmp_path, files, cut=0, *, packed=False):
    write(tmp_path / "test/nshards.txt", "1")
    write_tar(tmp_path / "test/0.tar", files)
    content = (tmp_path / "test/0.tar").read_bytes()
    content = gzip.compress(content) if packed else content[: cut or None]
    write(tmp_path / "test/0.tar", content)
    write(tmp_path / "classnames.txt", "cat\ndog")
    return {"reference": f"wds:{tmp_path}"}


def table_with(tmp_path, class_column=None, **columns):
    return {
        "reference": str(write_table(tmp_path / "t.parquet", **columns)),
        "class_column": class_column,
    }


def json_with(tmp_path, content):
    return {"reference": f"karpathy:{write(tmp_path / 'c.json', content)}"}


KARPATHY = '{"images": [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a"}]}]}'
A, B = "test/a/1.png", "test/b/2.png"
BAD = [
    (lambda _: {"reference": "cifar10"}, r"^cifar10: no such file, .*clip-benchmark/wds_vtab-cif"),
    (lambda _: {"reference": "tfds:mnist"}, r"^tfds:mnist: no such file, and no reference to a"),
    (lambda t: {"reference": f"{t}/photos"}, r"photos: no such file"),
    (
        lambda t: {"reference": f"wds:{t}/wds_gtsrb"},
        r"no such folder; gtsrb is to be had from wds:",
    ),
    (lambda t: {"reference": f"wds:{t}"}, r"no split in CLIP_benchmark's layout, such as test/nsh"),
    (lambda t: {"reference": "emoji", "split": "dev"}, r"split: 'dev' is none of train, validatio"),
    (lambda t: wds_with(t, splits=("train",)), r"has no split 'test', only train$"),
    (lambda t: wds_with(t, **{"test/nshards": "many"}), r"nshards.txt: holds 'many', not a numb"),
    (lambda t: wds_with(t, without=["classnames.txt"]), r"has no class names; write them into cl"),
    (lambda t: wds_with(t, classnames="cat"), r"sample '0/s00': class 1, but the class names go"),
    (lambda t: wds_with(t, beside=[b"0", b"-1", b"0"]), r"sample '0/s01': class -1, but"),
    (lambda t: wds_with(t, beside=[b"0", b"0_1", b"0"]), r"'0/s01': b'0_1' is not a class number$"),
    (
        lambda t: wds_with(t, "npy", beside=[npy(0, 1), npy(0, np.nan), npy(1, 0)]),
        r"sample '0/s01': its .npy holds something else than numbers",
    ),
    (
        lambda t: tar_with(t, {"a.cls": b"0", "a.webp": png(1), "a.png": png(2)}),
        r"0.tar: sample 'a' has two images; keys must differ, and",
    ),
    (
        lambda t: tar_with(t, {"a.cls": b"0", "a.png": png(1), "b.cls": b"1", "./a.cls": b"1"}),
        r"0.tar: sample 'b' has no image",
    ),
    (
        lambda t: tar_with(t, {"a.cls": b"0", "a.png": png(1)}, packed=True),
        r"0.tar: is compressed; unpack it once \(gunzip\)$",
    ),
    (lambda _: {"reference": "wds:"}, r"^'wds:' is not complete; give wds:FOLDER_OR_URL$"),
    (lambda t: wds_with(t, beside=[b"0"] * 3, classnames="cat"), r"fewer than two classes \(cat\)"),
    (lambda t: wds_with(t, "npy", classnames="a\nb\nc"), r"'0/s00': shape \(2,\) in its .npy, but"),
    (lambda t: wds_with(t, "npy", beside=[b"0"] * 3), r"sample '0/s00': "),
    (lambda t: wds_with(t, "txt", beside=[b"a", b" ", b"c"]), r"sample '0/s01': empty caption$"),
    (lambda t: wds_with(t, dataset_type="video"), r"dataset_type.txt: 'video' is none of classif"),
    (
        lambda t: wds_with(t, zeroshot_classification_templates="a {c}\nphoto"),
        r"templates.txt: 'photo' has no place for the class; write \{c\} there$",
    ),
    (lambda t: tar_with(t, {"a.txt": b"0", "a.png": b"1"}), r"0.tar: sample 'a' has no .cls; dat"),
    (lambda t: tar_with(t, {"\x1b[2J.cls": b"0"}), r"sample '\\x1b\[2J' has no image"),
    (lambda t: wds_with(t, dataset_type="\x1b[2J"), r"dataset_type.txt: '\\x1b\[2j' is none of"),
    (lambda t: tar_with(t, {"a.cls": b"0"}), r"0.tar: sample 'a' has no image \(gif"),
    (
        lambda t: tar_with(t, {"a.cls": b"0", "b.png": b"1"}, cut=1024),
        r"unexpected end of data after 0",
    ),
    (
        lambda t: tar_with(t, {"a.cls": b"0", "a.png": b"1", "b.png": b"1" * 999}, cut=2900),
        r"0.tar: .* in b.p",
    ),
    (lambda t: tar_with(t, {}), r"test: holds no sample$"),
    (lambda t: folder_of(t, "train/a/1.png", "train/b/2.png"), r"no split 'test', only train$"),
    (lambda t: folder_of(t, A), r"has fewer than two classes \(a\)$"),
    (lambda t: folder_of(t, "train/a/1.png", "train/b/1.png", "test/c.txt"), r"no split 'test'"),
    (
        lambda t: folder_of(t, A, B, "test/a/\udce9.png"),
        r"a/\\udce9.png: its name is not UTF-8; ren",
    ),
    (
        lambda t: folder_of(t, A, B, "test/\udce9/3.png"),
        r"test/\\udce9: its name is not UTF-8; ren",
    ),
    (
        lambda t: folder_of(t, A, B, "classnames.txt"),
        r"classnames\.txt: cannot be read as UTF-8 \(",
    ),
    (lambda t: table_with(t), r"no column with captions; set caption_column to one"),
    (lambda t: table_with(t, caption=[None, "", " "]), r"no image has a caption$"),
    (lambda t: table_with(t, "kind", caption=list("abc")), r"no column 'kind'; it has 'image', 'c"),
    (
        lambda t: table_with(t, "k", k=[1, None, 2]),
        r"'t.parquet/1' has no class; fill it in, or leave its row out$",
    ),
    (lambda t: table_with(t, "k", k=["a", "b", " "]), r"'t.parquet/2' has no class; "),
    (lambda t: as_class_label(t, [1, -1, 0])[0], r"'pets.parquet/1' has no class; fill it in"),
    (lambda t: as_class_label(t, [1, 0, None])[0], r"'pets.parquet/2' has no class; fill it in"),
    (lambda t: table_with(t, "k", k=[0.5, 1.0, 2]), r"'k' holds double, not classes; set class_c"),
    (lambda t: table_with(t, "k", k=["a"] * 3), r"has fewer than two classes \(a\)$"),
    (
        lambda t: table_with(t, image=[1, 2, 3], caption=list("abc")),
        r"holds int64, not images; set",
    ),
    (
        lambda t: {"reference": str(write_wds(t) / "test"), "class_column": "k"},
        r"is no table and has no columns; leave out class_column$",
    ),
    (
        lambda _: {"reference": "https://example.com/{0..3}.tar"},
        r"tar: evaluation reads in any order; copy the shards, or",
    ),
    (lambda t: json_with(t, "[]"), r"c.json: is neither Karpathy's JSON .* nor COCO's captions"),
    (lambda t: json_with(t, '{"images": [{"filename": "a"}]}'), r"COCO's captions \(no 'split'\)$"),
    (lambda t: json_with(t, KARPATHY), r"a.jpg: no such image; set root to the folder"),
    (lambda t: {"reference": f"karpathy:{t}/dataset_flickr30k.json"}, r"file; flickr30k is to be"),
    (lambda t: {"reference": "torchvision:Dogs", "root": str(t)}, r"not a known .*; known are CIF"),
    # Its classes are called by the codes of countries.
    (lambda _: {"reference": "torchvision:Country211"}, r"not a known .*; country211 is to be had"),
    (
        lambda t: {"reference": "torchvision:CIFAR10"},
        r"root is not set; .*CIFAR10\('FOLDER', download=True\) may .*; cifar10 is to be had from",
    ),
    (
        lambda t: {"reference": "torchvision:MNIST"},
        r"MNIST\('FOLDER', download=True\) may fetch it$",
    ),
    (
        lambda t: {"reference": "torchvision:CIFAR10", "root": str(t)},
        r"its test split is not in .*not found.*CIFAR10\(.*; cifar10 is to be had from wds:https:",
    ),
]


def test_all_data_sets_of_the_documentation_are_known_where_they_are_missing():
    page = (Path(__file__).parents[3] / "docs/evaluation.md").read_text()
    whole = page.replace("HUB/", "https://huggingface.co/datasets/clip-benchmark/")
    assert [source for source in DOWNLOADS.values() if source not in whole] == []
    table = page.partition("### Where to get them")[2].partition("## Tasks")[0]
    found = re.findall(r"`(wds:|torchvision:|karpathy:)(?:HUB/)?([^`]+)`", table)
    assert len(found) == 25
    for kind, name in (*found, ("wds:", "birdsnap"), ("wds:", "ucf101")):
        with pytest.raises(ValueError, match=r"is to be had from (wds:)?https://"):
            open_data(f"{kind}{name}")


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_data_are_one_clear_line(make, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        open_data(**make(tmp_path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a photo of a\n", r"p.txt: 'a photo of a' has no place for the class; write \{c\} there$"),
        ("\n", r"p.txt: holds no prompt$"),
        (None, r"p.txt: no file of prompts \(no such file\); give openai, simple or a file$"),
    ],
)
def test_bad_templates_are_refused(content, message, tmp_path):
    path = tmp_path / "p.txt"
    if content is not None:
        write(path, content)
    with pytest.raises(ValueError, match=message):
        read_templates(str(path))
