"""What a model starts from: one frozen dataclass a kind, made once from a reference or settings.

A start holds architecture, tokenizer and text files, and reads weights only when it is asked for
them. `loading.py` makes models of starts.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import open_clip
import torch
from open_clip import hf_configs
from safetensors import safe_open
from torch import Tensor, nn

from protoclip.config import HeadConfig, ModelConfig
from protoclip.data.transforms import evaluation_transform
from protoclip.files import read_local, require_regular
from protoclip.models import conversion, hugging_face, towers
from protoclip.models.architecture import Architecture, DescribedTowers, NamedTowers
from protoclip.models.halves import SmallTowers
from protoclip.models.heads import projection_head
from protoclip.models.opening import (
    HUB_NAME,
    HUGGING_FACE_CONFIG,
    Loaded,
    hub_name,
    misfits,
    open_clip_transform,
    readable_errors,
    require_safetensors,
    require_weights,
    seeded,
)
from protoclip.models.protoclip import ProtoCLIP, TowerPair
from protoclip.models.resize import adopt
from protoclip.models.saved import (
    MODEL,
    WEIGHTS,
    model_json,
    read_model,
    read_tensors,
    read_weights,
    require_intact,
    tensor_names,
)
from protoclip.models.towers import OPEN_CLIP_CONFIG, Misfit, Weights, examples_of
from protoclip.paths import MODEL_HINT
from protoclip.terminal import line, say

OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
HF_TEXT_KINDS = tuple(hf_configs.arch_dict)  # the text models that open_clip can hold
# How the reference code names what is not a tower.
REFERENCE_NAMES = {
    "image_projection_head.": "image_head.",
    "text_projection_head.": "text_head.",
    "logit_scale_proto": "prototype_logit_scale",
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model to start from or to open, which is there; its weights are unread.

    Small towers and two halves are no more than this: their weights come with their towers.

    Attributes:
        reference: As messages name it.
        unresized: Its towers and tokenizer at its own sizes, and the settings that follow from it.
        model: The `[model]` section that builds a model from it, once it is resolved.
        has_heads: Whether it has projection heads, as runs have.
        squashes_as_begun: `squashes` of a run that goes on; unset, it follows from the start.
        notes: For the user.
    """

    reference: str
    unresized: Architecture
    model: ModelConfig
    has_heads: bool = False
    squashes_as_begun: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> Architecture:
        """Its towers and tokenizer at the sizes of `model`."""
        return replace(self.unresized, model=self.model)

    @property
    def has_logit_bias(self) -> bool:
        """Whether the model has the bias of the sigmoid loss."""
        return self.architecture.has_logit_bias

    @property
    def description(self) -> dict[str, Any]:
        """What `model.json` says of a model that is built from it."""
        return model_json(self.model, self.architecture.towers_json, squashes=self.squashes)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint folder of a model of ours."""
        return None

    @property
    def heads_are_new(self) -> bool:
        """Whether it has no projection heads, or heads that never trained."""
        return not self.has_heads

    @property
    def resize_mode(self) -> str:
        """How the model reads images of other shapes, in open_clip's words."""
        settings = (self.unresized.towers_json or {}).get("preprocess_cfg", {})
        return settings.get("resize_mode") or "shortest"

    @property
    def squashes(self) -> bool:
        """As of `ProtoCLIP`: a model that is made of this one is evaluated alike."""
        begun = self.squashes_as_begun
        return self.resize_mode == "squash" if begun is None else begun

    @property
    def is_resized(self) -> bool:
        """Whether `model` has other sizes than the weights, where these could be loaded as is."""
        return False

    def check(self) -> None:
        """Refuse what `open` refuses before it reads weights, and making the start did not."""

    def open(self) -> Loaded:
        """The model at its own sizes, in evaluation mode on the CPU; its transform, its tokenizer.

        A model of another library is as that library has it.
        """
        raise NotImplementedError

    def pretrained(self) -> TowerPair:
        """The model at its own sizes, to take the weights of."""
        return self.open()[0]

    def build(self, weights: Weights) -> ProtoCLIP:
        """The model with weights from torch's global generator; with `none` on the meta device."""
        architecture = self.architecture
        with torch.device("meta") if weights == "none" else nullcontext():
            both = architecture.towers(weights)
            head = projection_head(architecture.embed_dim, self.model.heads)
            joins = self.model.joins_halves
            built = ProtoCLIP(both, head, joins_halves=joins, squashes=self.squashes)
            if self.has_logit_bias:
                built.add_logit_bias()
        return built

    def fill(self, built: ProtoCLIP) -> list[str]:
        """Give a model of `build` the weights of the start; returns notes on what was resized."""
        name = self.model.start or f"{self.model.name}/{self.model.pretrained}"
        return adopt(built, self.pretrained(), name=name)


