"""timm's image models as towers: their names, sizes, pooling, and weights."""

import difflib
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name
from timm.models import PretrainedCfg, load_state_dict
from torch import Tensor

from protoclip.data.access import hub_answer
from protoclip.models.opening import examples_of, misfits, readable_errors, unreachable
from protoclip.models.protoclip import evaluation_mode
from protoclip.rules import require_path

PUBLISHED = "published"


def require_image_name(name: str) -> None:
    """Refuse a name that is no timm model, with or without the tag of its weights."""
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise ValueError(f"model.image.name: {name}: no such folder")
    if not timm.is_model_pretrained(name) and name not in timm.list_models():
        names = timm.list_models()
        near = difflib.get_close_matches(name.partition(".")[0], names, n=4, cutoff=0.3)
        closest = ", ".join(near) or "none"
        raise ValueError(f"model.image.name: timm has no model '{name}'; the closest: {closest}")


def timm_settings(name: str) -> PretrainedCfg:
    """What timm knows of the weights of a model: their images, and where they are."""
    require_image_name(name)
    return timm.get_pretrained_cfg(name) or PretrainedCfg()


@cache
def find_pooling(name: str, given: str | None, *, has_weights: bool) -> str:
    """How a timm model pools the places of an image: as given, or as its weights need.

    That is the mean (`avg`) if they learned with it, or if there are none. A class token, or a
    layer of attention, is a part of what weights have learned (`own`).
    """
    if given == "own":
        return given
    require_image_name(name)
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    model.reset_classifier(0)
    default = repr(model), str(getattr(model, "global_pool", ""))
    try:
        model.reset_classifier(0, global_pool="avg")
    except (AssertionError, TypeError, ValueError):
        if given == "avg":
            mistake = f"model.image.pooling: timm has no mean for {name}; leave it out"
            raise ValueError(mistake) from None
        return "own"
    is_mean = default == (repr(model), str(getattr(model, "global_pool", "")))
    return "avg" if is_mean or given == "avg" or not has_weights else "own"


def classifier_names(model: Any) -> tuple[str, ...]:
    """Beginnings of the names of a timm model's classifier."""
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def read_image_weights(name: str, weights: str, size: int, pool: str) -> dict[str, Tensor]:
    """Weights of a timm model without its classifier, for images of `size` pixels.

    `weights` are `published` or a file; `pool` is as open_clip names it, or "" for the model's own.
    """
    reference = f"model.image.weights: {weights}"
    model: Any
    published = timm_settings(name)
    if weights == PUBLISHED:
        if not published.has_weights:
            raise ValueError(f"{reference}: timm has no weights for {name}; name a file")
        with readable_errors(*describe_published(name)):
            model = timm.create_model(name, pretrained=True)
    else:
        missing = f"no such file; weights are '{PUBLISHED}' or a file"
        require_path("model.image.weights", weights, missing)
        model = timm.create_model(name)
        with readable_errors(reference):
            values = load_state_dict(weights, weights_only=True)
        names = classifier_names(model)
        trunk = {key: value for key, value in values.items() if not key.startswith(names)}
        model.reset_classifier(0)
        if wrong := misfits(model, trunk):
            raise ValueError(f"{reference}: does not fit {name}: {examples_of(wrong)}")
        model.load_state_dict(trunk)
    model.reset_classifier(0, **({"global_pool": pool} if pool else {}))
    set_input_size(model, size, name)
    state: dict[str, Tensor] = model.state_dict()
    return state


def describe_published(name: str) -> tuple[str, str]:
    """How errors name timm's weights of a model, and where the hub has them."""
    reference = f"model.image.weights: {PUBLISHED} weights of {name}"
    return reference, timm_settings(name).hf_hub_id or ""


def require_published(name: str) -> None:
    """Refuse published weights of a model that cannot be had, before any work is done for them."""
    reference, repository = describe_published(name)
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    is_cached = not repository or folder.is_dir()
    if not is_cached and hub_answer(partial(HfApi().model_info, repository)) is None:
        raise unreachable(reference)


def require_multiple(size: int, patch: int, name: str) -> None:
    """Refuse an image size that the patches of an image tower do not divide."""
    if size % patch:
        raise ValueError(
            f"model.image.size: {size} is no multiple of the {patch} pixels of a patch of {name}"
        )


def set_input_size(trunk: Any, size: int, name: str) -> None:
    """Set the image size of a timm transformer; convolutional models take any size."""
    if hasattr(trunk, "set_input_size"):
        patch = max(getattr(getattr(trunk, "patch_embed", None), "patch_size", (1,)))
        require_multiple(size, patch, name)
        trunk.set_input_size(img_size=(size, size))
        return
    settings = getattr(trunk, "pretrained_cfg", None) or {}
    native_size = settings.get("input_size", (3, size))[-1]
    if native_size == size or not settings.get("fixed_input_size"):
        return
    try:
        with evaluation_mode(trunk):
            trunk(torch.zeros(1, 3, size, size, device=next(trunk.parameters()).device))
    except Exception as error:  # each of timm's models has its own
        raise ValueError(
            f"model.image.size: {name} cannot read images of {size} pixels; its own are of "
            f"{native_size}"
        ) from error
