"""What a plan decides: by one rule each, said at the start, and of no setting that is given."""

import os
import tomllib
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from numbered import Numbered

import protoclip
from interrupting import with_changes
from protoclip.config import (
    START,
    Config,
    DataConfig,
    EpisodeConfig,
    ImageTowerConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PrototypeConfig,
    RunConfig,
    TeacherConfig,
    flatten,
)
from protoclip.data import sources
from protoclip.data.pairs import ImageTextPairs, fingerprint_sources
from protoclip.data.sources import PairsView
from protoclip.data.split import BEGINNING, count_repeated_images
from protoclip.data.summary import summarize
from protoclip.models.checkpoint import MODEL, WEIGHTS, model_json, write_checkpoint
from protoclip.models.start import Start
from protoclip.rules import check
from protoclip.training import plan
from protoclip.training.folder import (
    inspect_folder,
    keep_begun,
    name_folder,
    read_begun,
    slugify,
    to_toml,
)
from protoclip.training.plan import Plan, make_plan, resolve_settings
from protoclip.training.presets import choose_before_data, fill_episodes, fill_settings, read_given
from testing import build_model, tiny_config, tiny_model, tiny_pairs

RECIPES = Path(__file__).parents[3] / "recipes"

WITHOUT = {
    *("run.keep_best", "run.out", "run.overfit", "run.stop_by", "run.sync", "align.features"),
    *("data.caption_column", "data.class_column", "data.id_column", "data.image_column"),
    *("data.images", "data.texts"),
    *("data.only", "data.root", "data.validation", "data.without", "episodes.micro_batch_size"),
    *("model.image.weights", "model.lora", "model.name", "model.pretrained", "model.start"),
    *("model.text.name", "model.text.pooling"),
    *("model.image.joined_layers", "model.text.joined_layers"),
}
BY_MACHINE_OR_SOURCE = {
    *("run.device", "run.precision", "data.workers", "data.read", "encode.engine"),
}


def decided(config: Config, samples: Numbered | None = None) -> tuple[Config, list[str]]:
    outlined, samples = resolve_settings(config), samples or Numbered(7_077, 10**9)
    looks = {"looks_at_images": True, "compares_images": False}
    summary = summarize(samples, **looks)
    return fill_settings(outlined.config, outlined.start, samples, summary)


@pytest.mark.parametrize(
    ("rows", "captions", "batch", "size", "number"),
    [
        (7_077, 10**9, 256, 4096, 409),
        (8_192, 10**9, 256, 8192, 819),
        (10**6, 10**9, 256, 131_072, 13_107),
        (30_000, 300, 256, 16_384, 300),  # captions repeat
        (5_000, 10**9, 300, 3_900, 390),  # a multiple of the batch
        (100, 10**9, 256, 256, 25),  # at least a batch
        (20, 1, 16, 16, 2),
    ],
)
def test_sizes_follow_from_the_data(rows, captions, batch, size, number):
    given = Config(episodes=EpisodeConfig(batch_size=batch))
    config, _ = decided(given, Numbered(rows, captions))
    assert config.episodes.size == size
    assert config.prototypes.number == config.teacher.number == number


@pytest.mark.parametrize(
    ("rows", "given", "count", "passes"),
    [
        (50, {}, 280, "1,430 passes over the data"),  # 280 steps
        (2_000, {}, 70, "35.8 passes over the data"),
        (2_048, {}, 35, "35 passes over the data"),
        (7_077, {}, 35, "20.3 passes over the data"),
        (200_000, {}, 35, "22.9 passes over the data"),
        (10**6, {}, 153, "20.1 passes over the data"),
        (10**8, {"batch_size": 2**15}, 15_259, "20 passes over the data"),
        (10**8, {}, 195, "0.256 passes over the data, which show at most 23% of the pairs"),
        (10**7, {"size": 2**17, "count": 35, "replacement": False}, 35, "at most 46% of the pairs"),
        (7_077, {"warm_up": 40}, 42, "24.3 passes over the data"),
        (10**8, {"size": 2**27, "batch_size": 2}, 3, "4.03 passes over the data"),
    ],
)
def test_the_length_of_a_run_follows_from_passes_and_steps(rows, given, count, passes):
    """Both within limits; each stage has an episode, and what is given stays."""
    samples, prototypes = Numbered(rows, 10**9), {"number": 9}
    settings = {"episodes": given, "prototypes": prototypes}
    config, _ = fill_episodes(Config.from_dict(settings), rows)
    assert config.episodes.count == count
    whole = Plan(config=config, start=Mock(Start), samples=samples)
    assert whole.amount.endswith(passes)


