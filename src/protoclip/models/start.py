"""What a model starts from: its towers and tokenizer, described, and weights that are read later.

Each kind of start is a constructor, by a reference such as `protoclip.load` takes, and a class that
says how its weights are read. `resolve_start` finds that of a `[model]` section, which names a
start, or a model of open_clip, or an image tower and a text tower: timm's, one of Hugging Face, a
small new one, or that of a model that `protoclip.load` opens.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import open_clip
import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from timm import is_model
from torch import Tensor, nn

from protoclip.config import (
    SEVERAL,
    SMALL_CONTEXT_LENGTHS,
    SMALL_IMAGE_SIZES,
    HeadConfig,
    ImageTowerConfig,
    ModelConfig,
    TextTowerConfig,
    flatten,
)
from protoclip.data.bands import Bands, Ranges
from protoclip.files import read_json, read_local
from protoclip.models import open_clip as open_clip_models
from protoclip.models import timm, transformers
from protoclip.models.checkpoint import (
    MODEL,
    TEXT_FILES,
    WEIGHTS,
    find_checkpoint,
    model_config,
    model_json,
    read_tensors,
    require_intact,
)
from protoclip.models.joined import AUTO, LAST, PLAIN, JoinedImageEncoders, JoinedTextEncoders
from protoclip.models.open_clip import TowerKind, find_config, find_weights, tower_kind
from protoclip.models.opening import (
    HUGGING_FACE_CONFIG,
    OPEN_CLIP_CONFIG,
    ImageTransform,
    Loaded,
    RememberingTokenizer,
    Tokenizer,
    hub_name,
    readable_errors,
    require_safetensors,
)
from protoclip.models.protoclip import (
    PROJECTIONS,
    ProtoCLIP,
    TowerPair,
    evaluation_transform,
    image_input,
    image_size,
    projection_head,
    seed_weights,
)
from protoclip.terminal import say

# Settings that a start does not decide: weights are brought to other sizes.
SIZES = ("image.size", "image.channels", "text.context_length")
# Settings of how a run trains, whatever it starts from.
TRAINING = ("locked", "lora", "frozen_batch_norm")
Modality = Literal["image", "text"]
Tower = TypeVar("Tower", ImageTowerConfig, TextTowerConfig)
PARTS = {"image": "visual.", "text": "text."}  # how the names of a tower's weights begin


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model to start from or to open, which is there; its weights are unread."""

    reference: str  # as messages name it, with the setting that brought it
    model: ModelConfig  # the `[model]` section that builds a model from it, once it is resolved
    own: ModelConfig  # that section at the sizes that the weights have, and with their heads
    # What describes the towers in `model.json`: the content of open_clip's `open_clip_config.json`,
    # or the settings of `transformers`. None where `model` says it all, as of small towers and of
    # open_clip's models by name.
    towers_json: Mapping[str, Any] | None = None
    # Folder of a Hugging Face text tower, which else is looked up by its name.
    text_files: Path | None = None
    # Folder or hub name of the tokenizer, which else is looked up by its name.
    tokenizer_source: str | None = None
    checkpoint: Path | None = None  # the checkpoint folder of a model of ours
    has_heads: bool = False  # whether it has projection heads, as runs have
    has_weights: bool = True  # whether it has weights of its own for the whole model
    squashes: bool = False  # whether images are evaluated squashed to squares, as of `ProtoCLIP`
    ranges: Ranges | None = None  # those of the bands of images; None before they are measured
    notes: tuple[str, ...] = ()  # for the user

    def read_weights(self, pair: TowerPair) -> None:
        """Give a new model of this start, at its own sizes, its weights."""
        raise NotImplementedError

    def open(self) -> Loaded:
        """The model at its own sizes, in evaluation mode on the CPU; its transform, its tokenizer.

        A model of another library is as that library has it.
        """
        pair = self.open_pair()
        for note in self.notes:
            say(f"note: {note}")
        if self.checkpoint is None:
            transform: ImageTransform = open_clip_models.image_transform(pair.towers)
        else:
            transform = evaluation_transform(pair)
        return pair.eval(), transform, replace(self, model=self.own).tokenizer()

    def open_pair(self) -> TowerPair:
        """The model at its own sizes with its weights; new ones are those of seed 0.

        It has projection heads only if the start has any.
        """
        start = replace(self, model=self.own)
        with seed_weights(0):
            if self.has_heads:
                pair: TowerPair = start.build()
            else:
                pair = TowerPair(start.build_towers(), squashes=self.squashes)
        self.read_weights(pair)
        return pair

    def with_plain_towers(self) -> "Start":
        """The same with an encoder as its library has it, where its last layer alone is joined.

        It has the same weights. Its vectors in the joint space are the same, except their norm.
        """
        model, own = (set_layers(section, LAST, PLAIN) for section in (self.model, self.own))
        return replace(self, model=model, own=own)

    def trainable(self) -> "Start":
        """The same with the towers that training gives it, which opening it does not need."""
        return self

    def build(self, *, on_meta: bool = False) -> ProtoCLIP:
        """The model with weights from torch's global generator, or without any on the meta device.

        Raises:
            ValueError: The towers cannot have the sizes of `model`.
        """
        with torch.device("meta") if on_meta else nullcontext():
            built = ProtoCLIP(
                self.build_towers(pretrained_text=not (on_meta or self.has_weights)),
                projection_head(self.embed_dim, self.model.heads),
                joins_encoders=self.model.joins_encoders,
                squashes=self.squashes,
            )
            if self.has_logit_bias:
                built.add_logit_bias()
        return built

    def fill(self, built: ProtoCLIP) -> list[str]:
        """Give a model of `build` the weights of the start; returns notes on what was resized."""
        sizes, own_sizes = (
            (section.image.size, section.text.context_length) for section in (self.model, self.own)
        )
        if self.has_weights and sizes != own_sizes:
            name = self.model.start or f"{self.model.name}/{self.model.pretrained}"
            return adopt(built, self.open_pair(), name=name)
        self.read_weights(built)
        return []

    def build_towers(self, *, pretrained_text: bool = False) -> nn.Module:
        """New towers at the sizes of `model`."""
        if len(self.parts) > 1:
            pairs: list[Any] = [part.build_towers() for part in self.parts]
            if number := self.model.image.name.count(SEVERAL):
                images = [pair.visual for pair in pairs[: number + 1]]
                pairs[0].visual = JoinedImageEncoders(images, self.embed_dim)
            if number := str(self.model.text.name).count(SEVERAL):
                texts = [pair.text for pair in pairs[: number + 1]]
                pairs[0].text = JoinedTextEncoders(texts, self.embed_dim)
            return pairs[0]  # type: ignore[no-any-return]
        described = self.describe()
        if "transformers" in described:
            built: nn.Module = transformers.build_library_towers(described, **self.sizes)
        else:
            with self._explain_errors():
                name = self.model.image.name if self.is_small else "this model"
                built = open_clip_models.build_towers(
                    described["model_cfg"],
                    described.get("preprocess_cfg", {}),
                    **self.sizes,
                    name=self.model.name or name,
                    pretrained_text=pretrained_text,
                )
        channels = self.model.image.channels
        if channels != 3 or self.ranges:
            bands = Bands(channels, tuple(map(tuple, self.ranges or ())))
            open_clip_models.set_bands(built, bands, self.reference)
        return built

    def tokenizer(self) -> Tokenizer:
        if number := str(self.model.text.name).count(SEVERAL):
            joined = transformers.JoinedTokenizer([p.tokenizer() for p in self.parts[: number + 1]])
            return RememberingTokenizer(joined)
        described, length = self.describe(), self.sizes["context_length"]
        with self._explain_errors():
            if "transformers" in described:
                name, config = str(self.tokenizer_source), self.library_config
                return transformers.open_tokenizer(name, config, context_length=length)
            text, source = described["model_cfg"]["text_cfg"], self.tokenizer_source
            return open_clip_models.open_clip_tokenizer(text, context_length=length, source=source)

    def describe(self) -> dict[str, Any]:
        """`towers_json`, or the same of the towers that `model` describes.

        A text tower and its tokenizer are in `text_files` if there are any, whatever they are
        called where the model was made.
        """
        name, tag = self.model.name, self.model.pretrained
        if len(self.parts) > 1:
            return self.parts[0].describe()
        if self.towers_json is not None:
            described = deepcopy(dict(self.towers_json))
        elif name is None:
            image, text = self.model.image, self.model.text
            sizes: dict[str, Any] = {n: getattr(text, n) for n in ("width", "heads", "layers")}
            if text.name is not None:
                sizes = {
                    **dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), self.text_source),
                    "hf_proj_type": self.model.projection,
                    "hf_pooler_type": transformers.name_pooler(
                        transformers.text_config(text.name, self.text_source),
                        text.pooling,
                        is_joined=text.joined_layers not in (None, PLAIN),
                    ),
                }
            vision = {
                "timm_model_name": image.name,
                "timm_pool": "" if image.pooling == "own" else "avg",
                "timm_proj": self.model.projection,
            }
            for part, layers in ((vision, image.joined_layers), (sizes, text.joined_layers)):
                part |= {"joined_layers": layers} if layers not in (None, PLAIN) else {}
            config = {"embed_dim": self.model.embed_dim, "vision_cfg": vision, "text_cfg": sizes}
            described = {"model_cfg": config}
            if image.weights is not None:  # which know images normalised in their way
                own = timm.timm_settings(image.name)
                described["preprocess_cfg"] = {"mean": own.mean, "std": own.std}
        else:
            published = {} if tag is None else find_weights(name, tag)
            described = {"model_cfg": find_config(name), "preprocess_cfg": published}
            if published.get("quick_gelu"):  # which the name of the model does not say
                described["model_cfg"]["quick_gelu"] = True
        if self.text_files is not None and "model_cfg" in described:
            text = described["model_cfg"]["text_cfg"]
            names = {"hf_model_name", "hf_tokenizer_name"} & text.keys()
            text |= dict.fromkeys(names, str(self.text_files))
        return described

    @property
    def parts(self) -> list["Start"]:
        """A start for each of the encoders that a small model joins."""
        models = split_encoders(self.model) if self.is_small else [self.model]
        if len(models) == 1:
            return [self]
        parts = [replace(self, model=model) for model in models]
        if (files := self.text_files) is None:
            return parts
        several = SEVERAL in str(self.model.text.name)
        texts = [(part, files / str(n) if several else files) for n, part in enumerate(parts)]
        return [replace(part, text_files=f, tokenizer_source=str(f)) for part, f in texts]

    @property
    def open_clip_config(self) -> dict[str, Any] | None:
        """open_clip's configuration of the towers; None if they are those of `transformers`."""
        return self.describe().get("model_cfg")

    @property
    def library_config(self) -> Any:
        """The configuration of a model of `transformers`; None for towers of open_clip."""
        described = self.towers_json or {}
        return transformers.config_of(described) if "transformers" in described else None

    @property
    def description(self) -> dict[str, Any]:
        """What `model.json` says of a model that is built from it."""
        content = model_json(self.model, self.towers_json, squashes=self.squashes)
        return content | ({"ranges": self.ranges} if self.ranges else {})

    @property
    def is_small(self) -> bool:
        """Whether `model` describes the towers, part by part."""
        return self.towers_json is None and self.model.name is None

    @property
    def text_source(self) -> str:
        """Where a small model's Hugging Face text tower is; "" if it has none."""
        return str(self.text_files or transformers.text_source(self.model.text.name))

    @property
    def sizes(self) -> dict[str, Any]:
        """`image_size` in pixels and `context_length` in tokens; None for the towers' own."""
        image, text = self.model.image, self.model.text
        if not self.is_small:
            return {"image_size": image.size, "context_length": text.context_length}
        size, length = SMALL_IMAGE_SIZES[0], SMALL_CONTEXT_LENGTHS[0]
        if image.weights is not None:
            size = timm.timm_settings(image.name.partition(SEVERAL)[0]).input_size[-1]
        if text.name is not None:
            sources = [(p.model.text.name, p.text_source) for p in self.parts if p.model.text.name]
            configs = [transformers.text_config(*source) for source in sources]
            length = min(transformers.NAMED_CONTEXT_LENGTH, *map(transformers.max_tokens, configs))
        return {"image_size": image.size or size, "context_length": text.context_length or length}

    @property
    def context_length(self) -> int:
        """How many tokens captions are cut to."""
        return self.sizes["context_length"] or int(self.tokenizer()(["a"]).shape[1])

    @property
    def tower_kind(self) -> TowerKind | None:
        """The kind of the image tower; None for small towers that start untrained."""
        if self.is_small and self.model.image.weights is None and self.model.text.name is None:
            return None
        if (config := self.library_config) is None:
            return tower_kind((self.open_clip_config or {})["vision_cfg"])
        vision = config.vision_config
        if vision.model_type == "timm_wrapper":
            return tower_kind({"timm_model_name": vision.architecture})
        return "transformer" if hasattr(vision, "num_attention_heads") else "convolutional"

    @property
    def embed_dim(self) -> int:
        """Width of the joint space."""
        if (config := self.library_config) is None:
            return int((self.open_clip_config or {})["embed_dim"])
        if config.model_type == transformers.MASKED_KIND:
            return int(config.projection_dim)
        text = config.text_config
        return int(getattr(text, "projection_size", text.hidden_size))

    @property
    def has_logit_bias(self) -> bool:
        """Whether the model has the bias of the sigmoid loss."""
        if self.is_small:
            return False
        described = self.describe()
        if "transformers" in described:
            return bool(transformers.config_of(described).model_type == "siglip")
        return described["model_cfg"].get("init_logit_bias") is not None

    @property
    def heads_are_new(self) -> bool:
        """Whether it has no projection heads, or heads that never trained."""
        return not self.has_heads

    def _explain_errors(self) -> AbstractContextManager[None]:
        """Turns what libraries raise into a line; they may ask the hub for a text tower."""
        if self.is_small:  # whose files were asked for before
            name = self.model.text.name
            return readable_errors(self.reference if name is None else f"model.text.name: {name}")
        repository: str | None = ""
        if self.text_files is None:
            named, config = hub_name(str(self.tokenizer_source)), self.open_clip_config
            repository = open_clip_models.text_repository(config) if config else named
        return readable_errors(self.reference, repository or "")


