"""The plan of a run: all that is decided before it starts, each thing once.

It reads the start, opens data and teachers, holds out the validation set, and fills all settings
that are unset. Later code may assume that every setting is filled. These stay open:

- What a run goes without: `model.lora`, `run.sync`, `run.stop_by`, `data.only` and their like.
- What the machine decides, for a run may go on on another one: `run.device`, `run.precision`,
  `data.workers`; and places that follow from others: `run.out`, `align.features`.
- How sources are read, by what is in them: `data.read` and the columns of tables.
- `data.validation`: pairs that are asked for have to be held out, and without being asked a run
  goes on without any if they are few. A share in its place would say that they were asked for, when
  the run goes on, and when another one starts from it (evaluation/validation.py).

It says every note but a few. Those on the built model and its loader need these: how large it is,
what was resized, added or made parallel, how many processes read. `align` tells of the pairs that
it could encode. A run names its devices, and what it goes on from, as it begins; a command says
what it was given in vain.
"""

import difflib
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from protoclip.config import SMALL_IMAGE_SIZES, AlignConfig, Config
from protoclip.data import sources
from protoclip.data.access import digest
from protoclip.data.captions import ONE, CaptionDraw, caption_draw
from protoclip.data.content import Facts, content
from protoclip.data.decode import dimensions
from protoclip.data.defaults import choose_augmentation
from protoclip.data.pairs import BadSample, Pairs, SampleStream
from protoclip.data.sampler import evenly_spaced
from protoclip.data.shards import shard_stem
from protoclip.data.stream import facts_that_may_move
from protoclip.data.view import PairsView, drop_rows
from protoclip.distributed import collectives
from protoclip.distributed.collectives import (
    all_gather_object,
    raise_on_all_ranks,
    rank,
    rank0_first,
    world_size,
)
from protoclip.encode import teachers as external
from protoclip.encode.rows import HalfRows
from protoclip.encode.store import StoredFeatures
from protoclip.encode.whiten import Whitens
from protoclip.evaluation.datasets import EvaluationData
from protoclip.evaluation.metrics import is_share
from protoclip.evaluation.suite import list_metrics
from protoclip.evaluation.validation import guards, judged, trained_guards
from protoclip.files import checksum, to_json
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP, TowerPair
from protoclip.models.resolve import resolve_start
from protoclip.models.start import Start
from protoclip.models.timm import require_image_weights
from protoclip.progress import three_digits
from protoclip.rules import check, never_trained, require_paths
from protoclip.training import optim, sizes
from protoclip.training.align import encode, encode_stream_pairs
from protoclip.training.presets import Choices, choose_with_data, require_possible

