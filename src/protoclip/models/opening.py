"""Opening what others trained: what their libraries raise is one line, and nothing of it runs.

Which library opens a reference is decided in `start.py`; our own checkpoints are read in
`saved.py`.
"""

import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from protoclip.data.access import hub_answer
from protoclip.models.lora import drop_adapters
from protoclip.models.protoclip import TowerPair
from protoclip.models.tokenizers import Tokenizer
from protoclip.terminal import line

ImageTransform = Callable[[Image.Image], Tensor]
Loaded = tuple[TowerPair, ImageTransform, Tokenizer]

HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
OPEN_CLIP_CONFIG, HUGGING_FACE_CONFIG = "open_clip_config.json", "config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


class Misfit(ValueError):
    """Weights are of another model than the one that they are for."""


def build_seeded(build: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Build with new weights of seed 0; the global random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build(*arguments, **settings)


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


def require_safetensors(
    reference: str, files: Collection[str], names: Collection[str] = ()
) -> None:
    """Refuse weights that could run code when they are read; `names` are those to look for."""
    if names and not set(names).isdisjoint(files):
        return
    if not names and any(name.endswith(".safetensors") for name in files):
        return
    if pickled := sorted(name for name in files if name.endswith(PICKLED)):
        raise ValueError(
            f"{reference}: {pickled[0]} is pickled and could run code; convert it to safetensors"
        )
    raise ValueError(f"{reference}: no weights here, such as {[*names, 'model.safetensors'][0]}")


def require_weights(reference: str, file: Path) -> None:
    """Refuse a file that is neither of safetensors nor of PyTorch, by its first bytes."""
    try:
        with file.open("rb") as opened:
            head = opened.read(99)
    except OSError:  # its reader says more
        return
    # A zip archive except NumPy's, a pickle, and a header in JSON behind its length.
    is_torch = head.startswith((b"PK", b"\x80")) and b".npy" not in head
    if not (is_torch or head[8:9] == b"{"):
        raise ValueError(f"{reference}: is no file of weights, neither safetensors nor PyTorch's")


def hub_name(name: str | Path) -> str:
    """A name that is looked up on the hub; "" for a folder."""
    return "" if Path(name).is_dir() or Path(name).is_absolute() else str(name)


def unreachable(reference: str, way_out: str = "") -> ValueError:
    """Says that what is not here cannot be fetched; `way_out` is one that others do not have."""
    advice = "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    advice += f", or {way_out}" if way_out else ""
    if reference.startswith("model."):  # of a tower; other messages name the page of their command
        advice += " (docs/align.md#without-a-network)"
    return ValueError(
        f"{reference}: the hub does not answer, and there is no earlier download; {advice}"
    )


@contextmanager
def readable_errors(reference: str, repository: str = "", way_out: str = "") -> Iterator[None]:
    """Turn what other libraries raise into one line.

    They reach the hub only for a `repository`, and only if it answers within seconds; else they
    read what was downloaded before. `way_out` is that of `unreachable`.
    """
    from huggingface_hub import HfApi, constants, errors

    if repository and not HUB_NAME.fullmatch(repository):
        raise ValueError(f"{reference}: no such folder")
    answer = hub_answer(partial(HfApi().model_info, repository)) if repository else None
    if isinstance(answer, errors.RepositoryNotFoundError):
        raise ValueError(
            f"{reference}: the hub has no model '{repository}', or only for those with access; "
            "check its name, or set HF_TOKEN"
        )
    if files := [file.rfilename for file in getattr(answer, "siblings", None) or ()]:
        is_open_clip = OPEN_CLIP_CONFIG in files and HUGGING_FACE_CONFIG not in files
        if reference.startswith("hf:") and is_open_clip:
            raise ValueError(
                f"{reference}: is open_clip's; download the repository, and load the folder"
            )
        if reference.startswith("hf:"):
            require_safetensors(reference, files)
    before = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    constants.HF_HUB_OFFLINE = answer is None
    logging.disable(logging.ERROR)  # they log what they raise, and that a new model is untrained
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # they advise options that are not ours
            yield
    except ImportError as error:
        raise ValueError(
            f"{reference}: pip install 'protoclip[teachers]' first ({line(str(error))})"
        ) from error
    except Misfit as error:
        raise ValueError(f"{reference}: {error}") from error
    except Exception as error:  # what these libraries raise has no common class
        if isinstance(error, ValueError) and str(error).startswith(("model.", f"{reference}: ")):
            raise  # it is ours, and says it all
        # What libraries cannot get is an OSError; any other ValueError is about the model.
        about_model = isinstance(error, ValueError) and not isinstance(error, OSError)
        if repository and answer is None and not about_model:
            raise unreachable(reference, way_out) from error
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{reference}: brings code of its own, which never runs here; choose another model"
            ) from error
        if "weights_only" in str(error):
            raise ValueError(
                f"{reference}: holds more than tensors, which could run code and is not read; save "
                "its weights as safetensors"
            ) from error
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{reference}: cannot be opened ({line(reason)})") from error
    finally:
        constants.HF_HUB_OFFLINE, logging.root.manager.disable = before