def adopt(built: ProtoCLIP, source: TowerPair, *, name: str) -> list[str]:
    """Load the weights of `source`, whose position embeddings are interpolated if need be.

    The heads stay new if `source` has none. `source` cannot be used afterwards. Returns a note on
    each modality whose position embeddings were interpolated.
    """
    expected, state = built.state_dict(), source.state_dict()
    changed = {
        key for key in state.keys() & expected.keys() if state[key].shape != expected[key].shape
    }
    size, size_before = (image_size(pair.towers) for pair in (built, source))
    if size != size_before:
        open_clip_models.set_trunk_size(source.towers, size, name)
    weights = source.towers.state_dict()
    if isinstance(built.towers, transformers.HuggingFaceTowers):
        transformers.interpolate_positions(weights, built.towers)
    else:
        open_clip_models.interpolate_positions(weights, built.towers)
    whole = {**source.state_dict(), **{f"towers.{key}": value for key, value in weights.items()}}
    if not isinstance(source, ProtoCLIP):
        whole |= {key: value for key, value in expected.items() if not key.startswith("towers.")}
    built.load_state_dict(whole)
    notes = []
    if size != size_before and any(key.startswith("towers.visual.") for key in changed):
        notes.append(
            f"model.image.size: position embeddings of {name} interpolated, from {size_before} to "
            f"{size} pixels"
        )
    if texts := [key for key in changed if not key.startswith("towers.visual.")]:
        length, length_before = len(expected[texts[0]]), len(state[texts[0]])
        notes.append(
            f"model.text.context_length: position embeddings of {name} interpolated, from "
            f"{length_before} to {length} tokens"
        )
    return notes


