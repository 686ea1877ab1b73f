"""Opening what others trained: what their libraries raise is one line, and nothing of it runs.

Which library opens a reference is decided in `start.py`.
"""

import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn

from protoclip.data.access import hub_answer
from protoclip.data.captions import legible
from protoclip.models.layers import drop_adapters
from protoclip.models.protoclip import TowerPair
from protoclip.terminal import line

ImageTransform = Callable[[Image.Image], Tensor]
Tokenizer = Callable[[list[str]], Tensor]
Loaded = tuple[TowerPair, ImageTransform, Tokenizer]

HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
OPEN_CLIP_CONFIG, HUGGING_FACE_CONFIG = "open_clip_config.json", "config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# A text in which tokenizers differ: capitals, accents, digits, punctuation, and other scripts.
TELLING = "It's a DOG, 3.14% Naïve-É; 狗 собака كلب"


@dataclass(eq=False)
class RememberingTokenizer:
    """Remembers the tokens of up to `capacity` captions, which training tokenizes repeatedly."""

    tokenizer: Tokenizer
    capacity: int = 100_000
    _known: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, texts: list[str] | str) -> Int[Tensor, "b c"]:
        if isinstance(texts, str):  # open_clip's tokenizers take a single caption too
            texts = [texts]
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        tokens: dict[str, Tensor] = {}
        if new:
            rows = self.tokenizer([legible(text) for text in new])
            tokens = dict(zip(new, rows, strict=True))
        batch = torch.stack([self._known[t] if t in self._known else tokens[t] for t in texts])
        if len(self._known) + len(tokens) <= self.capacity:
            self._known |= tokens
        return batch


def misfits(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """The tensors that only the model or only the weights have, or that differ in shape."""
    expected = drop_adapters(model.state_dict())
    wrong = expected.keys() ^ weights.keys()
    both = expected.keys() & weights.keys()
    return sorted(wrong | {name for name in both if expected[name].shape != weights[name].shape})


def examples_of(wrong: Sequence[str]) -> str:
    """The first five of the tensors that do not fit a model, in words."""
    names = ", ".join(name.removeprefix("towers.") for name in wrong[:5])
    return f"{len(wrong)} tensors are missing, unknown or of another shape, such as {names}"


def require_safetensors(reference: str, files: Collection[str]) -> None:
    """Refuse a folder of weights that could run code when they are read."""
    if any(name.endswith(".safetensors") for name in files):
        return
    if pickled := sorted(name for name in files if name.endswith(PICKLED)):
        raise ValueError(
            f"{reference}: {pickled[0]} is pickled and could run code; convert it to safetensors"
        )
    raise ValueError(f"{reference}: no weights here, such as model.safetensors")


def hub_name(name: str | Path) -> str:
    """A name that is looked up on the hub; "" for a folder."""
    return "" if Path(name).is_dir() or Path(name).is_absolute() else str(name)


def unreachable(reference: str) -> ValueError:
    """Says that what is not here cannot be fetched."""
    advice = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    if reference.startswith("model."):  # of a tower
        way = ", as --model.image.weights FILE or timm:NAME/FILE" * (".image" in reference)
        advice += f", or name a file or folder{way} (docs/align.md#without-a-network)"
    return ValueError(
        f"{reference}: the hub does not answer, and there is no earlier download; {advice}"
    )


@contextmanager
def quiet_libraries(*, offline: bool) -> Iterator[None]:
    """Use other libraries without their logs and warnings, and without the hub if `offline`."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    constants.HF_HUB_OFFLINE = offline
    logging.disable(logging.ERROR)  # they log what they raise, and that a new model is untrained
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they advise options that are not ours
            yield
    finally:
        constants.HF_HUB_OFFLINE, logging.root.manager.disable = before


@contextmanager
def readable_errors(reference: str, repository: str = "") -> Iterator[None]:
    """Turn what other libraries raise into one line.

    They reach the hub only for a `repository`, and only if it answers within seconds; else they
    read what was downloaded before.
    """
    from huggingface_hub import HfApi, errors

    if repository and not HUB_NAME.fullmatch(repository):
        raise ValueError(f"{reference}: no such folder")
    answer = hub_answer(partial(HfApi().model_info, repository)) if repository else None
    if isinstance(answer, errors.RepositoryNotFoundError):
        raise ValueError(
            f"{reference}: the hub has no model '{repository}', or only for those with access; "
            "check its name, or set HF_TOKEN"
        )
    files = [file.rfilename for file in getattr(answer, "siblings", None) or ()]
    if files and "hf:" in reference:
        if OPEN_CLIP_CONFIG in files and HUGGING_FACE_CONFIG not in files:
            raise ValueError(
                f"{reference}: is open_clip's; download the repository, and load the folder"
            )
        require_safetensors(reference, files)
    ours = ("model.", f"{reference}: ", f"{reference}/")
    try:
        with quiet_libraries(offline=answer is None):
            yield
    except ImportError as error:
        raise ValueError(
            f"{reference}: pip install 'protoclip[teachers]' first ({line(str(error))})"
        ) from error
    except Exception as error:  # what these libraries raise has no common class
        if isinstance(error, ValueError) and str(error).startswith(ours):
            raise  # it says it all
        # What libraries cannot get is an OSError; any other ValueError is about the model.
        about_model = isinstance(error, ValueError) and not isinstance(error, OSError)
        if repository and answer is None and not about_model:
            raise unreachable(reference) from error
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{reference}: needs its own code, which never runs here; choose another model"
            ) from error
        if "weights_only" in str(error):
            raise ValueError(
                f"{reference}: holds more than tensors, which could run code and is not read; save "
                "its weights as safetensors"
            ) from error
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{reference}: cannot be opened ({line(reason)})") from error
