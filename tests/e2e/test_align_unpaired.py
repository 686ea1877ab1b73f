"""`align` with images and captions without partner."""

from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from protoclip.encode import unpaired
from protoclip.encode.rows import PairRows
from protoclip.training.run import align, train
from testing import run_distributed, tiny_pairs
from tiny_align import (
    align_on_a_rank,
    assert_near,
    changed,
    rows_of,
    tiny_alignment,
    weights_of,
)
from tiny_hugging_face import save_mpnet


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpaired")
    own = tiny_alignment(folder)
    pq.write_table(tiny_pairs(160), folder / "more.parquet")
    (folder / "images").mkdir()
    others = tiny_pairs(90, seed=3)
    for number, image in enumerate(others["image"].to_pylist()[:40]):
        (folder / f"images/{number}.png").write_bytes(image if number else b"no image")
    captions = [f"{text} {n}" for n, text in enumerate(others["caption"].to_pylist()[40:])]
    (folder / "captions.txt").write_text("\n".join(captions))
    more = {"images": str(folder / "images"), "texts": str(folder / "captions.txt")}
    return changed(own, data={"train": str(folder / "more.parquet"), **more})


ALONE = {"images": None, "texts": None}


def let_them_help(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    """Let partners be found at rank 2 by pairs alone, and nearer by a gain with what joins them."""

    def choose(self: Any, options: Any, fit: Any = None) -> tuple[Any, Any]:
        return (0, 0), {(0, 0): 2.0 if fit is None else 2.0 - gain}

    monkeypatch.setattr(PairRows, "choose_columns", choose)


def fit_start(settings: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """The notes of a plan, and the weights with which the image projection starts."""
    plan, _, model = rows_of(settings)
    return "\n".join(plan.notes), model.towers.visual.head.proj.weight.detach().clone()


def test_what_helps_pairs_out_of_fold_joins_them(settings, monkeypatch):
    let_them_help(monkeypatch, 0.5)
    (_, alone), (notes, joined) = fit_start(changed(settings, data=ALONE)), fit_start(settings)
    said = (
        "data.images and data.texts: 39 images and 50 captions join the pairs: a partner out of "
        "fold is found at rank 1.50 on average with them, and at 2.00 without"
    )
    assert said in notes
    assert "data.images: 1 cannot be used, such as " in notes
    assert not torch.equal(joined, alone)


def test_what_helps_no_pair_is_left_out(settings, monkeypatch):
    let_them_help(monkeypatch, -0.5)
    (_, alone), (notes, joined) = fit_start(changed(settings, data=ALONE)), fit_start(settings)
    assert "39 images and 50 captions are left out: a partner" in notes
    assert torch.equal(joined, alone)


def test_many_pairs_gain_nothing(settings, monkeypatch):
    monkeypatch.setattr(unpaired, "MOST", 150)
    notes, _ = fit_start(settings)
    assert "data.images: no effect, since 100 to 150 pairs gain" in notes


def test_a_run_says_what_came_of_them_and_encodes_them_once(settings, tmp_path, capsys):
    captions = [f"a caption of this test, {number}" for number in range(50)]
    (tmp_path / "own.txt").write_text("\n".join(captions))
    settings = changed(settings, data={"texts": str(tmp_path / "own.txt")})
    for name in ("one", "two"):
        align(changed(settings, tmp_path / name))
        said = capsys.readouterr().err
        assert "data.images and data.texts: 39 images and 50 captions" in said
        assert ("encode data.texts" in said) == (name == "one")
    one, two = (weights_of(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_ranks_join_what_one_process_joins_between_several_encoders(settings, tmp_path):
    text = settings["model"]["text"]
    names = [text["name"], str(save_mpnet(tmp_path / "mpnet"))]
    model = {**settings["model"], "text": {**text, "name": names}}
    for ranks in (1, 2):
        own = changed({**settings, "model": model}, tmp_path / f"{ranks}")
        run_distributed(align_on_a_rank, ranks, own, str(tmp_path / f"cache{ranks}"))
    assert_near(tmp_path / "2", tmp_path / "1")


def test_other_commands_say_that_they_leave_them_alone(settings, tmp_path, capsys):
    data = {**settings["data"], "validation": 0.0}
    run = {"device": "cpu", "out": str(tmp_path / "run")}
    train({"data": data, "run": run, "episodes": {"size": 16, "count": 3, "batch_size": 8}})
    assert "data.images: no effect, since protoclip align alone joins" in capsys.readouterr().err