def test_sources_that_cannot_be_used_are_refused_unless_they_are_few(tmp_path):
    table = pa.table({"image": ["gone.jpg"] * 40, "caption": ["a"] * 40})
    bad = ImageTextPairs(table, name="bad", root=str(tmp_path))
    good = Numbered(4000, 4)
    refused = pytest.raises(ValueError, match=r"^data.train: bad: of 40 pairs that were looked at ")
    for number in (0, 4):
        with refused:
            sources.require_usable(
                DataConfig(), PairsView([(good, range(number)), (bad, range(40))])
            )
    for parts in ([(bad, range(40)), (good, range(4000))], [(good, range(4000)), (bad, range(40))]):
        sources.require_usable(DataConfig(), PairsView(parts))


@pytest.mark.parametrize(
    ("side", "words", "sizes"),
    [
        (64, 5, (40, 16)),
        (79, 5, (40, 16)),
        (80, 5, (64, 16)),
        (500, 20, (64, 32)),
        (20, 99, (40, 64)),
    ],
)
def test_small_towers_suit_the_images_and_captions(side, words, sizes):
    """Photographs of 80 pixels get 64, and captions are hardly ever cut."""
    samples = Numbered(1000, 10**9, words=words, side=side)
    model = decided(Config(), samples)[0].model
    assert (model.image.size, model.text.context_length) == sizes
    given = Config(model=ModelConfig(image=ImageTowerConfig(size=48)))
    model = decided(given, samples)[0].model
    assert (model.image.size, model.text.context_length) == (48, sizes[1])
    other = ModelConfig(name="RN50")
    assert decided(Config(model=other), samples)[0].model == other


def test_the_start_of_a_run_says_how_many_captions_are_cut(tmp_path):
    """Of its training pairs: eight tokens hold five words beside the start and the end."""
    texts = ["a short one", "this has many more words than eight tokens hold"] * 6
    column = pa.array(texts)
    pq.write_table(tiny_pairs(12).set_column(1, "caption", column), tmp_path / "pairs.parquet")
    config = tiny_config(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "run"))
    config = replace(config, data=replace(config.data, validation=0.0))
    said = [note for note in make_plan(config).notes if " cuts " in note]
    assert [note.partition(";")[0] for note in said] == [
        "model.text.context_length = 8 cuts 6 of 12 captions that were looked at"
    ]


def test_a_note_says_how_many_pairs_have_the_image_of_another(tmp_path):
    """Where they are negatives of each other; test_align has what align makes of them.

    Equal are the names of files, and the bytes in a table.
    """
    for number, image in enumerate(tiny_pairs(12)["image"].to_pylist()):
        (tmp_path / f"{number}.png").write_bytes(image)
    lines = [f"{number % 4}.png\tcaption {number}" for number in range(12)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["image\tcaption", *lines]))
    config = tiny_config(str(tmp_path / "pairs.tsv"), out=str(tmp_path / "run"))
    config = replace(config, episodes=replace(config.episodes, size=8, batch_size=8))
    config = replace(config, data=replace(config.data, validation=0.0))
    said = [note for note in make_plan(config).notes if "show the image of" in note]
    assert [note.split(",")[0] for note in said] == [
        "8 of 12 pairs that were looked at show the image of another pair"
    ]
    shared = replace(config, loss=replace(config.loss, positives="shared"))
    assert not [note for note in make_plan(shared).notes if "show the image of" in note]
    image = (tmp_path / "0.png").read_bytes()
    same_start = bytes(BEGINNING)
    images = pa.array([image, same_start, same_start + b"1", None, image], pa.binary())
    table = pa.table({"image": images, "caption": ["a"] * 5})
    assert count_repeated_images(ImageTextPairs(table, name="a"), range(5)) == 1


