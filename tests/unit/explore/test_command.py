"""`protoclip explore`: what it serves and writes; the pages themselves are in `test_pages.py`."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
from worded import WordModel, loaded

from protoclip.cli import main
from protoclip.cli.explore import Explore, listen
from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.explore.explorer import Explorer
from protoclip.training.folder import to_toml
from testing import tiny_config


def test_the_command_writes_pages_and_a_table(
    two: list[Explorer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source,) = two[0].pairs.sources
    pq.write_table(source.table, tmp_path / "pairs.parquet")
    (tmp_path / "ids.csv").write_text("sample_id\n" + "\n".join(f"tiny/{n}" for n in range(30)))
    samples = sources.open_samples(Config(data=DataConfig(train=str(tmp_path / "pairs.parquet"))))
    with loaded(WordModel(samples)) as (name,):
        words = ["explore", name, "--data", str(tmp_path / "pairs.parquet")]
        words += ["--without", str(tmp_path / "ids.csv"), "--groups", "4", "--map", "pca"]
        main([*words, "--static", str(tmp_path / "out"), "--atlas", str(tmp_path / "a.parquet")])
    said = capsys.readouterr()
    assert said.err.startswith(f"opening words-1 on {tmp_path / 'pairs.parquet'}\n")
    assert f"embedding-atlas {tmp_path / 'a.parquet'} --x x --y y" in said.out
    assert "note: data.without: 31 of 60 samples are used" in said.err
    assert "computing: features of 31 pairs; then groups, map and checks, about 1 min;" in said.err
    assert "note: the pages cannot search: " in said.err
    assert pq.read_metadata(tmp_path / "a.parquet").num_rows == 62
    assert "prototype-text-3.html" in (tmp_path / "out" / "1" / "prototypes.js").read_text("utf-16")


def test_a_port_that_is_taken_is_known_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was given is refused; else the next free one is used."""
    monkeypatch.setattr("protoclip.cli.spec.quick_imports", Mock(side_effect=AssertionError))
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^--port: cannot listen on 127.0.0.1 port {port} "):
            Explore(models=["hf:x"], data="emoji", port=port)()
        with pytest.raises(ValueError, match=r"^--port: cannot listen on no.such.host.invalid"):
            listen("no.such.host.invalid", 0)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr("protoclip.cli.explore.PORTS", range(port, port + 9))
        with listen("127.0.0.1", None) as listening:
            used = listening.getsockname()[1]
    assert used > port


@pytest.mark.usefixtures("any_map")
def test_the_map_is_by_umap_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for there, layout, said in (("spec", "umap", ""), (None, "pca", "pip install umap-learn")):
        monkeypatch.setattr("protoclip.cli.explore.find_spec", lambda name, found=there: found)
        assert Explore(models=["x"]).layout() == layout
        assert Explore(models=["x"], map="pca").layout() == "pca"
        assert said in capsys.readouterr().err


def test_a_run_is_explored_on_its_own_data(tmp_path: Path) -> None:
    config = tiny_config("own.parquet", out=str(tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text(to_toml(config))
    for folder in (tmp_path / "run", checkpoint):
        assert Explore(models=[str(folder)]).settings() == config.data
        other = Explore(models=[str(folder)], data="x.tsv", root="y").settings()
        assert other == DataConfig(train="x.tsv", root="y")
        columns = {"image_column": "a", "caption_column": ["b", "c"], "id_column": "d"}
        given = Explore(models=[str(folder)], **columns).settings()
        assert given == replace(config.data, **columns)
    streamed = replace(config, data=replace(config.data, read="streaming"))
    (tmp_path / "run" / "config.toml").write_text(to_toml(streamed))
    assert Explore(models=[str(tmp_path / "run")]).settings() == config.data  # read="auto"
