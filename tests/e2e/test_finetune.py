"""Fine-tuning: guard, early stop, WiSE-FT, and what the run's model is then."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import protoclip
from interrupting import read_metrics, stop_after, train_until, untimed_metrics, with_changes
from protoclip.cli import COMMANDS, main
from protoclip.cli.spec import parse
from protoclip.config import Config
from protoclip.evaluation import datasets
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.metrics import SampleResults, compute_influences, difference, mark_clear
from protoclip.evaluation.paired import read_results
from protoclip.models import checkpoint as saved
from protoclip.models.checkpoint import find_checkpoint, read_tensors
from protoclip.training import evaluate
from protoclip.training.evaluate import ALPHAS, RunEvaluator, interpolate
from protoclip.training.run import finetune, train
from testing import build_model, noisy_pairs, run_distributed, tiny_config

GUARD = "eval/general/zero_shot/acc1"
FEW = (0.0, 0.5, 1.0)
CONSTANT = "eval/general/zero_shot/acc5"  # 1 of five classes, so it never improves


def write_pairs(path: Path, number: int, *, seed: int, more: str = "") -> None:
    """Pairs of three classes, except two of them, with which there are five."""
    table = noisy_pairs(number, seed=seed, more=more)
    kinds = ["pink", "lime", *table["kind"].to_pylist()[2:]]
    pq.write_table(table.set_column(2, "kind", pa.array(kinds)), path)


@pytest.fixture(autouse=True, scope="module")
def few_alphas() -> Iterator[None]:
    """Each sweep is over three models, unless a test asks for `ALPHAS`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "ALPHAS", FEW)
        yield


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs to train on, a guard with classes, and a run to start from."""
    folder = tmp_path_factory.mktemp("finetune")
    write_pairs(folder / "own.parquet", 80, seed=0)
    write_pairs(folder / "general.parquet", 24, seed=1)
    write_pairs(folder / "before.parquet", 80, seed=2, more=" before")
    short = {
        "run": {"evaluate": False},
        "data": {"validation": 0.0},
        "episodes": {"count": 1, "size": 32, "warm_up": 0, "locked_image": 0},
    }
    train(with_changes(tiny_config(f"{folder}/before.parquet", out=f"{folder}/start"), short))
    return folder


def settings(top: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Two episodes of two steps, at a rate that changes the model."""
    tree: dict[str, dict[str, Any]] = {
        "run": {
            **{"out": str(out), "device": "cpu", "precision": "fp32"},
            "guard": [f"{top}/general.parquet,class_column=kind"],
        },
        "data": {"train": f"{top}/own.parquet", "validation": 0.2},
        "model": {"start": f"{top}/start"},
        "episodes": {"size": 32, "batch_size": 16, "count": 2},
        "optim": {"learning_rate": 1e-2},
    }
    return {name: {**tree.get(name, {}), **sections.get(name, {})} for name in tree | sections}


def words(top: Path, out: Path) -> list[str]:
    """The same on the command line."""
    given = f"""finetune {top}/start --guard {top}/general.parquet,class_column=kind --run.out {out}
        --run.device cpu --run.precision fp32 --data.train {top}/own.parquet --data.validation 0.2
        --episodes.size 32 --episodes.batch_size 16 --episodes.count 2
        --optim.learning_rate 1e-2"""
    return given.split()