def test_stages_that_leave_no_episode_for_prototypes_draw_a_note():
    config = Config(episodes=EpisodeConfig(count=2, warm_up=1, locked_image=1))
    (note,) = check(config)
    assert note.startswith("no episode uses prototypes")
    assert check(with_changes(config, {"episodes": {"count": 3}})) == []


def test_what_is_set_stays_and_a_plan_is_its_own_plan():
    teachers = [TeacherConfig(name=n, features=n, number=k) for n, k in (("a", 7), ("b", None))]
    config = Config(
        episodes=EpisodeConfig(size=512), prototypes=PrototypeConfig(number=9), teachers=teachers
    )
    whole = decided(config)[0]
    assert (whole.episodes.size, whole.prototypes.number) == (512, 9)
    assert [teacher.number for teacher in whole.teachers] == [7, 51]
    assert decided(whole) == (whole, [])
    assert not [name for name, value in asdict(whole.optim).items() if value is None]


def named(name: str | None, *, batch: int = 512, steps: int = 1000, **optim: object) -> Config:
    """A run of two episodes with this many steps together."""
    return Config(
        model=ModelConfig(name=name),
        episodes=EpisodeConfig(size=steps // 2 * batch, count=2, batch_size=batch),
        optim=OptimConfig(**optim),
    )


def test_small_towers_get_what_suits_the_emoji():
    """The values that the bundled recipes were measured with, at any batch."""
    expected = {"learning_rate": 2e-3, "warm_up_steps": 50, "locked_learning_rate": 2e-4}
    expected |= {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2, "heads_weight_decay": 0.2}
    expected |= {"heads_lr_scale": 0.01}
    for batch in (64, 4096):
        config, _ = decided(named(None, batch=batch))
        assert config.optim == OptimConfig(**expected)
        assert config.data.augmentation == "light"
    assert decided(named(None, weight_decay=0.1))[0].optim.heads_weight_decay == 0.1
    larger = replace(named(None), model=ModelConfig(image=ImageTowerConfig(size=64)))
    config, _ = decided(larger)
    assert (config.optim.learning_rate, config.optim.locked_learning_rate) == (1e-3, 1e-4)
    assert config.data.augmentation == "clip"
    given = replace(larger, data=replace(larger.data, augmentation="light"))
    assert decided(given)[0].data.augmentation == "light"
    assert decided(replace(larger, run=RunConfig(overfit=8)))[0].data.augmentation == "light"
    assert decided(named("RN50"))[0].data.augmentation == "light"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["EVA02-B-16", "swin_base_patch4_window7_224"], ((0.9, 0.98), 1e-6, 0.2)),
        (["RN50", "convnext_base"], ((0.9, 0.999), 1e-8, 0.1)),
    ],
)
def test_a_named_model_gets_the_usual_values(names, expected):
    """They depend on the kind of image tower, as docs/training.md says."""
    for name in names:
        optim = decided(named(name))[0].optim
        assert (optim.betas, optim.eps, optim.weight_decay) == expected
        assert optim.heads_weight_decay == 0


def test_heads_of_a_named_model_learn_as_fast_as_the_paper_has_it_with_extraction():
    """And as the recipes have it. A queue needs slow heads."""
    queue = PrototypeConfig(source="queue")
    for changes, scale in (
        ({}, 1.0),
        ({"prototypes": queue}, 0.01),
        ({"teacher": TeacherConfig(features="emoji")}, 0.01),
        ({"optim": OptimConfig(heads_lr_scale=0.3), "prototypes": queue}, 0.3),
    ):
        assert decided(replace(named("RN50"), **changes))[0].optim.heads_lr_scale == scale
    checked = 0
    for recipe in RECIPES.glob("*.toml"):
        config = Config.from_dict(tomllib.loads(recipe.read_text(encoding="utf-8")))
        if scale := config.optim.heads_lr_scale:
            unset = replace(config, optim=replace(config.optim, heads_lr_scale=None))
            assert decided(unset)[0].optim.heads_lr_scale == scale, recipe
            checked += 1
    assert checked == 6


