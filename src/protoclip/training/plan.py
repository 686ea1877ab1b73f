"""The plan of a run: all that is decided before it starts, each thing once.

It reads the start, opens data and teachers, holds out the validation set, and fills all settings
that are unset, so later code may assume that every setting is filled. Open stay what a run goes
without (`model.lora`, `run.stop_by`), what the machine decides (`run.device`, `run.precision`,
`data.workers`), how sources are read, and `data.validation`: pairs that are asked for have to be
held out, and without being asked a run goes on without any if they are few.
"""

import difflib
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclip.config import (
    SEVERAL,
    START,
    AlignConfig,
    Config,
    DataConfig,
    ModelConfig,
    TeacherConfig,
)
from protoclip.data import sources
from protoclip.data.access import digest
from protoclip.data.bands import measure_ranges
from protoclip.data.captions import BETWEEN_SENTENCES, ONE, CaptionDraw, caption_draw
from protoclip.data.decode import decode
from protoclip.data.loader import read_image
from protoclip.data.pairs import (
    BadSample,
    Facts,
    Pairs,
    SampleStream,
    evenly_spaced,
    fingerprint_sources,
)
from protoclip.data.shards import facts_that_may_move, shard_stem
from protoclip.data.sources import PairsView, drop_rows
from protoclip.data.split import SHARE, choose_share
from protoclip.data.summary import count_tokens, read_some, summarize
from protoclip.distributed import collectives
from protoclip.distributed.collectives import (
    all_gather_object,
    raise_on_all_ranks,
    rank,
    rank0_first,
    world_size,
)
from protoclip.encode.encoder import image_side
from protoclip.encode.features import Encoder
from protoclip.encode.linear_maps import canonical_projections, fit_joint_space
from protoclip.encode.rows import PairRows, encode_sides, features_folder, open_side
from protoclip.encode.run import images_at_once
from protoclip.encode.stream import encode_stream
from protoclip.encode.teachers import TeacherFeatures, embed_teachers, note_unknown, open_teachers
from protoclip.encode.unpaired import fit_with_unpaired
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.metrics import is_share
from protoclip.evaluation.suite import list_metrics
from protoclip.evaluation.validation import note_trained_guards, open_guards, split_validation
from protoclip.files import checksum, to_json
from protoclip.models import loading
from protoclip.models.joined import AUTO, PLAIN, JoinedTower, name_layers, read_columns
from protoclip.models.projections import FrozenEncoders, Projection, start_projections
from protoclip.models.protoclip import (
    ProtoCLIP,
    TowerPair,
    autocast,
    evaluation_transform,
    resolve_encoding,
)
from protoclip.models.start import Start, resolve_start, set_layers, split_tower
from protoclip.models.timm import PUBLISHED, require_published
from protoclip.progress import three_digits
from protoclip.rules import check, require_paths
from protoclip.terminal import counted
from protoclip.training.presets import Choices, Command, choose_with_data, fill, fill_settings

