"""The model: two towers, and in ProtoCLIP two projection heads and two temperatures.

A start builds it (`start.py`), and `training/optim.py` decides which parts of it train. The
precision of its forward passes is here too; the losses choose their own, in `losses/tiles.py`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import open_clip
import torch
import torch.export
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from protoclip.config import HeadConfig
from protoclip.data.transforms import EvaluationTransform, SquashTransform

Precision = Literal["fp32", "bf16", "fp16"]
Autocast = Callable[[], AbstractContextManager[object]]

# How the names of what leads from a tower into the joint space begin: of timm's image and Hugging
# Face's text trunks in open_clip, of open_clip's own towers, and of models of `transformers`.
PROJECTIONS = ("visual.head.", "visual.proj", "text.proj", "text.text_projection")


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode of a module, without gradients; after it each part has its own mode again.

    Not `torch.inference_mode`: FSDP keeps a first pass's tensors, and could not train with these.
    """
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        # One by one: a locked tower stays in evaluation mode inside a model that trains.
        for part, training in modes:
            part.training = training


@contextmanager
def seed_weights(seed: int) -> Iterator[None]:
    """Draw new weights on the CPU from a seed; the global random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`, which would seed every GPU too.
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The model's output for a batch of pairs. Where each image has several texts, which follow
    each other, `paired` gives an image its row beside each of them.

    Features and projections have unit norm; scales are inverse temperatures.
    Projections are `None` if the forward pass was called with `project=False`. Only models of the
    sigmoid loss have a `logit_bias`. Outputs are what the towers gave, of any norm. `distilled` is
    what is to become the features of teachers, by their names.
    """

    image_features: Float[Tensor, "b d"]
    text_features: Float[Tensor, "n d"]
    image_projections: Float[Tensor, "b p"] | None
    text_projections: Float[Tensor, "n p"] | None
    logit_scale: Float[Tensor, ""]
    prototype_logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""] | None = None
    image_outputs: Float[Tensor, "b d"] | None = None
    text_outputs: Float[Tensor, "n d"] | None = None
    distilled: Mapping[str, Float[Tensor, "_ _"]] = field(default_factory=dict)

    def paired(self) -> "Embeddings":
        """With a row of images for each of texts: an image's is repeated for each of its texts."""
        times = len(self.text_features) // len(self.image_features)
        if times == 1:
            return self

        def repeated(rows: Tensor | None) -> Any:
            return None if rows is None else rows.repeat_interleave(times, 0)

        return replace(
            self,
            image_features=repeated(self.image_features),
            image_projections=repeated(self.image_projections),
            image_outputs=repeated(self.image_outputs),
        )


# Or FSDP of PyTorch 2.10 and earlier would not find the tensors of an output.
torch.export.register_dataclass(Embeddings)


def to_float(values: Tensor) -> Tensor:
    """To float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def causal(towers: Any) -> bool:
    """Whether these are open_clip's CLIP, whose words read no later ones."""
    pool = getattr(towers, "text_pool_type", None)
    return pool in ("argmax", "eos") and getattr(towers, "attn_mask", None) is not None


class _ShortTexts(nn.Module):
    """Reads tokens of fewer columns than open_clip's CLIP expects, by a part of its positions."""

    def __init__(self, towers: nn.Module) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, tokens: Int[Tensor, "b l"]) -> Tensor:
        return self.towers.encode_text(tokens)  # type: ignore[operator,no-any-return]