@pytest.mark.parametrize(
    ("batch", "steps", "rate", "warm_up"),
    [
        (64, 100_000, 6.25e-5, 7812),  # 500,000 samples
        (1000, 100_000, 5e-4, 2000),  # 2%
        (1000, 1000, 5e-4, 100),  # a tenth of a short run
        (1000, 4, 5e-4, 1),
    ],
)
def test_the_rate_grows_with_the_batch_and_the_warm_up_with_the_run(batch, steps, rate, warm_up):
    optim = decided(named("ViT-B-32", batch=batch, steps=steps))[0].optim
    assert optim.learning_rate == pytest.approx(rate)
    assert optim.locked_learning_rate == pytest.approx(rate / 10)
    assert optim.warm_up_steps == warm_up


def test_a_rate_that_is_set_counts():
    """Zeros count as set."""
    given = {"learning_rate": 2e-3, "warm_up_steps": 0, "locked_learning_rate": 0.0}
    given |= {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.0, "heads_weight_decay": 0.3}
    given |= {"heads_lr_scale": 0.2}
    for name in (None, "ViT-B-32", "RN50"):
        assert decided(named(name, **given))[0].optim == OptimConfig(**given)
    config, _ = decided(named("ViT-B-32", learning_rate=1e-4))
    assert config.optim.locked_learning_rate == pytest.approx(1e-5)


def test_a_run_that_goes_on_has_the_plan_that_it_began_with(tmp_path: Path, capsys):
    """Also where its data have gone; and it says what it decided as it starts."""
    config = tiny_config(out=str(tmp_path / "run"))
    config = replace(
        config,
        run=replace(config.run, evaluate=False),
        episodes=EpisodeConfig(batch_size=16, warm_up=1, locked_image=1),
        prototypes=PrototypeConfig(),
    )
    small = replace(config, episodes=replace(config.episodes, size=32, count=2))
    protoclip.train(small)
    assert "note: prototypes.number = 8, a tenth of an episode" in capsys.readouterr().err
    gone = replace(config, data=replace(config.data, train="no such file"))
    again = keep_begun(resolve_settings(gone).config, read_begun(tmp_path / "run"))
    data = replace(again.data, train=config.data.train)
    assert replace(again, data=data) == make_plan(small).config


@pytest.fixture(scope="module")
def distilling() -> Plan:
    """Of a run whose settings leave all open that they can, with a teacher to be distilled."""
    teacher = TeacherConfig(features="emoji")
    return make_plan(Config(teacher=teacher))


def test_a_plan_leaves_open_what_it_names_and_nothing_else(distilling: Plan):
    settings = flatten(asdict(distilling.config))
    assert {name for name, value in settings.items() if value is None} == WITHOUT
    assert {n for n, value in settings.items() if value == "auto"} == BY_MACHINE_OR_SOURCE
    config = distilling.config
    assert config.prototypes.source == "queue"
    assert (config.teacher.distil, config.teacher.tower) == (1.0, "text")
    assert make_plan(config).config == config


@pytest.mark.parametrize(
    ("changes", "distil"),
    [
        ({}, 1.0),
        ({"teacher": {"distil": 0.5}}, 0.5),
        ({"teacher": {"distil": 0.0}}, 0.0),
        ({"loss": {"teacher": 0.0}}, 0.0),
        ({"teacher": {"features": None}}, 0.0),
    ],
)
def test_a_teacher_that_groups_is_learned_from_too(changes, distil):
    """Unless that is set, or there is no such teacher; and a recipe of what came out is silent."""
    tree = {"teacher": {"features": "emoji"}, "run": {"evaluate": False}}
    made = make_plan(
        Config.from_dict({k: {**tree.get(k, {}), **changes.get(k, {})} for k in {*tree, *changes}})
    )
    assert made.config.teacher.distil == distil
    again = make_plan(made.config)
    assert again.config == made.config
    assert not [note for note in again.notes if "distil" in note]