@dataclass(frozen=True)
class SavedWeights:
    """What the weights of a checkpoint say of their model. Each is read once, when it is asked for.

    A start shares it with the copies of it that have other settings.
    """

    folder: Path

    @cached_property
    def heads_are_new(self) -> bool:
        """Both heads begin alike, and stay so in a run without prototypes, such as `align`.

        Only their BatchNorm statistics move there.
        """

        def parameters(modality: str) -> list[Tensor]:
            head = read_tensors(self.folder / WEIGHTS, f"{modality}_head.")
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            return [tensor for name, tensor in head.items() if not name.endswith(statistics)]

        with self._intact():
            return all(map(torch.equal, parameters("image"), parameters("text")))

    @cached_property
    def has_logit_bias(self) -> bool:
        """The sigmoid loss adds it to any towers."""
        with self._intact():
            return "towers.logit_bias" in tensor_names(self.folder / WEIGHTS)

    @contextmanager
    def _intact(self) -> Iterator[None]:
        try:
            yield
        except ValueError:
            require_intact(self.folder, WEIGHTS)  # its line names the way out
            raise


@dataclass(frozen=True, kw_only=True)
class RunStart(Start):
    """A run or checkpoint folder."""

    weights: SavedWeights
    saved_squashes: bool

    @property
    def resize_mode(self) -> str:
        # What describes the towers says how their own start read images, also where a run of an
        # earlier version cropped them.
        return "squash" if self.saved_squashes else "shortest"

    @property
    def checkpoint(self) -> Path:
        return self.weights.folder

    @property
    def heads_are_new(self) -> bool:
        return self.weights.heads_are_new

    @property
    def has_logit_bias(self) -> bool:
        return self.weights.has_logit_bias

    @property
    def is_resized(self) -> bool:
        return self.architecture.sizes != self.unresized.sizes

    def build(self, weights: Weights) -> ProtoCLIP:
        with buildable(self.checkpoint):
            return super().build(weights)

    def open(self) -> Loaded:
        built: ProtoCLIP = seeded(replace(self, model=self.unresized.model).build, "new")
        self._load(built)
        with buildable(self.checkpoint):
            read = towers.image_input(built.towers)
            transform = evaluation_transform(**read, squash=built.squashes)
            return built.eval(), transform, self.unresized.tokenizer()

    def fill(self, built: ProtoCLIP) -> list[str]:
        if self.is_resized:
            return super().fill(built)
        self._load(built)
        return []

    def _load(self, built: ProtoCLIP) -> None:
        require_intact(self.checkpoint, WEIGHTS)
        built.load_state_dict(read_weights(self.checkpoint, built))


