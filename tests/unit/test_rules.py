"""Paths that settings name: which are looked for, and what is said of those that are not there."""

from pathlib import Path

import pytest

from protoclip.config import Config
from protoclip.rules import require_paths, require_place, with_options


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.tsv").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "folder/in").mkdir(parents=True)
    (tmp_path / "folder/in/a.tsv").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"train": "pairs.tvs"}}, "data.train: pairs.tvs: no such file; did you mean"),
        ({"data": {"train": ""}}, "data.train: is empty; name a file or folder"),
        ({"data": {"train": "pairs.tsv/a"}}, "pairs.tsv/a: cannot be opened .Not a directory"),
        ({"data": {"train": "a\ud800"}}, "cannot be opened .'utf-8' codec can't encode"),
        ({"data": {"sources": [{"path": "none.tsv"}]}}, r"data.sources\[0\].path: none.tsv: no"),
        ({"data": {"validation": "none.tsv"}}, "data.validation: none.tsv: no such file"),
        ({"data": {"root": "none"}}, "data.root: none: no such folder"),
        ({"data": {"root": "pairs.tsv"}}, "data.root: pairs.tsv: is a file, not a folder"),
        ({"data": {"only": "none.csv"}}, "data.only: none.csv: no such file"),
        ({"model": {"start": "runn"}}, "no such run or checkpoint folder; .*; did you mean run"),
        ({"teacher": {"features": "none.npy"}}, "teacher.features: none.npy: no such file"),
        ({"run": {"guard": ["none.tsv,class_column=a"]}}, "run.guard: none.tsv: no such file"),
        ({"run": {"guard": ["emoji,root=none"]}}, "run.guard: root: none: no such folder"),
    ],
)
def test_a_path_that_is_not_there_is_named_with_its_setting(tree, message, place):
    with pytest.raises(ValueError, match=message) as raised:
        require_paths(Config.from_dict(tree))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"data": {"train": "emoji"}},
        {"data": {"train": "pairs.tsv"}},
        {"data": {"train": "hf:owner/name"}},
        {"data": {"train": "torchvision:CIFAR10"}},
        {"data": {"train": "none-{000..003}.tar"}},
        {"data": {"train": "none-*.parquet"}},
        {"data": {"train": "s3://bucket/none.tsv", "root": "s3://bucket"}},
        {"model": {"start": "open_clip:RN50/openai"}},
        {"model": {"start": "run"}},
        {"teacher": {"features": "emoji"}},
        {"teacher": {"features": "s3://bucket/a"}},
        {"teacher": {"features": "start"}, "model": {"start": "run"}},
        {"run": {"guard": ["wds:none", "torchvision:CIFAR10,root=run"]}},
    ],
)
def test_what_is_no_local_path_is_not_looked_for(tree, place):
    require_paths(Config.from_dict(tree))


@pytest.mark.parametrize(
    ("reference", "name", "options"),
    [
        ("a.tsv,class_column=kind,root=x", "a.tsv", {"class_column": "kind", "root": "x"}),
        ("a.tsv,image_column=a,id_column=b", "a.tsv", {"image_column": "a", "id_column": "b"}),
        ("a.tsv,root=x,y", "a.tsv", {"root": "x,y"}),
        ("hf:a/b,split=train,root=x", "hf:a/b,split=train", {"root": "x"}),
        ("hf:a/b,root=x,split=train", "hf:a/b,split=train", {"root": "x"}),
        ("https://x.org/a.tsv?b,c=d", "https://x.org/a.tsv?b,c=d", {}),
        ("a-{0,1}.tar", "a-{0,1}.tar", {}),
        ("run,v=2,root=x", "run,v=2", {"root": "x"}),
    ],
)
def test_options_may_stand_behind_a_data_set(reference, name, options, place):
    """What names on the hub, URLs, patterns and files hold themselves is left to them."""
    (place / "run,v=2").mkdir()
    assert with_options(reference) == (name, options)


def test_a_place_to_write_to_may_be_new_but_nothing_may_be_in_its_way(place):
    require_place("--out", "new/deep/file", is_folder=False)
    require_place("--out", "run", is_folder=True)
    for path, is_folder, message in (
        ("", True, "--out: is empty; name a folder"),
        ("run", False, "--out: run: is a folder; name a file in it"),
        ("pairs.tsv", True, "--out: pairs.tsv: pairs.tsv is a file, not a folder; choose another"),
        ("pairs.tsv/a/b", False, "pairs.tsv is a file, not a folder; choose another place"),
        ("s3://bucket/run", True, "--out: s3://bucket/run: is a URL; name a place on a disk"),
    ):
        with pytest.raises(ValueError, match=message):
            require_place("--out", path, is_folder=is_folder)
