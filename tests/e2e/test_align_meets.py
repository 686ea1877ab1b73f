"""`protoclip align` where it meets other features of a run, other commands, and bad input."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import protoclip
from protoclip import cli
from protoclip.config import Config
from protoclip.data.pack import pack
from protoclip.data.pairs import ImageTextPairs
from protoclip.features import encode as encoding
from protoclip.features import parts
from protoclip.features.store import hash_ids
from protoclip.files import locked
from protoclip.models import loading
from protoclip.testing import run_distributed, tiny_pairs
from protoclip.training.align import align
from protoclip.training.run import train
from protoclip.training.trainer import Trainer
from tiny_align import changed, rows_of, tiny_alignment, weights_of


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, Any]:
    return tiny_alignment(tmp_path_factory.mktemp("halves"))


@pytest.fixture(scope="module")
def sources(given, tmp_path_factory) -> dict[str, Any]:
    """Settings of `data` for the same and other pairs, by what they are."""
    folder = tmp_path_factory.mktemp("sources")
    table = tiny_pairs(96)
    kinds = pa.array([caption.split()[1] for caption in table["caption"].to_pylist()])
    pq.write_table(table.append_column("kind", kinds), folder / "classes.parquet")
    pq.write_table(tiny_pairs(48, seed=2), folder / "more.parquet")
    (folder / "images").mkdir()
    rows = ["image\tcaption"]
    columns = zip(table["image"].to_pylist(), table["caption"].to_pylist(), strict=True)
    for number, (image, caption) in enumerate(columns):
        (folder / f"images/{number}.png").write_bytes(image)
        (folder / f"images/{number}.txt").write_text(caption)
        rows.append(f"images/{number // 3}.png\t{caption} {number}")
    (folder / "shared.tsv").write_text("\n".join(rows))
    pack(ImageTextPairs(table, name="tiny"), folder / "shards", samples_per_shard=40)
    (folder / "ids.csv").write_text("\n".join(["sample_id", *(f"tiny/{n}" for n in range(20))]))
    mixture = [{"path": given["data"]["train"]}, {"path": str(folder / "more.parquet")}]
    weighted = [{**part, "weight": share} for part, share in zip(mixture, (0.7, 0.3), strict=True)]
    none = given["data"]["validation"]
    return {
        "mixture": {"sources": mixture, "validation": none},
        "weighted": {"sources": weighted, "validation": 0.4},
        "classes": {
            "train": str(folder / "classes.parquet"),
            "class_column": "kind",
            "validation": 0.4,
        },
        "shared": {"train": str(folder / "shared.tsv"), "validation": 0.3},
        "shards": {"train": str(folder / "shards")},
        "folder": {"train": str(folder / "images")},
        "only": {"only": str(folder / "ids.csv")},
        "without": {"without": str(folder / "ids.csv")},
    }


def of_source(given: dict[str, Any], data: dict[str, Any], **more: Any) -> dict[str, Any]:
    rest = {"workers": 0, "validation": given["data"]["validation"]}
    if "sources" not in data:
        rest["train"] = given["data"]["train"]
    return changed({**given, "data": {**rest, **data}}, **more)


@pytest.mark.parametrize(
    "kind", ["mixture", "weighted", "classes", "shared", "shards", "folder", "only", "without"]
)
def test_each_row_has_the_features_of_its_own_image_and_captions(kind, given, sources):
    """Of whatever source, with what is held out and left out."""
    plan, rows, model = rows_of(
        of_source(given, sources[kind], episodes={"size": 16, "batch_size": 8})
    )
    samples = plan.samples
    assert len(samples) == len(rows.images)
    transform = loading.evaluation_transform(model)
    for row in (0, len(samples) // 2, len(samples) - 1):
        image = rows.image_rows(np.array([row])).float()
        whole = model.eval().towers.visual.trunk(transform(samples.image(row))[None])
        np.testing.assert_allclose(image.numpy(), whole.detach().numpy(), atol=2e-3, rtol=2e-3)
        own = {*samples.sample_captions(row)}
        numbers = rows.captions[rows.first[row] : rows.first[row + 1]]
        assert {*rows.text.find(hash_ids(sorted(own)))} <= {*numbers}
        if kind != "shared":
            assert len(numbers) == len(own)


@pytest.mark.parametrize("kind", ["weighted", "classes", "shared"])
def test_a_source_can_be_aligned_from_end_to_end(kind, given, sources, tmp_path):
    results = align(of_source(given, sources[kind], run={"out": str(tmp_path / "run")}))
    names = [name for name in results["metrics"] if name.endswith("image_to_text@1")]
    assert names
    if kind == "classes":
        assert "eval/validation/zero_shot/acc1" in results["metrics"]
    if kind == "weighted":
        assert len(names) == 3


def test_pairs_with_one_image_are_on_one_side_of_the_hold_out(given, sources):
    plan, *_ = rows_of(of_source(given, sources["shared"], episodes={"size": 16, "batch_size": 8}))
    samples, held_out = plan.samples, plan.held_out[0].splits["validation"].images
    trained = {samples.where(row) for row in range(len(samples))}
    assert len(trained) == len(samples)
    assert trained.isdisjoint({held_out.where(row) for row in range(len(held_out))})


def logged(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text()


def test_without_prototypes_it_is_clip(given, tmp_path, capsys):
    """As by default; notes name what was given without effect, and nothing that was chosen."""
    settings = {**given, "loss": {}}
    align(changed(settings, tmp_path / "run", data={"augmentation": "clip"}))
    assert "prototypical" not in logged(tmp_path / "run")
    assert "train/loss/info_nce" in logged(tmp_path / "run")
    said = capsys.readouterr().err
    for chosen in ("optim.heads_lr_scale", "episodes.warm_up"):
        assert f"{chosen}: no effect" not in said
    assert "data.augmentation: no effect, since align.views is 1" in said


@pytest.mark.parametrize(
    ("loss", "spaces"), [("prototypical", {"image_half", "text_half"}), ("teacher", {"image"})]
)
def test_prototypes_can_be_of_the_halves_or_of_the_projections_alone(loss, spaces, given, tmp_path):
    align(changed(given, tmp_path / "run", loss={loss: 0.0}))
    names = {name for line in logged(tmp_path / "run").splitlines() for name in json.loads(line)}
    begun = "train/loss/prototypical/text_from_"
    assert {name.removeprefix(begun) for name in names if name.startswith(begun)} == spaces


def teacher_file(path: Path) -> str:
    features = np.random.default_rng(0).normal(size=(96, 12)).tolist()
    ids = [f"tiny/{number}" for number in range(96)]
    pq.write_table(pa.table({"sample_id": ids, "features": features}), path)
    return str(path)


def test_a_teacher_from_a_file_takes_the_place_of_the_halves(given, tmp_path):
    file = teacher_file(tmp_path / "teacher.parquet")
    align(changed(given, tmp_path / "run", teacher={"features": file}))
    lines = logged(tmp_path / "run")
    assert "image_from_teacher" in lines
    assert "_half" not in lines


def test_a_teacher_from_a_file_stands_beside_a_half(given, tmp_path):
    file = teacher_file(tmp_path / "teacher.parquet")
    teachers = [
        {"name": "texts", "features": "text-half", "number": 4},
        {"name": "mine", "features": file, "number": 4},
    ]
    settings = {key: value for key, value in given.items() if key != "teacher"}
    align(changed({**settings, "teachers": teachers}, tmp_path / "run"))
    lines = logged(tmp_path / "run")
    assert all(f"image_from_{name}" in lines for name in ("texts", "mine"))
    assert "image_half" not in lines


def test_a_guard_keeps_the_best_and_ends_the_run(given, tmp_path):
    pq.write_table(tiny_pairs(16, seed=7), tmp_path / "other.parquet")
    metric = "eval/other/retrieval/image_to_text@1"
    watched = {"guard": [str(tmp_path / "other.parquet")], "evaluate_every": 1, "patience": 1}
    results = align(
        changed(
            given,
            tmp_path / "run",
            run={**given["run"], **watched, "keep_best": metric, "stop_by": metric},
            episodes={"size": 16, "count": 40},
        )
    )
    assert results["steps"] < 40
    assert results["early_stop"]["metric"] == metric
    assert "best_checkpoint" in results


def test_its_own_recipe_trains_the_same(given, tmp_path):
    align(changed(given, tmp_path / "run"))
    written = tmp_path / "run" / "config.toml"
    cli.main(["align", "--config", str(written), "--run.out", str(tmp_path / "again")])
    one, two = weights_of(tmp_path / "run"), weights_of(tmp_path / "again")
    assert all(value.equal(two[name]) for name, value in one.items())


def test_an_episode_shrinks_to_the_pairs_that_can_be_read(given, tmp_path):
    table = pq.read_table(given["data"]["train"])
    images = table["image"].to_pylist()
    images[3] = b"no image"
    pq.write_table(table.set_column(0, "image", pa.array(images)), tmp_path / "bad.parquet")
    settings = changed(given, tmp_path / "run", data={"train": str(tmp_path / "bad.parquet")})
    settings["episodes"] = {"batch_size": 16, "count": 2}
    assert align(settings)["steps"] == 2 * (80 // 16)
    assert align(settings, resume="auto")["steps"] == 10


def test_a_finished_run_is_not_trained_again(given, tmp_path, monkeypatch):
    settings = changed(given, tmp_path / "run")
    first = align(settings)
    monkeypatch.setattr("protoclip.training.trainer.Trainer.train_step", None)
    assert align(settings, resume="auto")["metrics"] == first["metrics"]


def stop_in_episode(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    train_step, left = Trainer.train_step, [step]

    def stopping(self: Any, *batch: Any, **how: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(signal.SIGTERM)
        return train_step(self, *batch, **how)

    monkeypatch.setattr(Trainer, "train_step", stopping)


def test_changed_captions_are_refused_on_resume(given, tmp_path, monkeypatch):
    file = shutil.copy(given["data"]["train"], tmp_path / "pairs.parquet")
    settings = changed(given, tmp_path / "run", data={"train": str(file)})
    with monkeypatch.context() as patch:
        stop_in_episode(patch, 6)
        assert align(settings)["stopped"] == "SIGTERM"
    table = pq.read_table(file)
    captions = [*table["caption"].to_pylist()]
    captions[5] = ["something else"]
    pq.write_table(table.set_column(1, "caption", pa.array(captions)), file)
    with pytest.raises(ValueError, match=r"not the data .* \(other captions\)"):
        align(settings, resume="auto")
    shutil.copy(given["data"]["train"], file)
    assert align(settings, resume="auto")["steps"] == 12


def test_an_image_that_changed_on_disk_is_encoded_anew(given, sources, tmp_path):
    shutil.copytree(Path(sources["folder"]["train"]), tmp_path / "images")
    settings = of_source(
        given, {"train": str(tmp_path / "images")}, episodes={"size": 16, "batch_size": 8}
    )
    plan, before, _ = rows_of(settings)
    row = next(r for r in range(96) if plan.samples.where(r).endswith("/7.png"))
    shutil.copy(tmp_path / "images" / "8.png", tmp_path / "images" / "7.png")
    _, after, _ = rows_of(settings)
    same = (before.image_rows(np.arange(96)) == after.image_rows(np.arange(96))).all(1)
    assert np.flatnonzero(~same.numpy()).tolist() == [row]


def aligned_by(settings: dict[str, Any], cache: str, resume: str, stop: int) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", cache)
        if stop:
            stop_in_episode(patch, stop)
        return align(settings, resume=resume)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(first, then, given, tmp_path):
    cache = str(tmp_path / "cache")
    align(changed(given, tmp_path / "whole"))
    settings = changed(given, tmp_path / "run")
    run_distributed(aligned_by, first, settings, cache, "never", 7)
    assert not (tmp_path / "run" / "results.json").exists()
    run_distributed(aligned_by, then, settings, cache, "auto", 0)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    for name, value in whole.items():
        # BatchNorm takes this bias out, so it moves by rounding, and the mean with it.
        if not name.endswith(("head.0.bias", "head.1.running_mean")):
            np.testing.assert_allclose(resumed[name], value, atol=2e-4, rtol=2e-3)


@pytest.fixture(scope="module")
def ended(given, sources, tmp_path_factory) -> dict[str, Path]:
    """Finished runs, by their head."""
    folder = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", str(folder / "cache"))
        for head in ("linear", "mlp"):
            data = {**sources["shared"], "workers": 0}
            more = {"align": {"head": head}, "run": {"out": str(folder / head)}}
            align(of_source(given, data, **more))
    return {head: folder / head for head in ("linear", "mlp")}


def tuned(start: Path, data: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    return protoclip.finetune(
        {
            "model": {"start": str(start), **more},
            "data": {**data, "workers": 0},
            "run": {"device": "cpu", "precision": "fp32", "out": str(out)},
            "episodes": {"size": 16, "count": 1, "batch_size": 8},
        }
    )


@pytest.mark.parametrize("more", [{}, {"lora": 2}])
def test_the_towers_move_by_finetune_on_the_same_data(more, ended, sources, tmp_path, capsys):
    """Rows with one image are no other data."""
    results = tuned(ended["mlp"], sources["shared"], tmp_path / "tuned", **more)
    assert results["steps"] == 2
    said = capsys.readouterr().err
    assert "the data of" not in said
    assert "15 of 96 pairs are held out" in said


def test_what_an_mlp_closes_is_said_before_training(given, ended, tmp_path, capsys):
    """And it is true, and nothing else is closed."""
    align(changed(given, tmp_path / "run", align={"head": "mlp"}))
    said = capsys.readouterr().err
    note = "note: model.projection = mlp: its image tower cannot be exported as timm"
    assert said.index(note) < said.index("training on")
    wanted = {"linear": ("open_clip", "timm"), "mlp": ("open_clip", "timm", "onnx")}
    made = {
        head: {*protoclip.export(run, tmp_path / head, formats=wanted[head])["formats"]}
        for head, run in ended.items()
    }
    assert made == {"linear": {"open_clip", "timm"}, "mlp": {"open_clip", "onnx"}}


@pytest.mark.parametrize(
    "line",
    [
        "evaluate {run} --data {pairs}",
        "explore {run} --data {pairs} --static {out}",
        "report {run} --out {out}.html",
        "analyze {run} --data {pairs} --samples 60",
        "embed {run} --data {pairs} --out {out}.parquet",
        "embed-teacher --teacher {run} --data.train {pairs} --out {out}",
    ],
)
def test_commands_take_an_aligned_run(line, given, ended, tmp_path):
    run = shutil.copytree(ended["linear"], tmp_path / "run")
    words = line.format(run=run, pairs=given["data"]["validation"], out=tmp_path / "out").split()
    cli.main(words)
    if "{out}" in line:
        assert list(tmp_path.glob("out*"))


@pytest.mark.parametrize("half", ["image-half", "text-half"])
def test_train_and_finetune_refuse_a_half_as_teacher_before_data_are_opened(half, ended, tmp_path):
    settings: dict[str, Any] = {
        "data": {"train": "missing.tsv"},
        "teacher": {"features": half},
        "run": {"out": str(tmp_path / "run"), "device": "cpu"},
    }
    message = f"teacher.features: {half} is a half of protoclip align; name a file"
    with pytest.raises(ValueError, match=message):
        train(Config.from_dict(settings))
    with pytest.raises(ValueError, match=message):
        protoclip.finetune({**settings, "model": {"start": str(ended["linear"])}})


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.unlink()
    if how != "gone":
        file.write_bytes(content if how == "changed" else content[: len(content) // 2])


@pytest.mark.parametrize("how", ["changed", "gone"])
@pytest.mark.parametrize("name", ["facts.json", "index.npy", "features.npy", "checksums.npy"])
def test_a_damaged_store_names_what_to_delete(name, how, given, tmp_path, store):
    settings = changed(given, tmp_path / "run")
    _, before, _ = rows_of(settings)
    file = min(store.rglob(name))
    damage(file, how)
    with pytest.raises(ValueError, match=r"damaged .* delete .*, and give the command") as said:
        align(settings)
    assert str(file.parent) in str(said.value)
    shutil.rmtree(file.parent)
    _, after, _ = rows_of(settings)
    every = np.arange(96)
    assert after.image_rows(every).equal(before.image_rows(every))
    assert after.mean_text_rows(every).equal(before.mean_text_rows(every))


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, by: Callable[[], None]) -> None:
    """Encode in small parts, and call a function after one of them."""
    write, left = parts.write_atomically, [after]

    def writing(path: Path, *rest: Any, **more: Any) -> None:
        write(path, *rest, **more)
        left[0] -= path.suffix == ".npz"
        if not left[0] and path.suffix == ".npz":
            by()

    monkeypatch.setattr(parts, "write_atomically", writing)
    monkeypatch.setitem(encoding.PART_ROWS, "image", 16)
    monkeypatch.setitem(encoding.PART_ROWS, "text", 16)


def raise_error() -> None:
    raise OSError(28, "No space left on device", "000001.npz")


def test_encoding_goes_on_in_a_table_of_another_name(given, tmp_path, store, monkeypatch):
    """The captions are the same, and the images are the same files."""
    with monkeypatch.context() as patch:
        interrupted(patch, 8, raise_error)  # among the captions
        with pytest.raises(OSError, match="No space left"):
            rows_of(given)
    shutil.copy(given["data"]["train"], tmp_path / "other.parquet")
    monkeypatch.setitem(encoding.PART_ROWS, "text", 16)
    plan, rows, _ = rows_of(changed(given, data={"train": str(tmp_path / "other.parquet")}))
    assert len(plan.samples) == len(rows.images) == 96


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_part_names_what_to_delete(how, given, store, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted(patch, 2, raise_error)
        with pytest.raises(OSError, match="No space left"):
            rows_of(given)
    file = next(store.rglob("000001.npz"))
    damage(file, how)
    monkeypatch.setitem(encoding.PART_ROWS, "image", 16)
    with pytest.raises(ValueError, match=r"000001\.npz: damaged .*; delete .*, and give the comm"):
        rows_of(given)


def test_a_store_that_is_being_added_to_can_be_read(given, sources, store):
    rows_of(given)
    held = [path for path in store.iterdir() if path.is_dir() and path.name != "evaluation"]
    assert len(held) == 2
    with locked(held[0]), locked(held[1]):
        rows_of(given)
        with pytest.raises(ValueError, match=r"another process encodes by this half; wait for it"):
            rows_of(of_source(given, sources["mixture"]))
