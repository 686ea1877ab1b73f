"""One line for what is wrong with evaluation data, or with a reference to them."""

import numpy as np
import pytest
from written import as_class_label, npy, open_data, write, write_tar, write_wds


def wds_with(tmp_path, extension="cls", splits=("test",), beside=None, **files):
    write_wds(tmp_path, extension, beside, splits)
    for name, content in files.items():
        write(tmp_path / f"{name}.txt", content)
    return {"reference": f"wds:{tmp_path}"}


def tar_with(tmp_path, files):
    write(tmp_path / "test/nshards.txt", "1")
    write_tar(tmp_path / "test/0.tar", files)
    write(tmp_path / "classnames.txt", "cat\ndog")
    return {"reference": f"wds:{tmp_path}"}


def json_with(tmp_path, content):
    return {"reference": f"karpathy:{write(tmp_path / 'c.json', content)}"}


KARPATHY = '{"images": [{"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a"}]}]}'
BAD = [
    (lambda t: wds_with(t, splits=("train",)), r"has no split 'test', only train$"),
    (lambda t: wds_with(t, classnames="cat"), r"sample '0/s00': class 1, but the class names go"),
    (
        lambda t: wds_with(t, "npy", beside=[npy(0, 1), npy(0, np.nan), npy(1, 0)]),
        r"sample '0/s01': its .npy holds something other than numbers",
    ),
    (lambda t: wds_with(t, "npy", classnames="a\nb\nc"), r"'0/s00': shape \(2,\) in its .npy, but"),
    (lambda t: wds_with(t, "txt", beside=[b"a", b" ", b"c"]), r"sample '0/s01': empty caption$"),
    (lambda t: tar_with(t, {"a.txt": b"0", "a.png": b"1"}), r"0.tar: sample '0/a' has no .cls; da"),
    (lambda t: as_class_label(t, [1, -1, 0])[0], r"'pets.parquet/1' has no class; fill it in"),
    (
        lambda _: {"reference": "https://example.com/{0..3}.tar"},
        r"tar: evaluation reads in any order; copy the shards, or",
    ),
    (lambda t: json_with(t, KARPATHY), r"a.jpg: no such image; set root to the folder"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_data_are_one_clear_line(make, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        open_data(**make(tmp_path))
    assert str(caught.value).isprintable()