FEWEST_TO_CHOOSE = 100  # pairs by which layers are chosen; with fewer the last is taken
FEWEST_TO_ALIGN, MOST_TO_ALIGN = 100, 2**16  # pairs by which two teachers are aligned
NEARLY_ALL = 0.95  # share of the pairs that a run sees, below which it is said
MOST_BAD = 0.8  # share of bad samples; who allows more may have no good one among some
SEEN = 64  # pairs whose ids tell whether all hosts see the same ones
SHARED = 0.01  # share of the pairs that have the image of another, from which on it is said


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What is decided before the data are opened."""

    config: Config  # the settings, which follow their start
    start: Start  # what the model starts from
    command: Command = "train"  # the command that trains
    # Those of `align` and of `finetune`; `train` leaves nothing to choose.
    choices: Choices | None = None
    notes: Sequence[str] = ()  # what the user should know of this
    # Notes on settings without effect, where a command chooses more settings later.
    unsure: Sequence[str] = ()
    # Maps of two teachers into one space by name, that of images first; {} where they stay as they
    # are, and None until the data are known.
    joint: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan(Outline):
    """What a run is going to do, with settings that are filled, and with which data."""

    samples: Pairs | SampleStream  # the pairs to train on
    # The external teachers by name, except those that the run makes of its start or its encoders.
    teachers: Mapping[str, TeacherFeatures] = field(default_factory=dict)
    captions: CaptionDraw = ONE  # those of a visit to an image
    # The data sets that the run is evaluated on, of pairs that are not trained on.
    held_out: Sequence[EvaluationData] = ()
    guards: Sequence[EvaluationData] = ()  # the data sets of `run.guard`
    # All pairs, where the samples are those that frozen encoders could encode.
    encoded_from: Pairs | None = None

    @property
    def chooses_weights(self) -> bool:
        """Whether WiSE-FT follows the training."""
        return self.command == "finetune" and self.config.run.overfit is None

    @property
    def amount(self) -> str:
        """What a run trains on and how much, in words."""
        episodes, samples = self.config.episodes, self.samples
        size, batch = episodes.size, episodes.batch_size
        amount = f"{counted(episodes.count, 'episode')} of {size:,} pairs in batches of {batch:,}"
        data = self.config.data
        name = f"{len(data.sources)} sources" if data.sources else data.train
        if not isinstance(samples, Pairs):
            return f"pairs from {name}: {amount}"
        passes = size * episodes.count / len(samples)
        seen = 1 - math.exp(-passes) if episodes.replacement else passes
        amount += f", {three_digits(passes)} pass{'es' * (passes != 1)} over the data"
        if seen < NEARLY_ALL:
            amount += f", which show at most {100 * seen:.2g}% of the pairs"
        return f"{counted(len(samples), 'pair')} from {name}: {amount}"


def make_plan(given: Config | Outline) -> Plan:
    """Open the data, hold out pairs, and fill what is unset. Collective.

    Every rank opens all data, and they are compared once. Then rank 0 decides, since each rank may
    fail to read other samples.

    Raises:
        ValueError: Data are wrong or too few, or settings do not fit; or as `resolve_settings`.
    """
    outline = given if isinstance(given, Outline) else rank0_first(lambda: resolve_settings(given))
    plan = raise_on_all_ranks(lambda: open_data(outline))
    if isinstance(plan.samples, Pairs):
        embedded = embed_teachers(plan.config, plan.samples)
        plan = replace(plan, teachers={**plan.teachers, **embedded})
    ranges, channels = plan.start.ranges, plan.config.model.image.channels
    if ranges is None or len(ranges) not in (0, channels):
        read = partial(read_some, plan.samples)
        ranges = rank0_first(lambda: measure_ranges(read, channels))
        plan = replace(plan, start=replace(plan.start, ranges=ranges))
    if world_size() > 1:
        seen = all_gather_object(raise_on_all_ranks(lambda: describe_data(plan)))
        raise_on_all_ranks(lambda: require_same_data(seen))
    if plan.command == "align" and not isinstance(plan.samples, Pairs):
        plan = replace(plan, samples=encode_stream_pairs(plan, plan.samples))
    config, captions, notes = rank0_first(lambda: decide_settings(plan))
    start = replace(plan.start, model=config.model)
    plan = replace(plan, config=config, start=start, captions=captions, notes=notes)
    return align_teachers(plan) if len(plan.teachers) == 2 else plan


def resolve_settings(config: Config, choices: Choices | None = None) -> Outline:
    """Check the settings, and let the model follow its start.

    `choices` are those of a command that chooses more settings when it knows the data. Then
    `make_plan` checks sizes and weights, and says what has no effect.
    """
    is_whole = choices is None
    if not is_whole:  # what distillation brings was measured with `train`
        config = change_teachers(config, lambda teacher: fill(teacher, {"distil": 0.0}))
    without_effect = check(config, is_whole=is_whole)
    start, given = resolve_start(config.model), config.model.start
    notes = [*(without_effect if is_whole else ()), *start.notes]
    config = replace(config, model=start.model)
    if given is not None and not config.model.has_start and (config.uses_start or not is_whole):
        raise ValueError(f"model.start: {given}: names no weights; write {given}/TAG")
    loss = config.loss
    if loss.positives is None:  # equal pairs are negatives, as in the paper
        shared = config.data.several_captions and loss.info_nce > 0
        loss = replace(loss, positives="shared" if shared else "pair")
        if shared:
            notes.append(
                "loss.positives = shared, since all captions that a visit brings are an image's own"
            )
    if config.parallel.activation_checkpointing:
        towers = start.build(on_meta=True).towers
        loading.recompute_activations(towers, start.model)
    if loss.instance == "auto":
        sigmoid = start.has_logit_bias
        loss = replace(loss, instance="sigmoid" if sigmoid else "info_nce")
        if sigmoid:
            notes.append("loss.instance = sigmoid, since the model has a logit bias")
    return Outline(
        config=replace(config, loss=loss),
        start=start,
        notes=notes,
        unsure=[] if is_whole else without_effect,
        command="train" if choices is None else choices.command,
        choices=choices,
    )


def open_data(outline: Outline) -> Plan:
    """Open the pairs of a run and its teachers, and hold out its validation set."""
    config = outline.config
    require_paths(config)
    model = outline.start.model
    # A start brings its weights, also where it was made of published ones.
    if rank() == 0 and model.start is None:
        for image in split_tower(model.image):
            if image.weights == PUBLISHED:
                require_published(image.name)
    samples = sources.open_samples(config)
    usual = SHARE
    # A run that goes on holds out what it did; one of version 1.0 does not say how much.
    if outline.joint is None and isinstance(samples, Pairs):
        usual = choose_share(len(samples))
    training, held_out, notes = split_validation(config, samples, usual=usual)
    if usual > SHARE and held_out and config.data.validation is None and not config.data.is_emoji:
        config = replace(config, data=replace(config.data, validation=usual))
        outline = replace(outline, config=config)
    if isinstance(training, Pairs) and config.data.max_bad_share < MOST_BAD:
        sources.require_usable(config.data, training)
    if config.run.overfit is not None:
        training = choose_few(training, config)
    watched = open_guards(config, held_out) if config.run.guard else []
    if config.run.keep_best is not None or config.run.stop_by is not None:
        check_metrics(config, held_out, watched)
    said, teachers = list[str](), dict[str, TeacherFeatures]()
    if config.teachers or config.teacher.features:
        teachers = open_teachers(config, training, said.append)
    if outline.command == "align" and isinstance(training, Pairs):
        said = []  # it tells of the pairs that it could encode
        if len(training) < FEWEST_TO_CHOOSE:  # encoders are as their libraries have them
            model = set_layers(config.model, AUTO, PLAIN)
            start = replace(outline.start, model=model)
            outline = replace(outline, config=replace(config, model=model), start=start)
    notes = [*outline.notes, *notes, *said, *(note for guard in watched for note in guard.notes)]
    return Plan(
        **{**vars(outline), "notes": notes},
        samples=training,
        held_out=held_out,
        guards=watched,
        teachers=teachers,
    )


def choose_few(samples: Pairs | SampleStream, config: Config) -> Pairs:
    """The pairs that `run.overfit` learns by heart, drawn evenly."""
    number = config.run.overfit
    assert number is not None
    if not isinstance(samples, Pairs):
        raise ValueError(
            "run.overfit: a stream cannot be read again; name local shards, and leave data.read out"
        )
    if number > len(samples):
        raise ValueError(f"run.overfit: {number} of {len(samples)} pairs; choose fewer")
    if world_size() > 1:
        raise ValueError("run.overfit: is for one process; start it without torchrun")
    chosen = evenly_spaced(len(samples), number, config.run.seed)
    few: Pairs = drop_rows(samples, np.setdiff1d(np.arange(len(samples)), chosen))
    return few


def check_metrics(
    config: Config, held_out: Sequence[EvaluationData], watched: Sequence[EvaluationData]
) -> None:
    """Refuse a metric that no evaluation of this run gives, or of which higher is not better."""
    names = [name for data in held_out for name in list_metrics(data)]
    for data in watched:
        split = "validation" if "validation" in data.splits else "test"
        names += list_metrics(data, split, quick=True)
    better = [name for name in names if is_share(name.split("/", 2)[2])]
    for setting in ("keep_best", "stop_by"):
        metric = getattr(config.run, setting)
        if metric is not None and metric not in better:
            close = difflib.get_close_matches(metric, better, n=3, cutoff=0.0) or ["none"]
            raise ValueError(
                f"run.{setting}: no metric {metric!r} where higher is better; the closest are "
                f"{', '.join(close)}"
            )


def describe_data(plan: Plan) -> tuple[str, str, dict[str, Facts]]:
    """What tells a rank's data from those of others: its host, a digest of how many pairs there
    are, of some of them and of those that are held out, and the facts of teachers by name."""
    samples, facts = plan.samples, dict[str, Any]()
    if isinstance(samples, SampleStream):
        facts["shards"] = [shard_stem(shard) for s in samples.sources for shard in s.shards]
    else:
        facts = {"rows": len(samples), "left_out": samples.left_out.tolist(), "pairs": []}
        for row in evenly_spaced(len(samples), min(SEEN, len(samples)), seed=0):
            facts["pairs"].append(samples.sample_id(row))
            with suppress(BadSample):
                facts["pairs"] += samples.sample_captions(row)
    teachers = {name: teacher.content for name, teacher in plan.teachers.items()}
    return socket.gethostname(), digest(facts), teachers


def require_same_data(seen: Sequence[tuple[str, str, Mapping[str, Facts]]]) -> None:
    """Refuse a host with other pairs or teachers than rank 0, by `describe_data` of all ranks."""
    (first, pairs, teachers), (host, others, others_teachers) = seen[0], seen[rank()]
    for setting, one, other in (
        ("data.train", pairs, others),
        ("teacher.features", teachers, others_teachers),
    ):
        if one != other:
            raise ValueError(
                f"{setting}: {host} sees other files than {first}; let all hosts read the "
                "same files"
            )


def decide_settings(plan: Plan) -> tuple[Config, CaptionDraw, list[str]]:
    """The settings with all filled that is unset, the captions of a visit, and all notes."""
    config, samples, choices, notes = plan.config, plan.samples, plan.choices, [*plan.notes]
    model, captions, aligns = config.model, ONE, plan.command == "align"
    are_negatives = config.loss.positives == "pair" and config.loss.info_nce > 0
    is_named = model.start is not None or model.name is not None
    leaves_size_open = not is_named and None in (model.image.size, model.text.context_length)
    summary = summarize(
        samples,
        looks_at_images=leaves_size_open,
        # align makes one sample of equal images, and finetune counts them
        compares_images=not aligns and (are_negatives or choices is not None),
    )
    chosen = list[str]()
    if choices is not None:
        is_evaluated = bool(plan.held_out or plan.guards)
        config, chosen = choose_with_data(
            choices, config, plan.start, samples, summary, is_evaluated=is_evaluated
        )
    config, filled = fill_settings(config, plan.start, samples, summary)
    notes += [*(note for note in check(config) if note in plan.unsure), *chosen, *filled]
    if plan.start.ranges:
        ends = dict.fromkeys(f"{low:.6g} to {high:.6g}" for low, high in plan.start.ranges)
        notes.append(f"images of more than 8 bits are scaled to 8, by band: {', '.join(ends)}")
    if config.data.augmentation == "light" and config.model.image.channels != 3:
        notes.append("data.augmentation = light: without changes of colour, which are those of RGB")
    if config.teachers or config.teacher.features:
        config, said = fill_teachers(config, plan.teachers)
        notes += said
    if not aligns and config.data.captions != DataConfig().captions:
        # align draws whole captions, and those of the pairs that it could encode
        captions, said = caption_draw(config, samples)
        notes += said
    for setting, is_set, work in (
        ("align.*", config.align != AlignConfig(), "aligns encoders"),
        ("data.images", config.data.images, "joins images and captions without partner"),
        ("encode.engine", config.encode.engine != "auto", "encodes images"),
    ):
        if is_set and not aligns:
            notes.append(f"{setting}: no effect, since protoclip align alone {work}")
    # A length that was chosen here suits them.
    suits = leaves_size_open and model.text.context_length is None and model.text.name is None
    if (texts := summary.captions) and not suits:
        start, what = replace(plan.start, model=config.model), "captions"
        way_out = "raise it" if aligns else "raise it, or draw sentences by data.captions"
        if config.data.captions == "sentences" and not aligns:
            texts = [part for text in texts for part in BETWEEN_SENTENCES.split(text)]
            what, way_out = "sentences", "raise it"
        length, counts = start.context_length, count_tokens(start.tokenizer(), texts)
        if cut := sum(number > length for number, _ in counts):
            notes.append(
                f"model.text.context_length = {length} cuts {cut:,} of {len(texts):,} {what} that "
                f"were looked at; {way_out}"
            )
    is_often = are_negatives and summary.repeated > SHARED * summary.compared
    if is_often and not config.data.is_emoji:  # which are bundled as they are
        notes.append(
            f"{summary.repeated:,} of {summary.compared:,} pairs that were looked at show the "
            "image of another pair, and a batch counts the two as a mismatch; set "
            "loss.positives = shared, or give each image one row with all its captions"
        )
    if plan.guards:
        notes += note_trained_guards(config, plan.guards, samples)
    notes += summary.notes
    if config.run.evaluate and config.data.validation == 0 and not plan.guards:
        notes.append("no evaluation at the end, since no pairs are held out")
    return config, captions, notes


# The phase of `align` before training: two frozen encoders encode each pair once. Then their
# projections into a joint space train on these features, as `train` trains towers on images.


def encode_pairs(plan: Plan, model: ProtoCLIP) -> tuple[Plan, PairRows]:
    """Encode all pairs of a plan by the frozen encoders of a model. Collective.

    The projections of the model get their start from the features, in closed form.

    Returns:
        The plan with the pairs that could be encoded, to which a chosen episode shrinks; and their
        rows, which make the batches.
    """
    samples, config = plan.samples, plan.config
    assert isinstance(samples, Pairs)
    rows = encode_all(plan, samples, model)
    device = next(model.parameters()).device
    shown, notes, start = rows.listing.shown, [*plan.notes], plan.start
    bad = np.flatnonzero(np.isin(shown, rows.good.left_out))
    repeated = np.flatnonzero(rows.listing.rows[shown] != np.arange(len(samples)))
    if len(also := np.setdiff1d(repeated, bad)):
        notes.append(f"{len(also):,} pairs show an earlier pair's image, which gets their captions")
    if len(bad):
        example = explain_bad(samples, int(bad[0]))
        said = f"{len(bad):,} of {len(samples):,} pairs cannot be used, such as {example}"
        if len(bad) > config.data.max_bad_share * len(samples):
            raise ValueError(
                f"{said}; that is more than data.max_bad_share ({config.data.max_bad_share:g}) "
                "allows; mend the data or raise it"
            )
        notes.append(f"{said}; they are left out")
    left_out = np.union1d(bad, repeated)
    left = len(samples) - len(left_out)
    if not left:
        raise ValueError(f"{samples.name}: no pair can be used; {notes[-1]}")
    episodes, choices = config.episodes, plan.choices
    assert choices is not None
    if config.run.overfit is not None:  # each pair that is left, in one batch
        episodes = replace(episodes, size=left, batch_size=left)
    else:  # with `run.overfit` all pairs may be known before the first step
        towers: Any = model.towers
        section, chosen = choose_layers(config.model, towers, rows)
        config, start = replace(config, model=section), replace(plan.start, model=section)
        notes += chosen
        columns = [
            read_columns(tower, width)
            for tower, width in ((towers.visual, rows.image.width), (towers.text, rows.text.width))
        ]
        moments = rows.second_moments(device).select(*columns)
        maps = canonical_projections(moments)
        if config.data.images is not None:
            encoder = Encoder(
                model=model,
                transform=evaluation_transform(model),
                tokenizer=start.tokenizer(),
                cache=features_folder(config),
                show=True,
                engine=config.encode.engine,
                aligned_by=config,
            )
            maps, chosen = fit_with_unpaired(moments, rows, columns, encoder, config.data)
            notes += chosen
        start_projections(towers, *maps)
        for tower in (towers.visual, towers.text):
            for parameter in Projection(tower).parameters():  # hosts may compute other last digits
                collectives.broadcast(parameter.data)
        size = max(episodes.batch_size, left // episodes.batch_size * episodes.batch_size)
        if size < episodes.size and not choices.is_given("episodes.size"):
            episodes = replace(episodes, size=size)
            notes.append(f"episodes.size = {size}, so that an episode fits into what is left")
        if left < episodes.size and not choices.is_given("episodes.replacement"):
            episodes = replace(episodes, replacement=True)
    config = replace(config, episodes=episodes)
    encoded: Pairs = drop_rows(samples, left_out) if len(left_out) else samples
    captions, draw_notes = raise_on_all_ranks(lambda: caption_draw(config, rows))
    notes += draw_notes
    for name, teacher in plan.teachers.items():
        notes += raise_on_all_ranks(partial(note_unknown, name, teacher, encoded))
    plan = replace(
        plan,
        config=config,
        start=start,
        samples=encoded,
        captions=captions,
        encoded_from=samples,
        notes=notes,
    )
    return plan, rows


def encode_all(outline: Outline, samples: Pairs, model: ProtoCLIP) -> PairRows:
    """The features of pairs by the frozen encoders of a model. Collective."""
    config, device = outline.config, next(model.parameters()).device
    return encode_sides(
        FrozenEncoders(model.towers).eval().requires_grad_(False),
        samples,
        tokenizer=outline.start.tokenizer(),
        transform=evaluation_transform(model),
        root=features_folder(config),
        threads=config.data.threads,
        autocast=autocast(resolve_encoding(config.run.precision, device), device),
        engine=config.encode.engine,
    )


def choose_layers(
    section: ModelConfig, towers: Any, rows: PairRows
) -> tuple[ModelConfig, list[str]]:
    """Let projections read the layers that find partners best, where the settings leave it open.

    Collective. Returns the settings with these layers, and a note on them.
    """
    sides = {"image": towers.visual, "text": towers.text}
    is_open = {name: getattr(section, name).joined_layers == AUTO for name in sides}
    if not any(is_open.values()):
        return section, []
    layers = {
        name: tower.options[: None if len(rows) >= FEWEST_TO_CHOOSE else 1]
        if is_open[name] and isinstance(tower, JoinedTower)
        else [getattr(tower, "chosen", [0])]
        for name, tower in sides.items()
    }

    def choose() -> tuple[tuple[int, int], dict[tuple[int, int], float]]:
        columns = [
            [read_columns(tower, store.width, option) for option in layers[name]]
            for (name, tower), store in zip(sides.items(), (rows.image, rows.text), strict=True)
        ]
        return rows.choose_columns((columns[0], columns[1]))

    tries = any(len(options) > 1 for options in layers.values())
    picked, ranks = rank0_first(choose) if tries else ((0, 0), {})
    notes = list[str]()
    for (name, tower), number in zip(sides.items(), picked, strict=True):
        if not is_open[name]:
            continue
        value: str | None = None
        if isinstance(tower, JoinedTower):
            tower.choose(layers[name][number])
            value = name_layers(tower.chosen)
            notes.append(f"model.{name}.joined_layers = {value}")
        part = replace(getattr(section, name), joined_layers=value)
        section = replace(section, **{name: part})
    if picked != (0, 0):
        notes[-1] += (
            f", by pairs out of fold: a partner is found at rank {ranks[picked]:.1f} on average, "
            f"with the last layers alone at {ranks[0, 0]:.1f}"
        )
    return section, [" and ".join(notes)] if notes else []


def encode_stream_pairs(plan: Plan, stream: SampleStream) -> Pairs:
    """Encode the images of a stream as they pass, each once, and keep the captions. Collective."""
    config, root = plan.config, features_folder(plan.config)
    device = collectives.choose_device(config.run.device)
    model = loading.to_device(loading.build_model(plan.start, seed=config.run.seed), device)
    encoders = FrozenEncoders(model.towers).eval().requires_grad_(False)
    if SEVERAL in config.model.image.name:
        raise ValueError("model.image.name: images of a stream pass once, so name one encoder")
    encoder = image_side(
        encoders,
        evaluation_transform(model),
        autocast=autocast(resolve_encoding(config.run.precision, device), device),
        engine=config.encode.engine,
    )
    return encode_stream(
        stream,
        root,
        encoder,
        open_side(encoder, root),
        batch_size=images_at_once(encoders),
        max_bad_share=config.data.max_bad_share,
        threads=config.data.threads,
    )


def explain_bad(samples: Pairs, row: int) -> str:
    """What is wrong with a pair, in words."""
    try:
        read_image(samples, row, decode)
    except BadSample as error:
        return str(error)
    return f"sample '{samples.sample_id(row)}', which can be read by now"


def change_teachers(config: Config, change: Callable[[TeacherConfig], TeacherConfig]) -> Config:
    """The settings with every teacher changed."""
    if config.teachers:
        return replace(config, teachers=[change(teacher) for teacher in config.teachers])
    return replace(config, teacher=change(config.teacher))


def fill_teachers(
    config: Config, teachers: Mapping[str, TeacherFeatures]
) -> tuple[Config, list[str]]:
    """The settings with `teacher.distil` and `teacher.tower` of each teacher, and notes on them.

    Distillation is 1 for a teacher that groups, if a tower can learn from it. Beside groups at the
    default weights that is the best use of a teacher on four kinds of pairs, or within 0.3 points
    of it (docs/teachers.md). The tower that learns is that of the teacher's modality.
    """
    notes = list[str]()

    def fill_teacher(teacher: TeacherConfig) -> TeacherConfig:
        name, kind, stored = teacher.name, teacher.features, teachers.get(teacher.name)
        modality = "text" if kind == START else stored and stored.modality
        tower: Any = teacher.tower or modality
        is_fixed = tower in config.model.locked and not config.model.projections_are_new
        if teacher.distil is None:
            groups = name in config.grouping_teachers and kind != START
            learns = groups and tower is not None and not is_fixed
            why = f"so the {tower} tower learns from its features too"
            if tower is None:
                why = (
                    f"since {kind} does not say what it was made of; with {name}.tower, image or "
                    "text, that tower learns from its features too"
                )
            elif is_fixed:
                why = f"since model.locked leaves the {tower} tower as it is"
            if groups:
                notes.append(f"{name}.distil = {int(learns)}, {why}")
            teacher = replace(teacher, distil=float(learns))
        if name not in config.external_teachers or not teacher.distil:
            return teacher
        if tower not in ("image", "text"):
            raise ValueError(
                f"teacher.tower: {kind} does not say what it was made of; name the tower that "
                "learns it, image or text"
            )
        if is_fixed:
            raise ValueError(
                f"teacher.distil: {name} is for the {tower} tower, which model.locked leaves as "
                f"it is; set teacher.distil = 0, or unlock the tower"
            )
        if modality not in (None, tower):
            made = f"its features were made of {modality}s; {modality} is usual"
            notes.append(f"{name}.tower = {tower}, though {made}")
        return replace(teacher, tower=tower)

    return change_teachers(config, fill_teacher), notes


def align_teachers(plan: Plan) -> Plan:
    """Let a teacher of images and one of captions share a space, if they agree. Collective.

    The space is fitted to the training pairs. Both group and are learned, and are the only ones: so
    it was measured (docs/teachers.md). A run that goes on keeps what its checkpoint holds.
    """
    if plan.joint is None:
        joint, notes = rank0_first(lambda: fit_teachers(plan))
        plan = replace(plan, joint=joint, notes=[*plan.notes, *notes])
    assert plan.joint is not None
    teachers = {n: replace(plan.teachers[n], joint=linear) for n, linear in plan.joint.items()}
    return replace(plan, teachers={**plan.teachers, **teachers})


def fit_teachers(plan: Plan) -> tuple[dict[str, Tensor], list[str]]:
    """The maps of two teachers into one space, if they can have one, and a note on that."""
    config, samples, stored = plan.config, plan.samples, plan.teachers
    tower_of = {
        name: teacher.tower
        for name, teacher in config.distilled_teachers.items()
        if name in stored and stored[name].modality in (None, teacher.tower)
    }
    names = sorted(tower_of, key=lambda name: str(tower_of[name]))
    is_pair = [tower_of[name] for name in names] == ["image", "text"]
    if plan.command != "train" or not is_pair or {*names} != {*config.grouping_teachers}:
        return {}, []
    both = " and ".join(names)
    if not isinstance(samples, Pairs):
        return {}, [f"{both} are not aligned, since the pairs of a stream pass once"]
    ids = [samples.sample_id(row) for row in evenly_spaced(len(samples), MOST_TO_ALIGN, seed=0)]
    known = [*compress(ids, np.all([stored[name].find(ids) >= 0 for name in names], axis=0))]
    if len(known) < FEWEST_TO_ALIGN:
        return {}, [f"{both} are not aligned, since both know only {len(known)} training pairs"]
    maps, mean_rank, number = fit_joint_space(*(stored[name].rows(known).float() for name in names))
    chance = math.exp(math.lgamma(number + 1) / number)  # the geometric mean of all ranks
    found = (
        f"a partner that the fit has not seen is found at rank {mean_rank:.1f} of {number:,} on "
        f"average, by chance at {chance:.0f}"
    )
    if mean_rank > chance / 2:
        return {}, [f"{both} do not agree, so each teaches by itself: {found}"]
    aligned = f"{both} are aligned on {len(known):,} training pairs, and teach in one space"
    return dict(zip(names, maps, strict=True)), [f"{aligned}: {found}"]


# What a run folder is known by


def list_contents(plan: Plan, start: TowerPair | Mapping[str, Tensor]) -> dict[str, list[Facts]]:
    """Fingerprints of what a run reads: `sources` of the pairs to train on, `validation` if it is a
    source, `teachers` that are stored, and the `start`, if its weights are needed."""
    encoded = None if plan.encoded_from is None else plan.samples
    samples = plan.encoded_from or plan.samples
    of_sources = zip(fingerprint_sources(samples, encoded=encoded), samples.sources, strict=True)
    facts = {"sources": [facts_that_may_move(one, source) for one, source in of_sources]}
    images = plan.held_out[0].splits["validation"].images if plan.held_out else None
    is_source = isinstance(plan.config.data.validation, str)  # others follow from these or stay
    if is_source and isinstance(images, PairsView):
        facts["validation"] = fingerprint_sources(images)
    facts["teachers"] = [{"name": n, **teacher.content} for n, teacher in plan.teachers.items()]
    weights = start.state_dict() if isinstance(start, TowerPair) else start
    # Machines make embeddings of positions with other last digits, which they interpolate; and
    # LoRA is what a run adds.
    raw = {
        name: checksum(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in weights.items()
        if name.startswith("towers.") and "pos" not in name and "lora_" not in name
    }
    facts["start"] = [{"weights": checksum(to_json(raw).encode())}] if weights else []
    return facts
