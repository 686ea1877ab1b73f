"""Paths that settings name, and options behind data sets; tests/hostile has what is refused."""

from pathlib import Path

import pytest

from protoclip.config import Config
from protoclip.rules import require_paths, with_options


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.tsv").write_text("")
    (tmp_path / "run").mkdir()
    return tmp_path


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