@contextmanager
def buildable(folder: Path) -> Iterator[None]:
    """Turn what a saved description of no possible model raises into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError),
        *(RuntimeError, TypeError),
    ) as error:
        raise ValueError(
            f"{folder}: {MODEL} describes no model that can be built ({line(repr(error))}); "
            "copy it again, or use another checkpoint"
        ) from error


def run_start(reference: str) -> RunStart:
    if not Path(reference).exists():
        raise ValueError(f"{reference}: no such run or checkpoint folder; {MODEL_HINT}")
    saved = read_model(reference)
    kind: type[Architecture] = SmallTowers if saved.model.name is None else NamedTowers
    if saved.towers is not None:
        is_of_transformers = "transformers" in saved.towers
        kind = hugging_face.TransformersTowers if is_of_transformers else DescribedTowers
    architecture = kind(
        model=saved.model,
        towers_json=saved.towers,
        text_files=saved.text_files,
        tokenizer_source=str(saved.text_files) if saved.text_files else None,
    )
    return RunStart(
        reference=reference,
        unresized=architecture,
        model=saved.model,
        has_heads=True,
        weights=SavedWeights(saved.folder),
        saved_squashes=saved.squashes,
    )


@dataclass(frozen=True, kw_only=True)
class OpenClipStart(Start):
    """A model of open_clip, with published weights, those of a file, or new ones."""

    file: Path | None = None

    @property
    def resize_mode(self) -> str:
        model = self.unresized.model
        if model.name is None or model.pretrained is None:
            return super().resize_mode
        known = towers.published_weights(model.name, model.pretrained)
        return known.get("resize_mode") or "shortest"

    @property
    def is_resized(self) -> bool:
        if self.model.pretrained is None:
            return False
        config = towers.named_config(str(self.model.name))
        image_size = config["vision_cfg"].get("image_size", 224)
        context_length = config["text_cfg"].get("context_length", 77)
        given = self.model.image.size, self.model.text.context_length
        return given[0] not in (None, image_size) or given[1] not in (None, context_length)

    def open(self) -> Loaded:
        tag = self.unresized.model.pretrained
        weights: Weights = "new" if tag is None else "published"
        with readable_errors(self.reference, self.unresized.repository(weights) or ""):
            built: Any = seeded(self.unresized.read_towers, weights)
            settings = {"normalize": False} if isinstance(built, open_clip.CoCa) else {}
            pair = TowerPair(built, **settings)
            if self.file is not None:
                pair = self._filled(pair, self.file)
            tokenizer = self.unresized.read_tokenizer()
        if tag is None and self.file is None:
            say(f"note: {self.reference}: untrained, with seed 0; no weights are named")
        return pair.eval(), open_clip_transform(built), tokenizer

    def _filled(self, pair: TowerPair, file: Path) -> TowerPair:
        """The model with the weights of a file."""
        if file.suffix == ".safetensors" and (wrong := misshapen(file, pair.towers)):
            name = self.unresized.model.name or OPEN_CLIP_CONFIG
            raise Misfit(f"does not fit {name}: {examples_of(wrong)}")
        open_clip.load_checkpoint(pair.towers, str(file))
        return pair


def misshapen(weights: Path, built: nn.Module) -> list[str]:
    """The tensors of a file that are of another shape than the model's, which open_clip would list.

    Names that the model does not have may be of an older version, which open_clip still reads.
    """
    shapes = {name: [*value.shape] for name, value in built.state_dict().items()}
    require_regular(weights)
    with safe_open(weights, "pt") as stored:
        both = shapes.keys() & stored.keys()
        wrong = [name for name in both if stored.get_slice(name).get_shape() != shapes[name]]
    return sorted(name for name in wrong if "positional_embedding" not in name)


def open_clip_start(reference: str, name: str) -> OpenClipStart:
    """`NAME/TAG`, `NAME/FILE` for weights in a file, or `NAME` for an untrained model."""
    name, _, tag = name.partition("/")
    towers.named_config(name, reference)
    file = Path(tag) if Path(tag).is_file() else None
    if tag and file is None:
        towers.published_weights(name, tag, reference)
    model = ModelConfig(name=name, pretrained=None if file else tag or None)
    notes = () if tag else (f"model.start: {reference}: untrained; no weights are named",)
    return OpenClipStart(
        reference=reference, unresized=NamedTowers(model=model), model=model, notes=notes, file=file
    )


def folder_start(reference: str, name: str) -> OpenClipStart:
    """A folder in open_clip's format, as its `local-dir:` reads it."""
    folder = Path(name)
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        raise ValueError(f"{reference}: no folder with {OPEN_CLIP_CONFIG}")
    require_safetensors(reference, [path.name for path in folder.iterdir()], OPEN_CLIP_WEIGHTS)
    with readable_errors(reference):
        description = dict(json.loads(read_local(folder / OPEN_CLIP_CONFIG)))
        text = description["model_cfg"]["text_cfg"]
        has_text_files = text.get("hf_model_name") and text_kind(folder) in HF_TEXT_KINDS
    model = ModelConfig(start=reference)
    architecture = DescribedTowers(
        model=model,
        towers_json=description,
        # Then `hf_model_name` may name a folder that is gone, as in one that was moved.
        text_files=folder if has_text_files else None,
        tokenizer_source=str(folder),
    )
    file = next(path for path in map(folder.joinpath, OPEN_CLIP_WEIGHTS) if path.is_file())
    return OpenClipStart(reference=reference, unresized=architecture, model=model, file=file)