@dataclass(frozen=True, kw_only=True)
class RunStart(Start):
    """A run or checkpoint folder."""

    @property
    def file(self) -> Path:
        assert self.checkpoint is not None
        return self.checkpoint / WEIGHTS

    def read_weights(self, pair: TowerPair) -> None:
        require_intact(self.file.parent, WEIGHTS)
        pair.load_state_dict(read_tensors(self.file))

    @property
    def heads_are_new(self) -> bool:
        """Both heads begin alike, and stay so in a run without prototypes, such as `align`.

        Only their BatchNorm statistics move there.
        """
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        image, text = (read_tensors(self.file, f"{name}_head.") for name in ("image", "text"))
        return all(
            torch.equal(image[name], text[name.replace("image", "text", 1)])
            for name in image
            if not name.endswith(statistics)
        )

    @property
    def has_logit_bias(self) -> bool:
        """The sigmoid loss adds it to any towers."""
        return bool(read_tensors(self.file, "towers.logit_bias"))


def run_start(reference: str) -> RunStart:
    """A run or checkpoint folder; its weights are not read."""
    folder = find_checkpoint(reference)
    text = folder / TEXT_FILES
    # Systems add hidden files to copied folders.
    files = (path for path in text.rglob("[!.]*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    require_intact(folder, MODEL, *names)
    content = read_json(folder / MODEL)
    model = model_config(content, folder)
    return RunStart(
        reference=reference,
        model=model,
        own=model,
        towers_json=content.get("open_clip", content.get("hugging_face")),
        text_files=text if names else None,
        tokenizer_source=str(text) if names else None,
        checkpoint=folder,
        has_heads=True,
        squashes=content.get("resize_mode") == "squash",
        ranges=content.get("ranges"),
    )


@dataclass(frozen=True, kw_only=True)
class OpenClipStart(Start):
    """A model of open_clip, with published weights, those of a file, or new ones."""

    file: Path | None = None

    def read_weights(self, pair: TowerPair) -> None:
        if not self.has_weights:
            return
        name, tag = self.own.name or OPEN_CLIP_CONFIG, self.own.pretrained
        published = {} if tag is None else find_weights(name, tag)
        repository = str(published.get("hf_hub", "").rpartition("/")[0])
        with readable_errors(self.reference, repository):
            file = self.file or open_clip.download_pretrained(published)
            open_clip.load_checkpoint(pair.towers, str(file))


def open_clip_start(reference: str, name: str) -> OpenClipStart:
    """`NAME/TAG`, `NAME/FILE` for weights in a file, or `NAME` for an untrained model."""
    name, _, tag = name.partition("/")
    find_config(name, reference)
    file = Path(tag) if Path(tag).is_file() else None
    published = find_weights(name, tag, reference) if tag and file is None else {}
    model = ModelConfig(name=name, pretrained=None if file else tag or None)
    return OpenClipStart(
        reference=reference,
        model=model,
        own=model,
        has_weights=bool(tag),
        squashes=published.get("resize_mode") == "squash",
        notes=() if tag else (f"{reference}: untrained; no weights are named",),
        file=file,
    )


def folder_start(reference: str, name: str) -> OpenClipStart:
    """A folder in open_clip's format, as its `local-dir:` reads it."""
    folder = Path(name)
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        raise ValueError(f"{reference}: no folder with {OPEN_CLIP_CONFIG}")
    files = [folder / name for name in open_clip_models.FILES if (folder / name).is_file()]
    if not files:  # the prototypes of an export are no weights
        names = [path.name for path in folder.iterdir() if path.suffix != ".safetensors"]
        require_safetensors(reference, names)
    with readable_errors(reference):
        description = dict(json.loads(read_local(folder / OPEN_CLIP_CONFIG)))
        text = description["model_cfg"]["text_cfg"]
        config = folder / HUGGING_FACE_CONFIG
        kind = json.loads(read_local(config)).get("model_type") if config.is_file() else None
        preprocessing = description.get("preprocess_cfg", {})
    has_text_files = text.get("hf_model_name") and kind in transformers.OPEN_CLIP_KINDS
    model = ModelConfig(start=reference)
    return OpenClipStart(
        reference=reference,
        model=model,
        own=model,
        towers_json=description,
        # Then `hf_model_name` may name a folder that is gone, as in one that was moved.
        text_files=folder if has_text_files else None,
        tokenizer_source=str(folder),
        squashes=preprocessing.get("resize_mode") == "squash",
        file=files[0],
    )


@dataclass(frozen=True, kw_only=True)
class TransformersStart(Start):
    """A model of `transformers`, by its folder or its name on the hub."""

    name: str

    def open(self) -> Loaded:
        with readable_errors(self.reference, hub_name(self.name)), seed_weights(0):
            return transformers.open_model(self.name)

    def open_pair(self) -> TowerPair:
        pair, _, tokenizer = self.open()
        assert isinstance(pair.towers, transformers.HuggingFaceTowers)
        if pair.towers.kind != "clip":
            return pair
        eos = pair.towers.config.text_config.eos_token_id
        if not transformers.reads_as_clip(tokenizer, eos):
            raise ValueError(f"{self.reference}: its tokenizer is not CLIP's")
        towers = replace(self, model=self.own).build_towers()
        towers.load_state_dict(transformers.convert_weights(pair.towers))
        return TowerPair(towers)

    def fill(self, built: ProtoCLIP) -> list[str]:
        return adopt(built, self.open_pair(), name=str(self.model.start))

    def trainable(self) -> "TransformersStart":
        towers_json = transformers.describe_towers(self.reference, self.name)
        squashes = towers_json["preprocess_cfg"].get("resize_mode") == "squash"
        return replace(self, towers_json=towers_json, tokenizer_source=self.name, squashes=squashes)


def transformers_start(reference: str, name: str) -> TransformersStart:
    if Path(name).is_dir():
        require_safetensors(reference, [path.name for path in Path(name).iterdir()])
    model = ModelConfig(start=reference)
    return TransformersStart(reference=reference, model=model, own=model, name=name)


# How the reference code names what is not a tower.
REFERENCE_NAMES = {
    "image_projection_head.": "image_head.",
    "text_projection_head.": "text_head.",
    "logit_scale_proto": "prototype_logit_scale",
}


class ReferenceStart(OpenClipStart):
    """A checkpoint of the paper's reference code, of a model of open_clip.

    Without projection heads in the file, as for the code's CLIP baselines, the model has none.
    """

    def read_weights(self, pair: TowerPair) -> None:
        assert self.file is not None
        weights = reference_weights(self.reference, self.file)
        if isinstance(pair, ProtoCLIP) and not self.has_heads:
            others = pair.state_dict().items()
            weights |= {name: value for name, value in others if not name.startswith("towers.")}
        with readable_errors(self.reference):
            pair.load_state_dict(weights)


def reference_start(reference: str, location: str) -> ReferenceStart:
    """`FILE,model=NAME`; the code gives QuickGELU to all towers that are not timm's."""
    file, separator, name = location.rpartition(",model=")
    if not separator:
        raise ValueError(f"{reference}: name its model too, as in reference:FILE,model=RN50")
    config = find_config(name, reference)
    if not Path(file).is_file():
        raise ValueError(f"{reference}: no such file")
    if "timm_model_name" not in config["vision_cfg"]:
        config["quick_gelu"] = True
    weights = reference_weights(reference, Path(file))
    layers = [weights.get(f"image_head.{number}.weight") for number in (0, 3)]
    widths = [len(layer) for layer in layers if layer is not None and layer.ndim]
    model, has_heads = ModelConfig(name=name), len(widths) == 2
    if has_heads:
        heads = HeadConfig(hidden_layers=1, hidden_dim=widths[0], projection_dim=widths[1])
        model = replace(model, heads=heads)
    return ReferenceStart(
        reference=reference,
        model=model,
        own=model,
        towers_json={"model_cfg": config, "preprocess_cfg": {}},
        has_heads=has_heads,
        file=Path(file),
    )


def reference_weights(reference: str, file: Path) -> dict[str, Tensor]:
    """The weights by our names."""
    with readable_errors(reference):
        content = torch.load(file, map_location="cpu", weights_only=True)
        content = dict(content.get("state_dict", content))
        if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            raise ValueError("holds more than tensors by name")
    weights: dict[str, Tensor] = {}
    for name, value in content.items():
        key = name.removeprefix("module.")
        theirs = next((prefix for prefix in REFERENCE_NAMES if key.startswith(prefix)), "")
        weights[REFERENCE_NAMES.get(theirs, "towers.") + key.removeprefix(theirs)] = value
    return weights


KINDS: Mapping[str, Callable[[str, str], Start]] = {
    "open_clip": open_clip_start,
    "local-dir": folder_start,
    "hf": transformers_start,
    "reference": reference_start,
}


def find_start(reference: str) -> Start:
    """The start that a reference names, as `protoclip.load` takes it."""
    kind, _, name = reference.partition(":")
    if name and kind in KINDS:
        return KINDS[kind](reference, name)
    if (Path(reference) / OPEN_CLIP_CONFIG).is_file():
        return folder_start(reference, reference)
    if (Path(reference) / HUGGING_FACE_CONFIG).is_file():
        return transformers_start(reference, reference)
    return run_start(reference)


def resolve_start(section: ModelConfig) -> Start:
    """The start of a `[model]` section, with all that follows from it and notes for the user.

    Settings that are at their default follow; sizes may be given, and heads if the start has none.

    Raises:
        ValueError: There is no such model, it cannot be trained, or a setting contradicts it.
    """
    reference, name = section.start, section.name
    # As in `align`, `timm:` may stand before the name of each image encoder.
    names = [name.removeprefix("timm:") for name in section.image.name.split(SEVERAL)]
    image = replace(section.image, name=SEVERAL.join(names))
    section = replace(section, image=image)
    if reference is None and name is None:
        joins = names_model("image", image.name) or names_model("text", section.text.name)
        return join_towers(section) if joins else small_start(section)
    if name and reference and reference.startswith("reference:") and ",model=" not in reference:
        reference = f"{reference},model={name}"
    setting = f"model.start: {reference}"
    if reference is None:
        setting = f"model.name: {name}" + (f"/{section.pretrained}" if section.pretrained else "")
        start: Start = open_clip_start("model.name", f"{name}/{section.pretrained or ''}")
        start = replace(start, model=section, notes=())
    else:
        try:
            start = find_start(reference).trainable()
            start = replace(start, model=follow_start(replace(section, start=reference), start))
        except ValueError as error:
            if str(error).startswith("model."):
                raise
            raise ValueError(f"model.start: {error}") from error
        if isinstance(start, OpenClipStart) and start.file is None:
            start = replace(start, model=replace(start.model, start=None))  # name and tag say it
    if "multimodal_cfg" in (start.open_clip_config or {}):
        raise ValueError(f"{setting} is a CoCa, whose decoder cannot be trained here")
    notes = tuple(f"model.start: {note}" for note in start.notes)
    return replace(start, reference=setting, notes=notes)


def follow_start(section: ModelConfig, start: Start) -> ModelConfig:
    """The settings that follow from a start, at the given sizes, with its heads if it has any."""
    own, has_heads = start.own, start.has_heads
    defaults, own_by_name = flatten(asdict(ModelConfig())), flatten(asdict(own))
    for name, value in flatten(asdict(section)).items():
        free = name in ("start", *SIZES, *TRAINING)
        free = free and (name != "image.channels" or own.image.channels == 3)
        free = free or (name.startswith("heads.") and not has_heads)
        if not free and value not in (defaults[name], own_by_name[name]):
            raise ValueError(
                f"model.{name}: {value} does not go with model.start = {section.start}, which has "
                f"{own_by_name[name]}; leave it out"
            )
    size = section.image.size or own.image.size
    channels = choose_channels(section, own)
    length = section.text.context_length or own.text.context_length
    return replace(
        own,
        start=section.start,
        image=replace(own.image, size=size, channels=channels),
        text=replace(own.text, context_length=length),
        heads=own.heads if has_heads else section.heads,
        **{name: getattr(section, name) for name in TRAINING},
    )


def choose_channels(section: ModelConfig, own: ModelConfig) -> int:
    """The bands that a start reads, which RGB weights can be widened to."""
    widens = own.image.channels == ImageTowerConfig().channels
    return section.image.channels if widens else own.image.channels


class SmallTowers(Start):
    """timm's image tower and a small or a Hugging Face text tower; each brings its own weights."""

    def build_towers(self, *, pretrained_text: bool = True) -> nn.Module:
        """The towers with the weights that `model` names; without any on the meta device."""
        image, text, size = self.model.image, self.model.text, self.sizes["image_size"]
        built: Any = super().build_towers()
        if len(self.parts) > 1:
            return built  # type: ignore[no-any-return]
        trunk = built.visual.trunk
        if getattr(trunk, "head_hidden_size", trunk.num_features) != trunk.num_features:
            raise ValueError(
                f"model.image.name: {image.name} widens its features in its head, which open_clip "
                "does not project; choose another, such as resnet10t or mobilenetv2_050"
            )
        if built.logit_scale.is_meta:
            return built  # type: ignore[no-any-return]
        if image.weights is not None:
            pool = "" if image.pooling == "own" else "avg"
            trunk.load_state_dict(timm.read_image_weights(image.name, image.weights, size, pool))
        if text.name is not None:
            with transformers.explain_errors(text.name, self.text_source):
                config = transformers.transformers_config(self.text_source)
                opener, settings = transformers.text_opener(config)
                encoder = transformers.read_library_model(self.text_source, opener, **settings)
            built.text.transformer.load_state_dict(encoder.state_dict())
        return built  # type: ignore[no-any-return]

    def fill(self, built: ProtoCLIP) -> list[str]:
        return []  # the towers were built with their weights


def split_tower(tower: Tower) -> list[Tower]:
    """The settings of each encoder of a tower; several are joined by their last layers at least."""
    number = len((tower.name or "").split(SEVERAL))
    if number == 1:
        return [tower]
    if tower.joined_layers in (None, "plain"):
        tower = replace(tower, joined_layers="last")
    parts: list[Any] = [{} for _ in range(number)]
    for name in {"name", "weights", "pooling", "joined_layers"} & vars(tower).keys():
        values = (getattr(tower, name) or "").split(SEVERAL)
        if len(values) not in (1, number):
            setting = f"model.{'image' if isinstance(tower, ImageTowerConfig) else 'text'}.{name}"
            raise ValueError(f"{setting}: {len(values)} values for {number} encoders")
        for part, value in zip(parts, values * number, strict=False):
            part[name] = value or None
    return [replace(tower, **part) for part in parts]


def split_encoders(model: ModelConfig) -> list[ModelConfig]:
    """The settings of a model for each encoder of a tower; the usual ones where one has fewer."""
    images, texts = split_tower(model.image), split_tower(model.text)
    images += [ImageTowerConfig()] * (len(texts) - len(images))
    texts += [TextTowerConfig()] * (len(images) - len(texts))
    pairs = zip(images, texts, strict=True)
    return [replace(model, image=image, text=text) for image, text in pairs]


def small_start(section: ModelConfig) -> SmallTowers:
    """The start of a section that describes the towers, with each tower's way of pooling."""
    ways = [
        timm.find_pooling(image.name, image.pooling, has_weights=image.weights is not None)
        for image in split_tower(section.image)
    ]
    section = replace(section, image=replace(section.image, pooling=SEVERAL.join(ways)))
    if section.text.name is not None:
        texts = [(text.pooling, str(text.name)) for text in split_tower(section.text)]
        pooling = [given or transformers.find_pooling(name) for given, name in texts]
        section = replace(section, text=replace(section.text, pooling=SEVERAL.join(pooling)))
    return SmallTowers(reference=section.image.name, model=section, own=section)


def set_layers(section: ModelConfig, before: str, after: str) -> ModelConfig:
    """The section with other `joined_layers` of each tower that has those `before`."""
    for name, tower in (("image", section.image), ("text", section.text)):
        if tower.joined_layers == before:
            section = replace(section, **{name: replace(tower, joined_layers=after)})  # type: ignore[arg-type]
    return section


def names_model(modality: Modality, name: str | None) -> bool:
    """Whether the name of a tower is that of a whole model, which `protoclip.load` takes."""
    if not name:
        return False
    if SEVERAL in name:
        for one in filter(partial(names_model, modality), name.split(SEVERAL)):
            raise ValueError(f"model.{modality}.name: {one}: joins no other encoder; name it alone")
        return False
    kind, _, rest = name.partition(":")
    may_be_text_model = modality == "text" and kind == "hf"
    if rest and kind in KINDS and not may_be_text_model:
        return True
    if modality == "image":
        # What timm's names stand for does not change with folders; ./NAME is a folder.
        return Path(name).is_dir() and not is_model(name.partition(".")[0])
    if name == transformers.MINILM:
        return False
    folder = Path(name.removeprefix("hf:"))
    is_hugging_face = (folder / HUGGING_FACE_CONFIG).is_file()
    if folder.is_dir() and ((folder / OPEN_CLIP_CONFIG).is_file() or not is_hugging_face):
        return True  # such as a run
    return hasattr(transformers.text_config(name), "vision_config")


@dataclass(frozen=True, kw_only=True)
class JoinedTowers(Start):
    """The image tower of one start and the text tower of another, with their weights.

    Their projections into a joint space are new.
    """

    image: Start
    text: Start

    def fill(self, built: ProtoCLIP) -> list[str]:
        towers = built.towers
        taken = {**self._weights("image", towers), **self._weights("text", towers)}
        towers.load_state_dict({**towers.state_dict(), **taken})
        return []

    def _weights(self, modality: Modality, towers: nn.Module) -> dict[str, Tensor]:
        """Weights of a tower without its projection, at the sizes of the towers that take them."""
        start = self.image if modality == "image" else self.text
        pair = start.build() if isinstance(start, SmallTowers) else start.open_pair()
        source: Any = pair.towers
        size = image_size(towers)
        if modality == "image" and size != image_size(source):
            open_clip_models.set_trunk_size(source, size, start.reference)
        weights: dict[str, Tensor] = source.state_dict()
        if not hasattr(source, "text"):  # open_clip's first models keep the text tower in parts
            outside = ("visual.", "logit_")
            weights = {
                name if name.startswith(outside) else f"text.{name}": value
                for name, value in weights.items()
            }
        # open_clip lets the classifier of some of timm's models project.
        trunk = getattr(source.visual, "trunk", None)
        inside = () if trunk is None else timm.classifier_names(trunk)
        projections = (*PROJECTIONS, *(f"visual.trunk.{name}" for name in inside))
        of_tower = {
            name: value
            for name, value in weights.items()
            if name.startswith(PARTS[modality]) and not name.startswith(projections)
        }
        open_clip_models.interpolate_positions(of_tower, towers)
        return of_tower


def join_towers(section: ModelConfig) -> JoinedTowers:
    """The start of a section of which a tower, or both, is of another model."""
    for modality in ("image", "text"):
        tower = getattr(section, modality)
        if tower.joined_layers not in (None, AUTO, PLAIN):
            raise ValueError(
                f"model.{modality}.joined_layers: layers are joined of a model of timm and a text "
                "model alone, not beside the tower of another model; leave it out"
            )
        section = replace(section, **{modality: replace(tower, joined_layers=None)})
    image, text = start_of_tower("image", section), start_of_tower("text", section)
    if isinstance(image, SmallTowers):
        section = replace(section, image=image.model.image)  # with its pooling
    image_gelu, vision_cfg = tower_config("image", image)
    text_gelu, text_cfg = tower_config("text", text)
    activations = {image_gelu, text_gelu} - {None}
    if len(activations) > 1:
        raise ValueError(
            f"model.text.name: {text.reference} and {image.reference} have different activations "
            "(GELU and QuickGELU), which open_clip's format cannot say of one model; take a timm "
            "image tower, or a Hugging Face text model"
        )
    towers = image.build(on_meta=True).towers
    preprocess = image_input(towers)
    preprocess.pop("bands", None)
    native_size, native_length = preprocess.pop("size"), int(text_cfg["context_length"])
    size = section.image.size or native_size
    channels = choose_channels(section, image.own)
    section = replace(section, image=replace(section.image, channels=channels))
    length = section.text.context_length or native_length
    config: dict[str, Any] = {
        "embed_dim": section.embed_dim,
        "custom_text": True,
        **({"quick_gelu": True} if activations == {True} else {}),
        "vision_cfg": {**vision_cfg, "image_size": native_size},
        "text_cfg": text_cfg,
    }
    # Sizes of a tower that starts untrained follow from the data.
    model = section
    if not isinstance(image, SmallTowers) or section.image.weights is not None:
        model = replace(model, image=replace(section.image, size=size))
    if not isinstance(text, SmallTowers) or section.text.name is not None:
        model = replace(model, text=replace(section.text, context_length=length))
    return JoinedTowers(
        # Libraries of towers read no more than the text tower.
        reference=f"model.text.name: {text.reference}",
        model=model,
        own=model,
        towers_json={"model_cfg": config, "preprocess_cfg": preprocess},
        text_files=text.text_files,
        tokenizer_source=text.tokenizer_source,
        squashes=image.squashes,
        ranges=image.ranges,
        image=image,
        text=text,
    )


def start_of_tower(modality: Modality, section: ModelConfig) -> Start:
    """The start that a tower is taken from: a whole model, or small towers of which it is one."""
    name = section.image.name if modality == "image" else section.text.name
    if not names_model(modality, name):
        if modality == "image":
            return small_start(ModelConfig(image=section.image))
        small = small_start(ModelConfig(text=section.text))
        small = replace(small, reference=name or "a small text transformer")
        if name is not None and Path(folder := transformers.text_source(name)).is_dir():
            small = replace(small, text_files=Path(folder), tokenizer_source=folder)
        return small
    assert name is not None
    if modality == "text" and ":" not in name and not Path(name).is_dir():
        name = f"hf:{name}"  # a dual encoder of the hub
    try:
        start = find_start(name).trainable()
    except ValueError as error:
        reason = str(error).removeprefix("model.start: ")
        raise ValueError(f"model.{modality}.name: {reason}") from error
    for setting in ("weights", "pooling") if modality == "image" else ():
        if getattr(section.image, setting) is not None:
            raise ValueError(f"model.image.{setting}: {name} has its own; leave it out")
    return start


def tower_config(modality: Modality, start: Start) -> tuple[bool | None, dict[str, Any]]:
    """Whether a tower has QuickGELU, None where that says nothing, and its part of `model_cfg`."""
    config = start.open_clip_config or {}
    part: dict[str, Any] = dict(config.get("vision_cfg" if modality == "image" else "text_cfg", {}))
    is_open_clips = not any(name.endswith("_model_name") for name in part)
    # open_clip's ResNets project within their pooling.
    has_none = part.get("proj_type") == "none" or part.get("output_tokens")
    has_none = has_none or (modality == "image" and isinstance(part.get("layers"), list))
    if not config or "multimodal_cfg" in config or (is_open_clips and has_none):
        instead = "a model of timm (it has DINOv2, ViT, SigLIP and CLIP's ResNets)"
        instead = instead if modality == "image" else "a text model such as minilm"
        raise ValueError(
            f"model.{modality}.name: {start.reference}: its tower ends in no linear projection "
            f"that open_clip can replace; name {instead}, or another CLIP"
        )
    if not is_open_clips and modality == "image":
        part |= {"timm_proj": "linear", "timm_model_pretrained": False}
    elif not is_open_clips:
        part |= {"hf_proj_type": "linear", "hf_model_pretrained": False}
        if isinstance(start, SmallTowers) or start.text_files is not None:
            # How it was named; the path of its files is of this machine.
            name = start.reference.removeprefix("hf:")
            part |= dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), name)
    if modality == "text":  # a run's length may differ from the published model's
        length = start.sizes["context_length"]
        part["context_length"] = length or part.get("context_length") or DEFAULT_CONTEXT_LENGTH
    return bool(config.get("quick_gelu")) if is_open_clips else None, part