@pytest.mark.parametrize("several", [False, True])
def test_other_commands_learn_from_groups_alone(several):
    teacher = TeacherConfig(features="emoji")
    given = Config(teachers=[teacher]) if several else Config(teacher=teacher)
    choices = choose_before_data("finetune", {"model": {"start": "open_clip:RN50"}})
    config = resolve_settings(given, choices).config
    assert not config.distilled_teachers
    (taught,) = config.external_teachers.values()
    assert taught.distil == 0


def test_who_cannot_learn_from_a_teacher_has_its_groups(tmp_path: Path):
    """A file that does not say what it was made of, the start, and a tower that is locked."""
    table = tiny_pairs(48)
    pq.write_table(table, tmp_path / "pairs.parquet")
    features = pa.array(list(np.eye(48, 8, dtype=np.float32)))
    own = {"sample_id": table["sample_id"], "features": features}
    pq.write_table(pa.table(own), tmp_path / "own.parquet")
    weights = build_model(tiny_model(), seed=1).state_dict()
    description = model_json(tiny_model(), None)
    write_checkpoint(tmp_path / "start", {WEIGHTS: weights}, {MODEL: description})
    config = tiny_config(str(tmp_path / "pairs.parquet"), out=str(tmp_path / "run"))
    file = str(tmp_path / "own.parquet")
    start = ModelConfig(start=str(tmp_path / "start"))
    for teacher, model in (
        (TeacherConfig(name="own", features=file, number=4), config.model),
        (TeacherConfig(features=START, number=4), start),
        (TeacherConfig(features=file, number=4, tower="text"), replace(start, locked=["text"])),
    ):
        made = make_plan(replace(config, model=model, teachers=[teacher]))
        assert made.config.teachers[0].distil == 0


def test_hosts_with_other_features_of_a_teacher_are_refused(distilling: Plan, monkeypatch):
    """They would train on them, and say nothing."""

    def gathered(mine: Any) -> list[Any]:
        _, pairs, teachers = mine
        others = {name: {**facts, "features": "others"} for name, facts in teachers.items()}
        return [("first", pairs, others), mine]

    monkeypatch.setattr(plan, "all_gather_object", gathered)
    monkeypatch.setattr(plan, "world_size", lambda: 2)
    monkeypatch.setattr(plan, "rank", lambda: 1)
    with pytest.raises(ValueError, match=r"^teacher\.features: \S+ sees other files than first"):
        make_plan(distilling.config)


def test_a_run_goes_on_with_the_defaults_of_its_version(distilling: Plan, tmp_path: Path):
    """Groups alone, at four times the weight; other weights that somebody gave are refused."""
    weights = {"prototypical": 1.0, "teacher": 2.0}
    teacher = replace(distilling.config.teacher, distil=0.0, tower=None)
    whole = replace(
        distilling.config,
        run=RunConfig(out=str(tmp_path)),
        loss=replace(distilling.config.loss, **weights),
        teachers=[teacher],
        teacher=TeacherConfig(),
    )
    given = replace(whole, loss=LossConfig(), teachers=[replace(teacher, distil=None)])
    begun = to_toml(whole)
    without = "\n".join(line for line in begun.splitlines() if not line.startswith("distil "))
    for text in (begun, without):
        (tmp_path / "config.toml").write_text(text)
        outlined, _ = inspect_folder(resolve_settings(given), resume=True)
        goes_on, loss = outlined.config, outlined.config.loss
        kept = "loss.prototypical stays 1.0, loss.teacher stays 2.0"
        assert f"{kept}, the default when the run began" in outlined.notes
        assert {name: getattr(loss, name) for name in weights} == weights
        assert not goes_on.distilled_teachers
        assert not make_plan(goes_on).config.distilled_teachers
    (tmp_path / "config.toml").write_text(begun.replace("teacher = 2.0", "teacher = 3.0"))
    with pytest.raises(ValueError, match=r"loss\.teacher \(3\.0 before, 0\.5 now\)"):
        inspect_folder(resolve_settings(given), resume=True)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("ProtoCLIP + teacher", "protoclip-teacher"),
        ("my_run.2", "my_run.2"),
        ("図像 2", "図像-2"),
        ("U\u0308ber", "über"),
        ("/../", ".."),
        ("", "run"),
    ],
)
def test_a_name_is_a_folder_in_any_script(name, folder):
    assert slugify(name) == folder