def text_kind(folder: Path) -> str | None:
    """The kind of the Hugging Face model whose configuration a folder holds, if it does."""
    try:
        return str(json.loads(read_local(folder / HUGGING_FACE_CONFIG))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True)
class HuggingFaceStart(Start):
    """A model of `transformers`, by its folder or its name on the hub."""

    name: str

    @property
    def kind(self) -> str:
        """As its configuration names it."""
        with readable_errors(self.reference, hub_name(self.name)):
            return str(towers.transformers_config(self.name).model_type)

    def check(self) -> None:
        with readable_errors(self.reference, hub_name(self.name)):
            hugging_face.open_config(self.name)

    def open(self) -> Loaded:
        loaded = self._opened()
        for note in self._ignored_mask(loaded[0].towers.kind):  # type: ignore[arg-type]
            say(f"note: {self.reference}: {note}")
        return loaded

    def pretrained(self) -> TowerPair:
        return conversion.converted(self.reference, self.name, self._opened())

    def trainable(self) -> "HuggingFaceStart":
        """The same with the towers that training gives it, which opening it does not need."""
        towers_json = conversion.towers_json(self.reference, self.name)
        is_open_clip = "model_cfg" in towers_json
        kind = DescribedTowers if is_open_clip else hugging_face.TransformersTowers
        architecture = kind(model=self.model, towers_json=towers_json, tokenizer_source=self.name)
        ignored = self._ignored_mask(towers_json.get("transformers", {}).get("model_type", "clip"))
        notes = tuple(f"model.start: {self.reference}: {note}" for note in ignored)
        return replace(self, unresized=architecture, notes=notes)

    def _opened(self) -> Loaded:
        with readable_errors(self.reference, hub_name(self.name)):
            loaded: Loaded = seeded(hugging_face.open_model, self.name)
        return loaded

    def _ignored_mask(self, kind: str) -> list[str]:
        """What `hugging_face.ignored_mask` has to say, or nothing."""
        if kind not in hugging_face.UNMASKED_KINDS:
            return []
        with readable_errors(self.reference, hub_name(self.name)):
            note = hugging_face.ignored_mask(self.name)
        return [] if note is None else [note]


def hugging_face_start(reference: str, name: str) -> HuggingFaceStart:
    if Path(name).is_dir():
        require_safetensors(reference, [path.name for path in Path(name).iterdir()])
    elif not HUB_NAME.fullmatch(name):
        raise ValueError(f"{reference}: no such folder")
    model = ModelConfig(start=reference)
    unknown = Architecture(model=model)
    return HuggingFaceStart(reference=reference, unresized=unknown, model=model, name=name)


class ReferenceStart(OpenClipStart):
    """A checkpoint of the paper's reference code, of a model of open_clip.

    Without projection heads in the file, as for the code's CLIP baselines, the model has none.
    """

    def _filled(self, pair: TowerPair, file: Path) -> TowerPair:
        if self.has_heads:
            heads = self.unresized.model.heads
            pair = ProtoCLIP(pair.towers, projection_head(self.unresized.embed_dim, heads))
        weights = reference_weights(self.reference, file)
        if wrong := misfits(pair, weights):
            raise Misfit(f"does not fit {self.unresized.model.name}: {examples_of(wrong)}")
        pair.load_state_dict(weights)
        return pair


def reference_start(reference: str, given: str) -> ReferenceStart:
    """`FILE,model=NAME`; the code gives QuickGELU to all towers that are not timm's."""
    file, separator, name = given.rpartition(",model=")
    if not separator:
        raise ValueError(f"{reference}: name its model too, as in reference:FILE,model=RN50")
    config = towers.named_config(name, reference)
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
    description = {"model_cfg": config, "preprocess_cfg": {}}
    return ReferenceStart(
        reference=reference,
        unresized=DescribedTowers(model=model, towers_json=description),
        model=model,
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
    "hf": hugging_face_start,
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
        return hugging_face_start(reference, reference)
    return run_start(reference)
