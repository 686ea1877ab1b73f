"""What a model starts from: its towers and tokenizer, described, and weights that are read later.

Each kind of start is a constructor, by a reference such as `protoclip.load` takes, and a class that
says how its weights are read. `resolve.py` has those of a `[model]` section.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import open_clip
import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor, nn

from protoclip.config import SMALL_CONTEXT_LENGTHS, SMALL_IMAGE_SIZES, HeadConfig, ModelConfig
from protoclip.data.transforms import evaluation_transform
from protoclip.files import read_local
from protoclip.models import open_clip as open_clip_models
from protoclip.models import text_models, timm, transformers
from protoclip.models.open_clip import (
    TowerKind,
    build_towers,
    find_config,
    find_weights,
    text_repository,
    tower_kind,
)
from protoclip.models.opening import (
    HUB_NAME,
    HUGGING_FACE_CONFIG,
    OPEN_CLIP_CONFIG,
    ImageTransform,
    Loaded,
    build_seeded,
    examples_of,
    hub_name,
    misfits,
    readable_errors,
    require_safetensors,
    require_weights,
)
from protoclip.models.protoclip import (
    ProtoCLIP,
    TowerPair,
    image_input,
    image_size,
    projection_head,
)
from protoclip.models.saved import (
    WEIGHTS,
    model_json,
    read_model,
    read_tensors,
    read_weights,
    require_intact,
    tensor_names,
)
from protoclip.models.tokenizers import Tokenizer, open_clip_tokenizer
from protoclip.models.transformers import HuggingFaceTowers, TransformersConfig
from protoclip.rules import MODEL_HINT
from protoclip.terminal import say


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model to start from or to open, which is there; its weights are unread.

    Attributes:
        reference: As messages name it.
        model: The `[model]` section that builds a model from it, once it is resolved.
        own: That section at the sizes that the weights have, and with their heads.
        towers_json: What describes the towers in `model.json`: the content of open_clip's
            `open_clip_config.json`, or the settings of `transformers`. None where `model` says it
            all, as of small towers and of open_clip's models by name.
        text_files: Folder of a Hugging Face text tower, which else is looked up by its name.
        tokenizer_source: Folder or hub name of the tokenizer, which else is looked up by its name.
        has_heads: Whether it has projection heads, as runs have.
        resize_mode: How the model reads images of other shapes, in open_clip's words.
        setting: What messages name where a setting brought the start.
        notes: For the user.
    """

    reference: str
    model: ModelConfig
    own: ModelConfig
    towers_json: Mapping[str, Any] | None = None
    text_files: Path | None = None
    tokenizer_source: str | None = None
    has_heads: bool = False
    resize_mode: str = "shortest"
    setting: str | None = None
    notes: tuple[str, ...] = ()

    def read_weights(self, pair: TowerPair) -> None:
        """Give a new model of this start, at its own sizes, its weights."""
        raise NotImplementedError

    def open(self) -> Loaded:
        """The model at its own sizes, in evaluation mode on the CPU; its transform, its tokenizer.

        A model of another library is as that library has it.
        """
        with self.opening():
            pair = self.open_pair()
            return pair.eval(), self.transform_of(pair), replace(self, model=self.own).tokenizer()

    def open_pair(self) -> TowerPair:
        """The model at its own sizes with its weights; new ones are those of seed 0."""
        pair: TowerPair = build_seeded(replace(self, model=self.own).new_pair)
        self.read_weights(pair)
        return pair

    def new_pair(self) -> TowerPair:
        """The model with new weights, with heads only if the start has any."""
        return self.build() if self.has_heads else TowerPair(self.build_towers())

    def transform_of(self, pair: TowerPair) -> ImageTransform:
        """How `open` prepares images for a model of this start."""
        return open_clip_models.image_transform(pair.towers)

    def opening(self) -> AbstractContextManager[None]:
        """Turns what `open` raises into one line."""
        return nullcontext()

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
        if self.is_resized:
            name = self.model.start or f"{self.model.name}/{self.model.pretrained}"
            return adopt(built, self.open_pair(), name=name)
        self.read_weights(built)
        return []

    def build_towers(self, *, pretrained_text: bool = False) -> nn.Module:
        """New towers at the sizes of `model`."""
        if self.transformers_config is not None:
            return self.transformers_config.build(**self.sizes)
        name = self.model.name or (self.model.image.name if self.is_small else "this model")
        with self._reading():
            built: nn.Module = build_towers(
                self.open_clip_config or {},
                self.full_description.get("preprocess_cfg", {}),
                **self.sizes,
                name=name,
                pretrained_text=pretrained_text,
            )
        return built

    def tokenizer(self) -> Tokenizer:
        length = self.sizes["context_length"]
        with nullcontext() if self.is_small else self._reading():
            if self.transformers_config is not None:
                source, config = str(self.tokenizer_source), self.transformers_config.config
                return transformers.open_tokenizer(source, config, context_length=length)
            text = (self.open_clip_config or {})["text_cfg"]
            return open_clip_tokenizer(text, context_length=length, source=self.tokenizer_source)

    def describe_towers(self) -> Mapping[str, Any] | None:
        """`towers_json` of the towers that are built, where `model` may change more than sizes."""
        return self.towers_json

    @property
    def description(self) -> dict[str, Any]:
        """What `model.json` says of a model that is built from it."""
        return model_json(self.model, self.describe_towers(), squashes=self.squashes)

    @property
    def transformers_config(self) -> TransformersConfig | None:
        """The description of a model of `transformers`; None for towers of open_clip."""
        described = self.towers_json or {}
        return TransformersConfig(described) if "transformers" in described else None

    @property
    def is_small(self) -> bool:
        """Whether `model` describes the towers, part by part."""
        return self.towers_json is None and self.model.name is None

    @property
    def full_description(self) -> Mapping[str, Any]:
        """As `describe_towers`, also of what `model` says."""
        described, name, tag = self.describe_towers(), self.model.name, self.model.pretrained
        if described is not None:
            return deepcopy(dict(described))
        if name is None:
            return describe_small_towers(self.model, self.text_source)
        config = find_config(name)
        published = {} if tag is None else find_weights(name, tag)
        if published.get("quick_gelu"):  # which the name of the model does not say
            config["quick_gelu"] = True
        return {"model_cfg": config, "preprocess_cfg": published}

    @property
    def open_clip_config(self) -> dict[str, Any] | None:
        """open_clip's configuration of the towers; None if they are those of `transformers`.

        A text tower and its tokenizer are in `text_files` if there are any, whatever they are
        called where the model was made.
        """
        config: dict[str, Any] | None = self.full_description.get("model_cfg")
        if config is not None and self.text_files is not None:
            names = {"hf_model_name", "hf_tokenizer_name"} & config["text_cfg"].keys()
            config["text_cfg"] |= dict.fromkeys(names, str(self.text_files))
        return config

    @property
    def text_source(self) -> str:
        """Where a small model's Hugging Face text tower is; "" if it has none."""
        return str(self.text_files or text_models.text_source(self.model.text.name))

    @property
    def sizes(self) -> dict[str, Any]:
        """`image_size` in pixels and `context_length` in tokens; None for the towers' own."""
        image, text = self.model.image, self.model.text
        if not self.is_small:
            return {"image_size": image.size, "context_length": text.context_length}
        size, length = SMALL_IMAGE_SIZES[0], SMALL_CONTEXT_LENGTHS[0]
        if image.weights is not None:
            size = timm.timm_settings(image.name).input_size[-1]
        if text.name is not None:
            config = text_models.text_config(text.name, self.text_source)
            length = min(text_models.NAMED_CONTEXT_LENGTH, text_models.max_tokens(config))
        return {"image_size": image.size or size, "context_length": text.context_length or length}

    @property
    def is_resized(self) -> bool:
        """Whether `model` has other sizes than the weights."""
        if not self.has_weights:
            return False
        size, length = self.own.image.size, self.own.text.context_length
        if (config := self.open_clip_config) is not None:
            size = size or config["vision_cfg"].get("image_size", 224)
            length = length or config["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)
        sizes = self.model.image.size, self.model.text.context_length
        return sizes[0] not in (None, size) or sizes[1] not in (None, length)

    @property
    def tower_kind(self) -> TowerKind | None:
        """The kind of the image tower; None for small towers that start untrained."""
        if self.transformers_config is not None:
            return self.transformers_config.tower_kind
        if self.is_small and self.model.image.weights is None and self.model.text.name is None:
            return None
        return tower_kind((self.open_clip_config or {})["vision_cfg"])

    @property
    def embed_dim(self) -> int:
        """Width of the joint space."""
        if self.transformers_config is not None:
            return self.transformers_config.embed_dim
        return int((self.open_clip_config or {})["embed_dim"])

    @property
    def has_logit_bias(self) -> bool:
        """Whether the model has the bias of the sigmoid loss."""
        if self.transformers_config is not None:
            return self.transformers_config.kind == "siglip"
        return (self.open_clip_config or {}).get("init_logit_bias") is not None

    @property
    def has_weights(self) -> bool:
        """Whether it has weights of its own for the whole model."""
        return True

    @property
    def heads_are_new(self) -> bool:
        """Whether it has no projection heads, or heads that never trained."""
        return not self.has_heads

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint folder of a model of ours."""
        return None

    @property
    def squashes(self) -> bool:
        """As of `ProtoCLIP`: a model that is made of this one is evaluated alike."""
        return self.resize_mode == "squash"

    @property
    def label(self) -> str:
        """What messages name."""
        return self.setting or self.reference

    def check(self) -> None:
        """Refuse what `open` refuses before it reads weights, and making the start did not."""

    def _reading(self) -> AbstractContextManager[None]:
        """Turns what the libraries of text towers raise into a line; they may ask the hub."""
        if self.is_small:
            name = self.model.text.name
            return nullcontext() if name is None else readable_errors(f"model.text.name: {name}")
        repository: str | None = None
        if self.text_files is None:
            config, source = self.open_clip_config, str(self.tokenizer_source)
            repository = hub_name(source) if config is None else text_repository(config)
        return nullcontext() if repository is None else readable_errors(self.label, repository)


def describe_small_towers(model: ModelConfig, text_source: str) -> dict[str, Any]:
    """A description of timm's image tower and a small or a Hugging Face text tower.

    Where the image tower has timm's weights, it reads images normalised as these need.
    """
    image, text = model.image, model.text
    described: dict[str, Any] = {"width": text.width, "heads": text.heads, "layers": text.layers}
    if text.name is not None:
        described = {
            **dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), text_source),
            "hf_proj_type": model.projection,
            "hf_pooler_type": text_models.POOLERS[text.pooling or "mean"],
        }
    vision = {
        "timm_model_name": image.name,
        "timm_pool": "" if image.pooling == "own" else "avg",
        "timm_proj": model.projection,
    }
    config = {"embed_dim": model.embed_dim, "vision_cfg": vision, "text_cfg": described}
    if image.weights is None:
        return {"model_cfg": config}
    settings = timm.timm_settings(image.name)
    return {"model_cfg": config, "preprocess_cfg": {"mean": settings.mean, "std": settings.std}}


def adopt(built: ProtoCLIP, source: TowerPair, *, name: str) -> list[str]:
    """Load the weights of `source` in place, and interpolate its position embeddings if need be.

    The heads stay new if `source` has none. `source` cannot be used afterwards.

    Returns:
        A note on each modality whose position embeddings were interpolated.

    Raises:
        ValueError: `source` is of another architecture.
    """
    expected, state = built.state_dict(), source.state_dict()
    changed = {
        key for key in state.keys() & expected.keys() if state[key].shape != expected[key].shape
    }
    size, size_before = (image_size(pair.towers) for pair in (built, source))
    if size != size_before:
        open_clip_models.set_trunk_size(source.towers, size, name)
    weights = source.towers.state_dict()
    if isinstance(built.towers, HuggingFaceTowers):
        transformers.interpolate_positions(weights, built.towers)
    else:
        open_clip_models.interpolate_positions(weights, built.towers)
    whole = {**source.state_dict(), **{f"towers.{key}": value for key, value in weights.items()}}
    if not isinstance(source, ProtoCLIP):
        whole |= {key: value for key, value in expected.items() if not key.startswith("towers.")}
    if wrong := misfits(built, whole):
        raise ValueError(f"{name}: does not fit the [model] section: {examples_of(wrong)}")
    built.load_state_dict(whole)
    notes = []
    if any(key.startswith("towers.visual.") for key in changed):
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

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder

    def read_weights(self, pair: TowerPair) -> None:
        require_intact(self.folder, WEIGHTS)
        pair.load_state_dict(read_weights(self.folder, pair))

    def transform_of(self, pair: TowerPair) -> ImageTransform:
        return evaluation_transform(**image_input(pair.towers), squash=self.squashes)

    @property
    def heads_are_new(self) -> bool:
        """Both heads begin alike, and stay so in a run without prototypes, such as `align`.

        Only their BatchNorm statistics move there.
        """

        def parameters(modality: str) -> list[Tensor]:
            head = read_tensors(self.folder / WEIGHTS, f"{modality}_head.")
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            return [tensor for name, tensor in head.items() if not name.endswith(statistics)]

        return all(map(torch.equal, parameters("image"), parameters("text")))

    @property
    def has_logit_bias(self) -> bool:
        """The sigmoid loss adds it to any towers."""
        return "towers.logit_bias" in tensor_names(self.folder / WEIGHTS)


def run_start(reference: str) -> RunStart:
    if not Path(reference).exists():
        raise ValueError(f"{reference}: no such run or checkpoint folder; {MODEL_HINT}")
    saved = read_model(reference)
    return RunStart(
        reference=reference,
        model=saved.model,
        own=saved.model,
        towers_json=saved.towers,
        text_files=saved.text_files,
        tokenizer_source=str(saved.text_files) if saved.text_files else None,
        has_heads=True,
        resize_mode="squash" if saved.squashes else "shortest",
        folder=saved.folder,
    )


@dataclass(frozen=True, kw_only=True)
class OpenClipStart(Start):
    """A model of open_clip, with published weights, those of a file, or new ones."""

    file: Path | None = None

    @property
    def has_weights(self) -> bool:
        return self.file is not None or self.own.pretrained is not None

    def read_weights(self, pair: TowerPair) -> None:
        if not self.has_weights:
            return
        name, tag = self.own.name or OPEN_CLIP_CONFIG, self.own.pretrained
        published = {} if tag is None else find_weights(name, tag)
        repository = str(published.get("hf_hub", "").rpartition("/")[0])
        with readable_errors(self.label, repository):
            file = self.file or Path(open_clip.download_pretrained(published))
            open_clip_models.load_file(pair.towers, file, name)

    def new_pair(self) -> TowerPair:
        pair = super().new_pair()
        if isinstance(pair.towers, open_clip.CoCa):
            pair.settings = {"normalize": False}
        return pair

    def open(self) -> Loaded:
        loaded = super().open()
        if not self.has_weights:
            say(f"note: {self.reference}: untrained, with seed 0; no weights are named")
        return loaded

    def opening(self) -> AbstractContextManager[None]:
        return readable_errors(self.reference)


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
        resize_mode=published.get("resize_mode") or "shortest",
        notes=() if tag else (f"model.start: {reference}: untrained; no weights are named",),
        file=file,
    )


def folder_start(reference: str, name: str) -> OpenClipStart:
    """A folder in open_clip's format, as its `local-dir:` reads it."""
    folder = Path(name)
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        raise ValueError(f"{reference}: no folder with {OPEN_CLIP_CONFIG}")
    files = open_clip_models.FILES
    require_safetensors(reference, [path.name for path in folder.iterdir()], files)
    with readable_errors(reference):
        description = dict(json.loads(read_local(folder / OPEN_CLIP_CONFIG)))
        text = description["model_cfg"]["text_cfg"]
        has_text_files = text.get("hf_model_name") and (
            text_kind(folder) in text_models.OPEN_CLIP_KINDS
        )
        preprocessing = description.get("preprocess_cfg", {})
    model = ModelConfig(start=reference)
    return OpenClipStart(
        reference=reference,
        model=model,
        own=model,
        towers_json=description,
        # Then `hf_model_name` may name a folder that is gone, as in one that was moved.
        text_files=folder if has_text_files else None,
        tokenizer_source=str(folder),
        resize_mode=preprocessing.get("resize_mode") or "shortest",
        file=next(path for path in map(folder.joinpath, files) if path.is_file()),
    )


def text_kind(folder: Path) -> str | None:
    """The kind of the Hugging Face model whose configuration a folder holds, if it does."""
    try:
        return str(json.loads(read_local(folder / HUGGING_FACE_CONFIG))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True)
class TransformersStart(Start):
    """A model of `transformers`, by its folder or its name on the hub."""

    name: str

    @property
    def kind(self) -> str:
        """As its configuration names it."""
        with readable_errors(self.reference, hub_name(self.name)):
            return str(text_models.transformers_config(self.name).model_type)

    def check(self) -> None:
        with readable_errors(self.reference, hub_name(self.name)):
            transformers.open_config(self.name)

    def open(self) -> Loaded:
        loaded = self._open_library_model()
        for note in self._ignored_mask(loaded[0].towers.kind):  # type: ignore[arg-type]
            say(f"note: {self.reference}: {note}")
        return loaded

    def open_pair(self) -> TowerPair:
        return transformers.to_open_clip(self.reference, self.name, self._open_library_model())

    def fill(self, built: ProtoCLIP) -> list[str]:
        return adopt(built, self.open_pair(), name=str(self.model.start))

    def trainable(self) -> "TransformersStart":
        """The same with the towers that training gives it, which opening it does not need."""
        towers_json = transformers.describe_towers(self.reference, self.name)
        ignored = self._ignored_mask(towers_json.get("transformers", {}).get("model_type", "clip"))
        return replace(
            self,
            towers_json=towers_json,
            tokenizer_source=self.name,
            resize_mode=towers_json["preprocess_cfg"].get("resize_mode") or "shortest",
            notes=tuple(f"model.start: {self.reference}: {note}" for note in ignored),
        )

    def _open_library_model(self) -> Loaded:
        with readable_errors(self.reference, hub_name(self.name)):
            loaded: Loaded = build_seeded(transformers.open_model, self.name)
        return loaded

    def _ignored_mask(self, kind: str) -> list[str]:
        """What `transformers.note_ignored_mask` has to say, or nothing."""
        if kind not in transformers.UNMASKED_KINDS:
            return []
        with readable_errors(self.reference, hub_name(self.name)):
            note = transformers.note_ignored_mask(self.name)
        return [] if note is None else [note]


def transformers_start(reference: str, name: str) -> TransformersStart:
    if Path(name).is_dir():
        require_safetensors(reference, [path.name for path in Path(name).iterdir()])
    elif not HUB_NAME.fullmatch(name):
        raise ValueError(f"{reference}: no such folder")
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
        weights = reference_weights(self.label, self.file)
        if isinstance(pair, ProtoCLIP) and not self.has_heads:
            others = pair.state_dict().items()
            weights |= {name: value for name, value in others if not name.startswith("towers.")}
        if wrong := misfits(pair, weights):
            raise ValueError(f"{self.label}: does not fit {self.own.name}: {examples_of(wrong)}")
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
    """The weights by our names; they stay in the file until they are used, where it allows it."""
    require_weights(reference, file)
    with readable_errors(reference):
        lazily = is_zipfile(file)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=lazily)
        content = dict(content.get("state_dict", content))
        if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            raise ValueError("holds more than tensors by name")
    return {reference_name(key): value for key, value in content.items()}


def reference_name(key: str) -> str:
    """Our name of a tensor that the reference code saved."""
    key = key.removeprefix("module.")
    for theirs, ours in REFERENCE_NAMES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return f"towers.{key}"


KINDS: Mapping[str, Callable[[str, str], Start]] = {
    "open_clip": open_clip_start,
    "local-dir": folder_start,
    "hf": transformers_start,
    "reference": reference_start,
}


def find_start(reference: str) -> Start:
    """The start that a reference names, as `protoclip.load` takes it.

    Raises:
        ValueError: There is no such model, or its files are damaged.
    """
    kind, _, name = reference.partition(":")
    if name and kind in KINDS:
        return KINDS[kind](reference, name)
    if (Path(reference) / OPEN_CLIP_CONFIG).is_file():
        return folder_start(reference, reference)
    if (Path(reference) / HUGGING_FACE_CONFIG).is_file():
        return transformers_start(reference, reference)
    return run_start(reference)