class TowerPair(nn.Module):
    """An image tower and a text tower with one joint space.

    They read images `(b, c, h, w)` and tokens `(b, c)`; in `align`, features of encoders.

    Args:
        towers: A model with `encode_image` and `encode_text`, such as open_clip's. Both take
            `normalize`, which is true by default in open_clip's CoCa.
        squashes: Whether images are evaluated squashed to squares, and not cropped, as by SigLIP.
    """

    loaded_from: str | None = None  # what `load` was given

    def __init__(self, towers: nn.Module, *, squashes: bool = False) -> None:
        super().__init__()
        self.towers, self.squashes = towers, squashes

    def encode_image(
        self, images: Float[Tensor, "b *_"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        """Image features in the joint space; of unit norm if `normalize` is set."""
        features = to_float(self.towers.encode_image(images, normalize=False))  # type: ignore[operator]
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(
        self, tokens: Shaped[Tensor, "b c"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        """Text features in the joint space; of unit norm if `normalize` is set.

        Tokens may be what `data.captions.trim_padding` leaves, where `ignores_padding` holds.
        """
        towers: Any = self.towers
        if causal(towers) and tokens.shape[1] < len(towers.positional_embedding):
            length = tokens.shape[1]
            parts = {
                "towers.positional_embedding": towers.positional_embedding[:length],
                "towers.attn_mask": towers.attn_mask[:length, :length],
            }
            features = functional_call(_ShortTexts(towers), parts, tokens)
        else:
            features = towers.encode_text(tokens, normalize=False)
        features = to_float(features)
        return F.normalize(features, dim=-1) if normalize else features

    @property
    def ignores_padding(self) -> bool:
        """Whether features stay the same if columns that hold only padding are left out of tokens.

        So it is if padding is masked, or if a text's features are those of its last word, which
        reads no later one. SigLIP learned to read padding.
        """
        towers: Any = self.towers
        masked = hasattr(getattr(towers, "text", None), "pooler")  # a text model of Hugging Face
        return causal(towers) or masked or getattr(towers, "ignores_padding", False)


class ProtoCLIP(TowerPair):
    """An open_clip tower pair with projection heads (arXiv 2206.10996).

    Args:
        towers: An open_clip model with `encode_image`, `encode_text`, `visual` and `logit_scale`.
        head: The projection head; the image's and the text's both start from its weights.
        joins_encoders: Whether `align` could train between the towers, two pretrained encoders.
        squashes: As of `TowerPair`.
    """

    def __init__(
        self,
        towers: nn.Module,
        head: nn.Module,
        *,
        joins_encoders: bool = False,
        squashes: bool = False,
    ) -> None:
        super().__init__(towers, squashes=squashes)
        self.joins_encoders = joins_encoders
        self.image_head = head
        self.text_head = copy.deepcopy(head)
        self.prototype_logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.pulls: dict[str, Tensor] = {}
        # The tower, `image` or `text`, that learns the relations of a teacher, by its name.
        self.distils: dict[str, str] = {}

    def add_logit_bias(self) -> None:
        """Prepare towers without a logit bias for the sigmoid loss; others stay as they are.

        The scale becomes 10 and the bias -10, with which that loss starts (arXiv 2303.15343).
        """
        towers: Any = self.towers
        if getattr(towers, "logit_bias", None) is None:
            towers.logit_bias = nn.Parameter(torch.full_like(towers.logit_scale.detach(), -10.0))
            with torch.no_grad():
                towers.logit_scale.fill_(math.log(10))

    def forward(
        self,
        images: Float[Tensor, "b *_"],
        tokens: Shaped[Tensor, "n c"],
        project: bool = True,
        teach: bool = False,
    ) -> Embeddings:
        """Features of a batch of pairs, with `project` their projections, and with `teach` what is
        to become the features of teachers."""
        return self.embeddings(self.encode_image(images), self.encode_text(tokens), project, teach)

    def embeddings(
        self,
        image: Float[Tensor, "b d"],
        text: Float[Tensor, "n d"],
        project: bool = True,
        teach: bool = False,
    ) -> Embeddings:
        """What `forward` returns, from the towers' outputs for a batch.

        The heads read these outputs before normalisation, as in the reference.
        """
        logit_bias: Tensor | None = getattr(self.towers, "logit_bias", None)
        image, text = to_float(image), to_float(text)  # FSDP2 casts what comes in
        # The order of these operations decides how gradients are summed, so runs depend on it.
        embeddings = Embeddings(
            image_features=F.normalize(self.watch_gradient("image_features", image), dim=-1),
            text_features=F.normalize(self.watch_gradient("text_features", text), dim=-1),
            image_projections=self._project("image", image) if project else None,
            text_projections=self._project("text", text) if project else None,
            logit_scale=self.towers.logit_scale.exp(),  # type: ignore[operator]
            prototype_logit_scale=self.prototype_logit_scale.exp(),
            # A copy, which has no gradient where gradients are off; a parameter always has.
            logit_bias=None if logit_bias is None else logit_bias.clone(),
            # Copies too: a tower may give a view, and FSDP2 warns of those.
            image_outputs=image.clone(),
            text_outputs=text.clone(),
        )
        if not teach:
            return embeddings
        outputs = {"image": image, "text": text}
        learns = {
            name: outputs[tower].clone()
            for name, tower in sorted(self.distils.items(), key=lambda item: item[1])
            if outputs[tower].requires_grad  # or the tower is locked, and learns nothing
        }
        return replace(embeddings, distilled=learns)

    def _project(self, tower: str, outputs: Float[Tensor, "b d"]) -> Float[Tensor, "b p"]:
        head = self.image_head if tower == "image" else self.text_head
        projections = to_float(head(self.watch_gradient(f"{tower}_projections", outputs)))
        return F.normalize(projections, dim=-1)

    def watch_gradient(self, branch: str, outputs: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """The same outputs of a tower; a backward pass adds the squared norm of their gradient."""
        if not outputs.requires_grad:
            return outputs
        outputs = outputs.view_as(outputs)
        outputs.register_hook(partial(self._note_pull, branch))  # type: ignore[no-untyped-call]
        return outputs

    def _note_pull(self, branch: str, gradient: Tensor) -> None:
        square = gradient.detach().square().sum()
        self.pulls[branch] = self.pulls[branch] + square if branch in self.pulls else square

    def towers_train(self) -> tuple[bool, bool]:
        """Whether the outputs of the image tower, and those of the text tower, get a gradient."""
        trained = [name for name, p in self.towers.named_parameters() if p.requires_grad]
        image = any(name.startswith("visual.") for name in trained)
        return image, not all(name.startswith(("visual.", "logit_")) for name in trained)

    def take_pulls(self) -> dict[str, Float[Tensor, ""]]:
        """How hard features and projections pulled on each tower since the last call.

        Squared norms of the gradient with respect to a tower's outputs, by the branch that it came
        through: `image_features`, `image_projections`, `text_features`, `text_projections`.
        """
        pulls, self.pulls = self.pulls, {}
        return pulls

    @torch.no_grad()
    def clamp_scales(self, taken: Bool[Tensor, ""], *, sigmoid: bool = False) -> None:
        """Keep both inverse temperatures in [1, 100], after an optimizer step that was taken.

        With the sigmoid loss the first one is free, as in its paper: published ones exceed 100.
        """
        scales = [self.prototype_logit_scale]
        if not sigmoid:
            scales.append(self.towers.get_parameter("logit_scale"))
        for scale in scales:
            scale.copy_(torch.where(taken, scale.clamp(0, math.log(100)), scale))


def projection_head(embed_dim: int, config: HeadConfig) -> nn.Sequential:
    """Linear - BatchNorm - ReLU, `hidden_layers` times, then Linear to `projection_dim`.

    From a tower's outputs to the small space that K-means clusters.
    """
    layers: list[nn.Module] = []
    width, hidden = embed_dim, config.hidden_dim
    for _ in range(config.hidden_layers):
        layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        width = hidden
    layers.append(nn.Linear(width, config.projection_dim))
    return nn.Sequential(*layers)


def image_size(towers: nn.Module) -> int:
    """Height and width of the image tower's input, in pixels."""
    size: int | tuple[int, int] = towers.visual.image_size  # type: ignore[union-attr,assignment]
    return size if isinstance(size, int) else size[0]


def image_input(towers: nn.Module) -> dict[str, Any]:
    """The arguments of an image transform: what images the towers read.

    Their `size` in pixels, `mean` and `std` of their channels, for values in [0, 1], and `bands` if
    they are not 8-bit RGB.
    """
    mean = getattr(towers.visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(towers.visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    bands = getattr(towers.visual, "bands", None)
    given = {"size": image_size(towers), "mean": tuple(mean), "std": tuple(std)}
    return given if bands is None else {**given, "bands": bands}


def image_shape(towers: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the image tower's input."""
    given = image_input(towers)
    return len(given["mean"]), given["size"], given["size"]


def evaluation_transform(pair: TowerPair) -> EvaluationTransform:
    """What a model of ours is evaluated with: the centre crop, or the squashed image."""
    kind = SquashTransform if pair.squashes else EvaluationTransform
    return kind(**image_input(pair.towers))


def resolve_precision(name: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """The precision that `auto` means on a device: bf16 where the hardware computes it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        # Older cards only imitate bf16, slower than fp32.
        return "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    # A private function, which another version of torch may lack.
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if device.type == "cpu" and native() else "fp32"


def autocast(precision: Precision, device: torch.device) -> Autocast:
    """A function that makes the context for a forward pass; for fp32 the context does nothing.

    Every forward pass needs a context of its own: the cache of cast weights is wrong when passes
    with and without gradients share one.
    """
    if precision == "fp32":
        return nullcontext
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return partial(torch.autocast, device.type, dtype=dtype)


def resolve_encoding(name: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """The precision that `auto` means in encoding: as in training on a card, else fp32.

    On a CPU with `avx512_bf16` and without AMX bf16 is slower than fp32: 0.65 of the captions that
    MiniLM encodes in a second, and with OpenVINO 0.6 of the images of EfficientNet-Lite0.
    """
    return resolve_precision(name, device) if name != "auto" or device.type == "cuda" else "fp32"


@contextmanager
def measure_convolutions(device: torch.device) -> Iterator[None]:
    """On a card, cuDNN tries its convolutions on each new shape and takes the fastest.

    This pays if shapes stay. PyTorch's determinism is left as the user set it.
    """
    before = torch.backends.cudnn.benchmark
    if device.type == "cuda" and not torch.backends.cudnn.deterministic:
        torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; for other precisions a scaler that changes nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