NEARLY_ALL = 0.95  # share of the pairs that a run sees, below which it is said
MOST_BAD = 0.8  # share of bad samples; who allows more may have no good one among some
SEEN = 64  # pairs whose ids tell whether all hosts see the same ones
Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What is decided before the data are opened.

    Attributes:
        config: The settings, which follow their start.
        notes: What the user should know of this.
        unsure: Notes on settings without effect, where a command chooses more settings later.
        choices: Those of `align` and of `finetune`; `train` leaves nothing to choose.
    """

    config: Config
    start: Start
    notes: list[str]
    unsure: Sequence[str] = ()
    choices: Choices | None = None

    @property
    def aligns(self) -> bool:
        return self.choices is not None and self.choices.command == "align"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is going to do, and with which data.

    Attributes:
        config: The settings, with all filled that the module's first lines do not leave open.
        start: What the model starts from.
        samples: The pairs to train on.
        teachers: The external teachers by name, but for those that the run makes of its start or
            its halves.
        captions: Those of a visit to an image.
        held_out: The data sets that judge the run, of pairs that are not trained on.
        guards: The data sets of `run.guard`.
        choices: Those of `align` and of `finetune`, as in the outline.
        encoded_from: All pairs, where the samples are those that frozen halves could encode.
        notes: What the user should know of all this.
    """

    config: Config
    start: Start
    samples: Pairs | SampleStream
    teachers: Mapping[str, StoredFeatures] = field(default_factory=dict)
    captions: CaptionDraw = ONE
    held_out: Sequence[EvaluationData] = ()
    guards: Sequence[EvaluationData] = ()
    choices: Choices | None = None
    encoded_from: Pairs | None = None
    notes: Sequence[str] = ()

    @property
    def chooses_weights(self) -> bool:
        """Whether WiSE-FT follows the training."""
        finetunes = self.choices is not None and self.choices.command == "finetune"
        return finetunes and self.config.run.overfit is None

    @property
    def amount(self) -> str:
        """What a run trains on and how much, in words."""
        episodes, samples = self.config.episodes, self.samples
        size, batch = episodes.size, episodes.batch_size
        amount = f"{episodes.count:,} episodes of {size:,} pairs in batches of {batch:,}"
        data = self.config.data
        name = f"{len(data.sources)} sources" if data.sources else data.train
        if not isinstance(samples, Pairs):
            return f"pairs from {name}: {amount}"
        passes = size * episodes.count / len(samples)
        seen = 1 - math.exp(-passes) if episodes.replacement else passes
        amount += f", {three_digits(passes)} passes over the data"
        if seen < NEARLY_ALL:
            amount += f", which show at most {100 * seen:.2g}% of the pairs"
        return f"{len(samples):,} pairs from {name}: {amount}"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What each rank has opened of a run: `training` are the pairs to train on; see `Plan`."""

    training: Pairs | SampleStream
    held_out: Sequence[EvaluationData]
    guards: Sequence[EvaluationData]
    teachers: Mapping[str, StoredFeatures]
    notes: Sequence[str]


def make_plan(given: Config | Outline) -> Plan:
    """Open the data, hold out pairs, and fill what is unset. Collective.

    Every rank opens all data, and they are compared once. Then rank 0 decides, since each rank may
    fail to read other samples.

    Raises:
        ValueError: The data are wrong or too few, or a setting does not go with them; or as
            `resolve_settings`.
    """
    outline = given if isinstance(given, Outline) else rank0_first(lambda: resolve_settings(given))
    opened = raise_on_all_ranks(lambda: open_data(outline))
    if world_size() > 1:
        of_all = all_gather_object(raise_on_all_ranks(lambda: describe(opened)))
        raise_on_all_ranks(lambda: require_same_data(of_all))
    if outline.aligns and not isinstance(opened.training, Pairs):
        opened = replace(opened, training=pairs_of_stream(outline, opened.training))
    config, captions, notes = rank0_first(lambda: decide(outline, opened))
    return Plan(
        config=config,
        start=replace(outline.start, model=config.model),
        samples=opened.training,
        teachers=opened.teachers,
        captions=captions,
        held_out=opened.held_out,
        guards=opened.guards,
        choices=outline.choices,
        notes=notes,
    )


def resolve_settings(config: Config, choices: Choices | None = None) -> Outline:
    """Check the settings, and let the model follow its start.

    Args:
        choices: Of a command that chooses more settings when it knows the data. Then `make_plan`
            checks sizes and weights, and says what has no effect.

    Raises:
        ValueError: A setting is wrong, there is no such start, or it cannot be trained so.
    """
    is_whole = choices is None
    config = config if is_whole else external.undistilled(config)
    without_effect = check(config, is_whole=is_whole)
    notes = without_effect if is_whole else []
    start = resolve_start(config.model)
    notes += start.notes
    given, config = config.model.start, replace(config, model=start.model)
    if given is not None and not config.model.has_start and (config.uses_start or not is_whole):
        raise ValueError(f"model.start: {given}: names no weights; write {given}/TAG")
    config, said = with_positives(config)
    notes += said
    loading.check_parallel(config, start)
    if config.loss.instance == "auto":
        sigmoid = start.has_logit_bias
        loss = replace(config.loss, instance="sigmoid" if sigmoid else "info_nce")
        config = replace(config, loss=loss)
        if sigmoid:
            notes.append("loss.instance = sigmoid, since the model has a logit bias")
    unsure = [] if is_whole else without_effect
    return Outline(config=config, start=start, notes=notes, unsure=unsure, choices=choices)


def with_positives(config: Config) -> tuple[Config, list[str]]:
    """Equal pairs are negatives, as in the paper, unless visits bring several captions."""
    if config.loss.positives is not None:
        return config, []
    shared = config.data.several_captions and config.loss.info_nce > 0
    loss = replace(config.loss, positives="shared" if shared else "pair")
    note = "loss.positives = shared, since all captions that a visit brings are an image's own"
    return replace(config, loss=loss), [note] if shared else []


def open_data(outline: Outline) -> Opened:
    """Open the pairs of a run and its teachers, and hold out what judges it.

    Raises:
        ValueError: They are wrong or too few, or nothing measures what a setting names.
    """
    config = outline.config
    require_paths(config)
    if rank() == 0:
        require_image_weights(config.model)
    training, held_out, notes = judged(config, sources.pairs(config))
    if isinstance(training, Pairs):
        require_usable(config, training)
    if config.run.overfit is not None:
        training = choose_few(training, config)
    watched = guards(config, held_out)
    check_metrics(config, held_out, watched)
    said = list[str]()
    teachers = external.teachers(config, training, said.append)
    if outline.aligns and isinstance(training, Pairs):
        said = []  # it tells of the pairs that it could encode
    return Opened(
        training=training,
        held_out=held_out,
        guards=watched,
        teachers=teachers,
        notes=[*notes, *said, *(note for guard in watched for note in guard.notes)],
    )


def describe(opened: Opened) -> tuple[str, str, str, dict[str, Facts]]:
    """What tells a rank's data from those of others: its host, how many pairs, a digest of some of
    them and of those that are held out, and the facts of teachers by name."""
    samples = opened.training
    facts = {name: each.content for name, each in opened.teachers.items()}
    if isinstance(samples, SampleStream):
        shards = [shard_stem(shard) for source in samples.sources for shard in source.shards]
        return socket.gethostname(), f"{len(shards):,} shards", digest({"shards": shards}), facts
    rows = evenly_spaced(len(samples), min(SEEN, len(samples)), seed=0)
    pairs = [(samples.sample_id(row), captions_or_none(samples, row)) for row in rows]
    key = digest({"pairs": pairs, "left_out": samples.left_out.tolist()})
    return socket.gethostname(), f"{len(samples):,} pairs", key, facts


def captions_or_none(samples: Pairs, row: int) -> tuple[str, ...]:
    try:
        return samples.sample_captions(row)
    except BadSample:
        return ()


def require_same_data(of_all: Sequence[tuple[str, str, str, Mapping[str, Facts]]]) -> None:
    """Refuse a host whose pairs or teachers are others than those of rank 0, given `describe` of
    all ranks."""
    (first, pairs, key, expected), (host, others, other, known) = of_all[0], of_all[rank()]
    if (pairs, key) != (others, other):
        raise ValueError(
            f"data.train: {host} sees {others}, and {first} {pairs}, or other ones; let all hosts "
            "read the same data"
        )
    for name, features in known.items():
        if features != expected[name]:
            raise ValueError(
                f"teacher.features: {host} has other features of {name} than {first}; let all "
                "hosts read the same files"
            )


def pairs_of_stream(outline: Outline, stream: SampleStream) -> Pairs:
    """The pairs of a stream whose images `align` encodes as they pass, each once. Collective."""
    config, choices = outline.config, outline.choices
    assert choices is not None
    rank0_first(lambda: require_possible(choices, config))
    return encode_stream_pairs(config, outline.start, stream)


def encode_pairs(plan: Plan, model: ProtoCLIP) -> tuple[Plan, HalfRows]:
    """Encode all pairs of a plan by the halves of a model. Collective.

    Returns:
        The plan with the pairs that could be encoded, to which an episode that was chosen shrinks;
        and their rows, which make the batches.

    Raises:
        ValueError: As `align.encode`.
    """
    assert isinstance(plan.samples, Pairs)
    assert plan.choices is not None
    encoded = encode(plan.config, plan.samples, model, loading.tokenizer(plan.start), plan.choices)
    notes = [*plan.notes, *encoded.notes]
    for name, teacher in plan.teachers.items():
        notes += raise_on_all_ranks(partial(external.unknown_to, name, teacher, encoded.samples))
    plan = replace(
        plan,
        config=encoded.config,
        samples=encoded.samples,
        captions=encoded.captions,
        encoded_from=plan.samples,
        notes=notes,
    )
    return plan, encoded.rows


def decide(outline: Outline, opened: Opened) -> tuple[Config, CaptionDraw, list[str]]:
    """The settings with all filled that is unset, the captions of a visit, and all notes.

    Raises:
        ValueError: Settings do not go with each other or with the data.
    """
    start, training, aligns = outline.start, opened.training, outline.aligns
    config, notes, captions = outline.config, list[str](), ONE
    if outline.choices is not None:
        is_judged = bool(opened.held_out or opened.guards)
        config, notes = choose_with_data(
            outline.choices, config, start, training, is_judged=is_judged
        )
    config, said = filled(config, start, training)
    without_effect = [note for note in check(config) if note in outline.unsure]
    notes = without_effect + notes + said + never_trained(config) + idle(config)
    config, said = external.with_towers(config, opened.teachers)
    notes += said
    start, draws_sentences = replace(start, model=config.model), config.data.captions == "sentences"
    if not aligns:  # it draws whole captions, and those of the pairs that it could encode
        captions, said = caption_draw(config, training)
        notes += said
        if config.align != AlignConfig():
            notes.append("align.*: no effect, since protoclip align alone aligns halves")
    if outline.choices is None and config.model.frozen_batch_norm:  # finetune asks it of any towers
        notes += without_batch_norm(start)
    notes += sizes.captions_cut(training, start, sentences=None if aligns else draws_sentences)
    notes += opened.notes
    are_negatives = config.loss.positives == "pair" and config.loss.info_nce > 0
    # align makes one sample of them, and the emoji are bundled as they are
    if are_negatives and not aligns and not config.data.is_emoji:
        notes += sizes.shared_images(training)
    notes += trained_guards(config, opened.guards, training)
    notes += sources.notes(training)
    if config.run.evaluate and not opened.held_out and not opened.guards:
        notes.append("no evaluation at the end, since no pairs are held out")
    return config, captions, [*outline.notes, *notes]


def choose_few(samples: Pairs | SampleStream, config: Config) -> Pairs:
    """The pairs that `run.overfit` learns by heart, drawn evenly.

    Raises:
        ValueError: They cannot be drawn, or are to be shared by several ranks.
    """
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


def require_usable(config: Config, samples: Pairs) -> None:
    """Refuse pairs to train on if too many are in sources of which no sample can be used.

    Raises:
        ValueError: They are more than `data.max_bad_share` allows.
    """

    def read(source: Pairs, rows: Sequence[int], number: int) -> object:
        image = source.sample(int(rows[number])).image
        return dimensions(image, max_pixels=config.data.max_image_pixels)

    reasons, bad = list[ValueError](), 0
    for source, rows in samples.parts if config.data.max_bad_share < MOST_BAD else ():
        named = f"data.train: {source.name}"
        try:
            sources.require_readable(named, len(rows), partial(read, source, rows))
        except ValueError as error:
            reasons.append(error)
            bad += len(rows)
    if bad > config.data.max_bad_share * len(samples):
        raise reasons[0]


def idle(config: Config) -> list[str]:
    """Notes on settings that this device, or so many ranks, make slow or idle."""
    notes = []
    if config.run.precision == "fp16" and is_cpu(config.run.device):
        notes.append("run.precision: fp16 is slow on a CPU; auto is faster")
    part, share = config.episodes.micro_batch_size, config.episodes.batch_size // world_size()
    if part is not None and part >= share:
        notes.append(f"episodes.micro_batch_size: no effect: a rank has {share} pairs")
    return notes


def is_cpu(device: str) -> bool:
    """Whether a device is the CPU. One that is named need not be here: the plan may be for another
    machine."""
    return device == "cpu" or (device == "auto" and collectives.device(device).type == "cpu")


def without_batch_norm(start: Start) -> list[str]:
    """A note if a start's towers have none, so that there is nothing to freeze."""
    parts = start.build(on_meta=True).towers.modules()
    if any(isinstance(part, _BatchNorm) for part in parts):
        return []
    return ["model.frozen_batch_norm: no effect, since the towers have no BatchNorm"]


