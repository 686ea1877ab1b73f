"""One line for what is wrong with evaluation data, or with a reference to them."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from written import as_class_label, npy, png, write, write_table, write_tar, write_wds

from protoclip.evaluation.datasets import DOWNLOADS, open_data
from protoclip.evaluation.zero_shot import read_templates


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
    (lambda t: {"reference": f"{t}/photos"}, r"photos: no such file"),
    (lambda t: {"reference": f"wds:{t}"}, r"no split in CLIP_benchmark's layout, such as test/nsh"),
    (lambda t: {"reference": "emoji", "split": "dev"}, r"split: 'dev' is none of train, validatio"),
    (lambda t: wds_with(t, splits=("train",)), r"has no split 'test', only train$"),
    (lambda t: wds_with(t, **{"test/nshards": "many"}), r"nshards.txt: holds 'many', not a numb"),
    (lambda t: wds_with(t, without=["classnames.txt"]), r"has no class names; write them into cl"),
    (lambda t: wds_with(t, classnames="cat"), r"sample '0/s00': class 1, but the class names go"),
    (
        lambda t: wds_with(t, "npy", beside=[npy(0, 1), npy(0, np.nan), npy(1, 0)]),
        r"sample '0/s01': its .npy holds something else than numbers",
    ),
    (
        lambda t: tar_with(t, {"a.cls": b"0", "a.webp": png(1), "a.png": png(2)}),
        r"0.tar: sample 'a' has two images; keys must differ, and",
    ),
    (
        lambda t: tar_with(t, {"a.cls": b"0", "a.png": png(1)}, packed=True),
        r"0.tar: is compressed; unpack it once \(gunzip\)$",
    ),
    (lambda t: wds_with(t, "npy", classnames="a\nb\nc"), r"'0/s00': shape \(2,\) in its .npy, but"),
    (lambda t: wds_with(t, "txt", beside=[b"a", b" ", b"c"]), r"sample '0/s01': empty caption$"),
    (lambda t: wds_with(t, dataset_type="video"), r"dataset_type.txt: 'video' is none of classif"),
    (
        lambda t: wds_with(t, zeroshot_classification_templates="a {c}\nphoto"),
        r"templates.txt: 'photo' has no place for the class; write \{c\} there$",
    ),
    (lambda t: tar_with(t, {"a.txt": b"0", "a.png": b"1"}), r"0.tar: sample 'a' has no .cls; dat"),
    (lambda t: tar_with(t, {"\x1b[2J.cls": b"0"}), r"sample '\\x1b\[2J' has no image"),
    (
        lambda t: tar_with(t, {"a.cls": b"0", "b.png": b"1"}, cut=1024),
        r"unexpected end of data after 0",
    ),
    (lambda t: tar_with(t, {}), r"test: holds no sample$"),
    (
        lambda t: folder_of(t, A, B, "test/a/\udce9.png"),
        r"a/\\udce9.png: its name is not UTF-8; ren",
    ),
    (
        lambda t: folder_of(t, A, B, "classnames.txt"),
        r"classnames\.txt: cannot be read as UTF-8 \(",
    ),
    (lambda t: table_with(t), r"no column with captions; write ,caption_column=NAME behind it"),
    (lambda t: table_with(t, "kind", caption=list("abc")), r"no column 'kind'; it has 'image', 'c"),
    (
        lambda t: table_with(t, "k", k=[1, None, 2]),
        r"'t.parquet/1' has no class; fill it in, or leave its row out$",
    ),
    (lambda t: as_class_label(t, [1, -1, 0])[0], r"'pets.parquet/1' has no class; fill it in"),
    (lambda t: table_with(t, "k", k=[0.5, 1.0, 2]), r"'k' holds double, not classes; set class_c"),
    (
        lambda t: table_with(t, image=[1, 2, 3], caption=list("abc")),
        r"holds int64, not images; set",
    ),
    (
        lambda t: {"reference": str(write_wds(t) / "test"), "class_column": "k"},
        r"is no table and has no columns; leave out class_column, or write it behind its table al",
    ),
    (
        lambda _: {"reference": "https://example.com/{0..3}.tar"},
        r"tar: evaluation reads in any order; copy the shards, or",
    ),
    (lambda t: json_with(t, "[]"), r"c.json: is neither Karpathy's JSON .* nor COCO's captions"),
    (lambda t: json_with(t, KARPATHY), r"a.jpg: no such image; set root to the folder"),
    (lambda t: {"reference": "torchvision:Dogs", "root": str(t)}, r"not a known .*; known are CIF"),
    (
        lambda t: {"reference": "torchvision:CIFAR10"},
        r"root is not set; .*CIFAR10\('FOLDER', download=True\) may .*; download cifar10 from",
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
        with pytest.raises(ValueError, match=r"download \S+ from (wds:)?https://"):
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