@pytest.fixture(scope="module")
def finished(top: Path) -> Path:
    """A run of the command; beside it what it said, and its cache."""
    files = ((top / name).open("w") for name in ("said.out", "said.err"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", str(top / "cache"))
        with next(files) as out, next(files) as err, redirect_stdout(out), redirect_stderr(err):
            main(words(top, top / "finished"))
    return top / "finished"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(find_checkpoint(folder) / saved.WEIGHTS)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_from_the_command_line(top, finished, copied, capsys):
    """The sweep, its table and files; and another alpha on the finished run."""
    printed, said = ((top / name).read_text() for name in ("said.out", "said.err"))
    assert " settings are chosen for fine-tuning; config.toml of the run lists them\n" in said
    settings = (finished / "config.toml").read_text()
    assert "layer_decay = 0.7" in settings
    assert 'features = "start"' in settings
    data = "validation (16 images), general (24 images)"
    assert f"note: evaluating 3 weights between start and end, each on {data}\n" in said
    record, results = read(finished / "wise_ft.json"), read(finished / "results.json")
    assert [point["alpha"] for point in record["points"]] == [*FEW]
    assert list(record["points"][0]["scores"]) == ["validation", "general"]
    best = max(record["points"], key=lambda point: (point["mean"], -point["alpha"]))["alpha"]
    assert record["alpha"] == record["best_alpha"] == results["alpha"] == best
    assert f"{best:g}*" in printed
    assert "* chosen; " in printed
    assert record["rule"] in printed
    assert f"written to {finished}" in printed
    assert results["start_metrics"].keys() == results["metrics"].keys() >= {GUARD}
    assert results["differences"].keys() == results["metrics"].keys()
    expected = {}
    for name, value in results["metrics"].items():
        _, data, task = name.split("/", 2)
        start, chosen = (
            compute_influences(SampleResults.read(file))[0]
            for folder in (finished / "start", finished)
            for file in (folder / "results").glob(f"{data}-*.parquet")
        )
        both = chosen[task] - start[task] if task in chosen else None
        expected[name] = difference([value - results["start_metrics"][name]], both)
    mark_clear(expected.values())
    tested = {name: entry["p"] for name, entry in expected.items()}
    expected = {
        name: {k: v for k, v in entry.items() if k != "p"} for name, entry in expected.items()
    }
    assert results["differences"] == expected
    name = min(filter(tested.get, tested), key=tested.get)
    gain, (low, high), beyond = (expected[name][key] for key in ("mean", "interval", "beyond"))
    row = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
    among = f"  among {results['candidates'][name.partition('@')[0]]}"
    assert row.endswith(f"  {gain:+.4f} [{low:+.4f}, {high:+.4f}]" + "*" * beyond + among)
    assert "\nin brackets: the 95% interval over test samples" in printed

    out, before = copied, (copied / "wise_ft.json").stat().st_mtime_ns
    main([*words(top, out), "--resume", "auto"])  # nothing is left to do
    assert (out / "wise_ft.json").stat().st_mtime_ns == before
    capsys.readouterr()
    main([*words(top, out), "--resume", "auto", "--alpha", "0.25", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["alpha"], shown["best_alpha"]) == (0.25, best)
    assert [point["alpha"] for point in shown["wise_ft"]["points"]] == [0, 0.25, 0.5, 1]
    assert [p for p in shown["wise_ft"]["points"] if p["alpha"] != 0.25] == record["points"]
    start, end = weights(top / "start"), weights(out / "checkpoints" / "step-000000004")
    expected = interpolate(start, end, 0.25)
    assert all(torch.equal(weights(out)[name], value) for name, value in expected.items())
    assert read(out / "model.json")["alpha"] == read(out / "results.json")["alpha"] == 0.25
    assert untimed_metrics(out) == untimed_metrics(finished)


def test_the_sweep_measures_the_models_between_the_ends(top, finished):
    """Its ends are the start and the last evaluation of training, and the results those of the
    chosen weights, as `protoclip.evaluate` measures them."""
    points = {
        point["alpha"]: point["metrics"] for point in read(finished / "wise_ft.json")["points"]
    }
    evaluated = read_metrics(finished, GUARD)
    assert [line["step"] for line in evaluated] == [0, 2, 4]
    for line, alpha in ((evaluated[0], 0.0), (evaluated[-1], 1.0)):
        assert {name: line[name] for name in points[alpha]} == points[alpha]
    results = read(finished / "results.json")
    model, transform, tokenizer = protoclip.load(finished)
    data = datasets.open_data(f"{top}/general.parquet,class_column=kind")
    (zero_shot,) = protoclip.evaluate(model, transform, tokenizer, data, ["zero_shot"])
    assert zero_shot["metrics"]["acc1"] == results["metrics"][GUARD]
    assert results["start_metrics"][GUARD] == points[0.0][GUARD]


def test_every_command_takes_the_chosen_weights(top, copied, tmp_path, capsys):
    """`load`, `evaluate`, `export`, a run that starts from it; `analyze` reads the checkpoints.
    Prototypes go out with the end of training alone."""
    finetune(settings(top, copied), alpha=0.5, resume="auto")
    chosen = weights(copied)
    assert not torch.equal(
        chosen["towers.logit_scale"],
        weights(copied / "checkpoints" / "step-000000004")["towers.logit_scale"],
    )
    loaded = protoclip.load(copied)[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in chosen.items())
    exported = tmp_path / "exported"
    facts = protoclip.export(copied, exported, ["open_clip"])
    end = copied / "checkpoints" / "step-000000004"
    assert facts["prototypes"].endswith(f"this is alpha 0.5; export {end}")
    card = (exported / "README.md").read_text()
    assert f"`{GUARD}`" in card  # the metrics of the run are those of this model
    scale = protoclip.load(exported)[0].state_dict()["towers.logit_scale"]
    assert torch.equal(scale, chosen["towers.logit_scale"])
    config = tiny_config(f"{top}/own.parquet", out=str(tmp_path / "next"))
    config = with_changes(config, {"model": {"start": str(copied)}})
    first = build_model(config.model, seed=0).state_dict()
    assert all(torch.equal(first[name], value) for name, value in chosen.items())
    capsys.readouterr()
    words = f"{copied} --data {top}/own.parquet --tasks retrieval --no-cache --json"
    main(["evaluate", *words.split(), "--precision", "fp32"])
    (record,) = json.loads(capsys.readouterr().out)
    expected = protoclip.evaluate(*protoclip.load(copied), f"{top}/own.parquet", ["retrieval"])
    assert record["metrics"] == expected[0]["metrics"]
    main(["analyze", str(copied), "--json"])
    (analysis,) = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in analysis["checkpoints"]] == [4]
    main(["compare", str(copied), str(copied), "--json"])
    (entry,) = json.loads(capsys.readouterr().out)
    assert GUARD in entry["metrics"]
    assert "general" in read_results(copied).samples
    finetune(settings(top, copied), alpha=1.0, resume="auto")
    assert protoclip.export(copied, tmp_path / "end", ["open_clip"])["prototypes"] is None
    assert (tmp_path / "end" / "prototypes.safetensors").is_file()


def test_lora_moves_along_the_line_of_its_merged_weights(top, tmp_path):
    """The run's model is a plain one, between the start and the merged end; so is its export."""
    given = settings(top, tmp_path / "run", model={"lora": 2}, run={"guard": []})
    finetune(given, alpha=0.5)
    start, end = weights(top / "start"), weights(tmp_path / "run/checkpoints/step-000000004")
    expected, found = interpolate(start, end, 0.5), weights(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    loaded = protoclip.load(tmp_path / "run")[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in found.items())
    moved = [name for name in found if not torch.equal(found[name], start[name])]
    assert any("towers.visual" in name for name in moved)
    protoclip.export(tmp_path / "run", tmp_path / "exported", ["open_clip"])
    exported = protoclip.load(tmp_path / "exported")[0].state_dict()
    assert exported.keys() == {name for name in found if name.startswith("towers.")}
    assert all(torch.equal(found[name], value) for name, value in exported.items())


def interrupt_sweep(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> None:
    """Do something when the sweep evaluates its second alpha."""
    evaluate_once, calls = RunEvaluator.evaluate, []

    def and_work(evaluator: RunEvaluator, *given: Any, **more: Any) -> dict[str, float]:
        if more.get("quick"):
            calls.append(evaluator)
            if len(calls) == 2:
                work()
        return evaluate_once(evaluator, *given, **more)

    monkeypatch.setattr(RunEvaluator, "evaluate", and_work)


def test_an_interrupted_run_goes_on_by_its_own_settings(
    top, finished, tmp_path, capsys, monkeypatch
):
    """A call of the function, stopped in training, and the command, stopped in the sweep, of which
    nothing is left: it ends as the command that was not interrupted. The exit code is that of the
    signal, so that `finetune && export` goes no further. Its cache is its own: in a shared one are
    features of the start that another test encoded, in batches of another size."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    again = ["finetune", str(out), "--resume", "auto"]
    asked = ["--alpha", "0.3"]
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert finetune(settings(top, out))["stopped"] == "SIGTERM"
    with monkeypatch.context() as patch:
        interrupt_sweep(patch, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            main([*again, *asked])
    assert ended.value.code == 128 + signal.SIGTERM
    assert "the same command with --resume auto goes on" in capsys.readouterr().err
    left = {path.name for path in out.iterdir()}
    assert not left & {"wise_ft.json", "model.json", "results.json"}
    assert find_checkpoint(out).name == "step-000000004"
    main(again)
    assert read(out / "wise_ft.json") == read(finished / "wise_ft.json")
    assert read(out / "results.json")["metrics"] == read(finished / "results.json")["metrics"]
    assert untimed_metrics(out) == untimed_metrics(finished)
    assert all(torch.equal(weights(out)[name], w) for name, w in weights(finished).items())


def guarded(top: Path, out: Path) -> Config:
    """A run of four episodes by a metric that does not improve."""
    sections = {
        "run": {
            **{"guard": [f"{top}/general.parquet,class_column=kind"], "evaluate_every": 1},
            **{"stop_by": CONSTANT, "keep_best": CONSTANT},
        },
        "data": {"validation": 0.2},
        "episodes": {"size": 32},
    }
    return with_changes(tiny_config(f"{top}/own.parquet", out=str(out)), sections)


@pytest.fixture(scope="module")
def stopped_early(top: Path) -> Path:
    train(guarded(top, top / "early"))
    return top / "early"


def test_a_run_stops_early_by_its_guard(stopped_early):
    """It ends as a finished one: three evaluations after that of the start, with results."""
    results = read(stopped_early / "results.json")
    evaluated = read_metrics(stopped_early, GUARD)
    assert [line["step"] for line in evaluated] == [0, 2, 4, 6]
    assert results["steps"] == 6
    assert results["early_stop"]["reason"] == (
        f"stopped early after step 6: no better {CONSTANT} in 3 evaluations; its best value is "
        "1.0000, of step 0"
    )
    assert results["metrics"][GUARD] == evaluated[-1][GUARD]
    assert results["best_checkpoint"] == "checkpoints/step-000000002"
    assert read_results(stopped_early).metrics[GUARD] == evaluated[-1][GUARD]
    assert "eval/general/linear_probe/acc1" not in evaluated[0]


def test_what_chooses_is_not_what_is_reported(top, tmp_path, monkeypatch):
    """A guard with a validation split is evaluated on that one until the results are written."""
    monkeypatch.setattr(evaluate, "ALPHAS", ALPHAS)
    folder = tmp_path / "guard"
    for split in ("validation", "test"):
        for number, colour in enumerate(("red", "green")):
            (folder / split / colour).mkdir(parents=True)
            Image.new("RGB", (32, 32), colour).save(folder / split / colour / f"{number}.png")
    measured = []

    def evaluate_run(*_: Any, data: EvaluationData, split: str, **__: Any) -> dict[str, float]:
        measured.append((data.name, split))
        return {f"eval/{data.name}/zero_shot/acc1": 0.5}

    monkeypatch.setattr("protoclip.training.evaluate.evaluate_run", evaluate_run)
    finetune(settings(top, tmp_path / "run", run={"guard": [str(folder)]}))
    splits = [split for name, split in measured if name == "guard"]
    assert (
        splits == ["validation"] * (3 + len(ALPHAS)) + ["test"] * 2
    )  # the start's and the chosen one's


def test_early_stopping_is_exact_after_an_interruption(top, stopped_early, tmp_path):
    config = guarded(top, tmp_path / "run")
    assert train_until(3, config)["stopped"] == "SIGTERM"
    results = train(config, resume="auto")
    assert results["early_stop"] == read(stopped_early / "results.json")["early_stop"]
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(stopped_early)
    assert train(config, resume="auto") == results


def on_a_rank(given: dict[str, Any], alpha: float | None) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "ALPHAS", FEW)
        patch.setattr(evaluate, "PATIENCE", 1)
        results = finetune(given, alpha=alpha, resume="auto")
    return {name: value for name, value in results.items() if name != "train_seconds"}


@pytest.mark.slow
def test_ranks_sweep_one_model(top, tmp_path):
    """A sharded one. All ranks return one result, whose weights lie between start and end; and
    another alpha."""
    given = settings(top, tmp_path / "run", parallel={"strategy": "fsdp"})
    given["run"] |= {"stop_by": CONSTANT}
    one, other = run_distributed(on_a_rank, 2, given, None)
    assert one == other
    assert (one["steps"], one["early_stop"]["best_step"]) == (2, 0)
    assert one["alpha"] == one["best_alpha"]
    one, other = run_distributed(on_a_rank, 2, given, 0.5)
    assert one == other
    start, end = weights(top / "start"), weights(sorted(tmp_path.glob("run/checkpoints/*"))[-1])
    expected = interpolate(start, end, 0.5)
    assert all(torch.equal(weights(tmp_path / "run")[name], w) for name, w in expected.items())


def test_a_run_goes_on_by_its_own_settings(top, copied, capsys):
    """Nothing is said again; but a run with data beside it is a start."""
    main(["finetune", str(copied), "--resume", "auto", "--alpha", "0.3"])
    printed = capsys.readouterr()
    assert f"note: going on with {copied} by its own settings" in printed.err
    best = read(copied / "wise_ft.json")["best_alpha"]
    assert best != 0.3
    assert f"* chosen by --alpha; the rule's best is {best:g}; " in printed.out
    assert read(copied / "model.json")["alpha"] == 0.3
    assert read(copied / "results.json")["folder"] == str(copied)
    for start in (copied, top / "start"):
        data = [] if start == top / "start" else ["--data.train", "emoji"]
        given = parse(COMMANDS["finetune"], [str(start), "--resume", "auto", *data]).settings()
        assert given["model"] == {"start": str(start)}