def contents(
    plan: Plan,
    teachers: Mapping[str, Whitens],
    start: TowerPair | Mapping[str, Tensor],
) -> dict[str, list[Facts]]:
    """Fingerprints of what a run reads, by kind: `sources` of the pairs to train on, `validation`
    if it is a source, `teachers` that are stored, and the `start`.

    Args:
        teachers: By name; those that the run makes of its start or its halves follow from these.
        start: This start at the run's sizes, or its weights; none where nothing needs them.
    """
    encoded = None if plan.encoded_from is None else plan.samples
    samples = plan.encoded_from or plan.samples
    of_sources = zip(content(samples, encoded=encoded), samples.sources, strict=True)
    facts = {"sources": [facts_that_may_move(one, source) for one, source in of_sources]}
    images = plan.held_out[0].splits["validation"].images if plan.held_out else None
    is_source = isinstance(plan.config.data.validation, str)  # others follow from these or stay
    if is_source and isinstance(images, PairsView):
        facts["validation"] = content(images)
    stored = {name: each for name, each in teachers.items() if isinstance(each, StoredFeatures)}
    facts["teachers"] = [{"name": name, **each.content} for name, each in stored.items()]
    weights = start.state_dict() if isinstance(start, TowerPair) else start
    facts["start"] = [{"weights": weights_key(weights)}] if weights else []
    return facts