def test_a_table_that_is_known_is_opened_without_a_look_at_each_row(tmp_path, monkeypatch):
    """Neither at its captions, nor at its image files."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    rows, (image,) = 1_500, tiny_pairs(1)["image"].to_pylist()
    lines = [f"{row}.png\tcaption {row}" for row in range(rows)]
    for row in range(rows):
        (tmp_path / f"{row}.png").write_bytes(image + b"%d" % row)
    (tmp_path / "pairs.tsv").write_text("\n".join(["image\tcaption", *lines]))
    config = tiny_config(str(tmp_path / "pairs.tsv"), out=str(tmp_path / "run"))
    config = replace(config, episodes=replace(config.episodes, size=1024))
    counts, stat, captions = Counter[str](), os.stat, ImageTextPairs.sample_captions

    def count_stat(path: Any, *more: Any, **options: Any) -> os.stat_result:
        counts["stat"] += ".png" in str(path)
        return stat(path, *more, **options)

    def count_captions(pairs: ImageTextPairs, row: int) -> tuple[str, ...]:
        counts["captions"] += 1
        return captions(pairs, row)

    monkeypatch.setattr(PairsView, "key", "")  # jaxtyping asks for it, in tests alone
    monkeypatch.setattr(os, "stat", count_stat)
    monkeypatch.setattr(ImageTextPairs, "sample_captions", count_captions)

    def opened(**changes: Any) -> tuple[Plan, Counter[str]]:
        counts.clear()
        plan = make_plan(replace(config, **changes))
        fingerprint_sources(plan.samples)
        return plan, Counter(counts)

    first, cold = opened()
    assert cold["stat"] >= rows  # images of equal size are compared with the held-out ones
    second, warm = opened()
    assert second.config == first.config
    assert max(warm.values()) <= 500
    # Captions are counted for prototypes whose number nobody set, up to that number.
    assert opened(prototypes=PrototypeConfig())[1]["captions"] - warm["captions"] == 102
    clip = {"prototypes": PrototypeConfig(), "loss": LossConfig(prototypical=0.0)}
    assert opened(**clip)[1] == warm


def test_published_weights_are_looked_for_before_data_are_read(tmp_path, monkeypatch):
    """Without a network those that were downloaded before do."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(plan.sources, "open_samples", Mock(side_effect=ValueError("data are read")))
    image = ImageTowerConfig(name="test_vit", weights="published")
    config = Config(model=ModelConfig(image=image))
    with pytest.raises(ValueError, match="published weights of test_vit: the hub does not answer"):
        make_plan(config)
    outline = resolve_settings(config)
    of_run = replace(outline.start, model=replace(outline.start.model, start="runs/aligned"))
    with pytest.raises(ValueError, match="data are read"):  # a run has its own
        make_plan(replace(outline, start=of_run))
    (tmp_path / "models--timm--test_vit.r160_in1k").mkdir()
    with pytest.raises(ValueError, match="data are read"):
        make_plan(config)


def test_few_pairs_are_not_evaluated(capsys):
    config = Config(run=RunConfig(overfit=8), data=DataConfig(train="a.tsv", validation=0.1))
    assert str(name_folder(config)) == "runs/protoclip-overfit-0"  # the real one stays free
    assert read_given("train", config)["data"]["validation"] == 0
    assert "data.validation: no effect, since run.overfit" in capsys.readouterr().err