def weights_key(start: Mapping[str, Tensor]) -> str:
    """Of a start's towers, but for what machines make with other last digits.

    That are embeddings of positions, which they interpolate, and what a run adds, such as LoRA.
    """
    raw = {
        name: checksum(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in start.items()
        if name.startswith("towers.") and "pos" not in name and "lora_" not in name
    }
    return checksum(to_json(raw).encode())


def fill(section: Section, values: Mapping[str, Any]) -> Section:
    """A section of the settings, with these values for what it leaves unset, or `auto`."""
    unset = {n: value for n, value in values.items() if getattr(section, n) in (None, "auto")}
    return replace(section, **unset)  # type: ignore[type-var]


def filled(config: Config, start: Start, samples: Pairs | SampleStream) -> tuple[Config, list[str]]:
    """Every unset setting by the training pairs and the model, and a note on each decision.

    An episode is the largest power of two that the pairs fill, at most 131,072 and at least a
    batch; so many for a stream, whose length is not known. A prototype stands for ten pairs.
    """
    notes = list[str]()
    model, data = config.model, config.data
    open_size, open_length = model.leaves_image_size_open, model.leaves_context_length_open
    if open_size or open_length:
        size, length, reason = sizes.size_and_length(
            samples, max_image_pixels=data.max_image_pixels
        )
        if open_size:
            model = replace(model, image=replace(model.image, size=size))
            notes.append(f"model.image.size = {size}, {reason}")
        if open_length:
            model = replace(model, text=replace(model.text, context_length=length))
            notes.append(f"model.text.context_length = {length}, {reason}")
    start = replace(start, model=model)
    if start.is_small:  # towers that timm or `transformers` knows have sizes
        size, length = start.sizes["image_size"], start.sizes["context_length"]
        image, text = replace(model.image, size=size), replace(model.text, context_length=length)
        model = replace(model, image=image, text=text)
    prototypes = fill(config.prototypes, {"source": config.prototype_source})
    config = replace(config, model=model, prototypes=prototypes)
    config, said = with_episodes(config, samples)
    kind = start.tower_kind
    is_untrained = kind is None and config.run.overfit is None  # which transforms none
    suits = choose_augmentation(model.image.size or 0, is_untrained=is_untrained)
    if data.augmentation == "auto" and suits != "light":
        above = f"above {SMALL_IMAGE_SIZES[0]} pixels"
        notes.append(f"data.augmentation = {suits}, for small towers {above}")
    config = replace(config, data=fill(data, {"augmentation": suits}))
    values = optim.defaults(config, kind)
    if kind is not None:
        name = model.name or model.start or model.image.name
        said += [
            f"optim.{setting} = {value}, from {name} at batch {config.episodes.batch_size}"
            for setting, value in values.items()
            if getattr(config.optim, setting) is None
            and (setting != "locked_learning_rate" or config.locked_episodes)
        ]
        if model.has_start and config.optim.learning_rate is None:
            said.append("optim.learning_rate suits new weights; protoclip finetune has lower ones")
    return replace(config, optim=fill(config.optim, values)), notes + said


def with_episodes(config: Config, samples: Pairs | SampleStream) -> tuple[Config, list[str]]:
    """The size and number of episodes, the numbers of prototypes, and notes on these."""
    notes, rows = list[str](), len(samples) if isinstance(samples, Pairs) else None
    size = config.episodes.size
    if size is None:
        size = sizes.episode_size(rows, config.episodes.batch_size)
        of = "a stream" if rows is None else f"{rows:,} pairs"
        notes.append(f"episodes.size = {size}, for {of}")
    count = sizes.number_of_episodes(rows, size, config.episodes.batch_size)
    count = max(count, config.episodes.warm_up + config.locked_episodes + 1)
    chosen = {"prototypes": config.prototypes.number} if config.groups_modalities else {}
    chosen |= {name: teacher.number for name, teacher in config.grouping_teachers.items()}
    # Captions are read for a number that is used.
    unset = [f"{name}.number" for name, number in chosen.items() if number is None]
    usual = sizes.number_of_prototypes(size, samples if unset else None)
    if unset:
        few = usual < size // sizes.PAIRS_A_PROTOTYPE
        reason = "since captions repeat" if few else "a tenth of an episode"
        notes.append(f"{' and '.join(unset)} = {usual}, {reason}")
    return with_sizes(config, size, count, usual), notes


def with_sizes(config: Config, size: int, count: int, number: int) -> Config:
    """The settings with these of episodes, and this number of prototypes, where they are unset."""
    return replace(
        config,
        episodes=fill(config.episodes, {"size": size, "count": count}),
        prototypes=fill(config.prototypes, {"number": number}),
        teacher=fill(config.teacher, {"number": number}),
        teachers=[fill(teacher, {"number": number}) for teacher in config.teachers],
    )


def check_metrics(
    config: Config, held_out: Sequence[EvaluationData], watched: Sequence[EvaluationData]
) -> None:
    """Refuse a metric that no evaluation of this run gives, or of which higher is not better."""
    known = [name for data in held_out for name in list_metrics(data)]
    for data in watched:
        split = "validation" if "validation" in data.splits else "test"
        known += list_metrics(data, split, quick=True)
    better = [name for name in known if is_share(name.split("/", 2)[2])]
    for setting in ("keep_best", "stop_by"):
        metric = getattr(config.run, setting)
        if metric is None or metric in better:
            continue
        close = difflib.get_close_matches(metric, better, n=3, cutoff=0.0) or ["none"]
        if metric in known:
            other = f"choose another, such as {close[0]}" if better else "leave it out"
            raise ValueError(f"run.{setting}: higher is not better of {metric}; {other}")
        raise ValueError(f"run.{setting}: no metric {metric!r}; the closest are {', '.join(close)}")
