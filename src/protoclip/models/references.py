"""Models that others trained or exported: open_clip's, Hugging Face's, the reference code's.

`protoclip.load` opens them; `OPENERS` lists the kinds of reference.
"""

import difflib
import json
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip import hf_configs
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import safe_open
from torch import Tensor, nn

from protoclip.config import HeadConfig
from protoclip.data.access import hub_answer
from protoclip.data.tables import line
from protoclip.data.transforms import LibraryTransform, PillowTransform
from protoclip.files import read_local, require_regular
from protoclip.models import towers
from protoclip.models.heads import projection_head
from protoclip.models.hugging_face import ImageTransform, open_config, open_model
from protoclip.models.lora import without_adapters
from protoclip.models.protoclip import ProtoCLIP, TowerPair
from protoclip.models.towers import Misfit, Tokenizer, examples_of
from protoclip.terminal import say

Loaded = tuple[TowerPair, ImageTransform, Tokenizer]

OPEN_CLIP_CONFIG, HUGGING_FACE_CONFIG = towers.OPEN_CLIP_CONFIG, "config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
HF_TEXT_KINDS = tuple(hf_configs.arch_dict)  # the text models that open_clip can hold
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# How the reference code names what is not a tower.
REFERENCE_NAMES = {
    "image_projection_head.": "image_head.",
    "text_projection_head.": "text_head.",
    "logit_scale_proto": "prototype_logit_scale",
}


def kind_of(reference: str) -> tuple[str, str]:
    """The kind of a reference and what it names; the kind is "run" if it is none of `OPENERS`."""
    kind, _, name = reference.partition(":")
    if name and kind in OPENERS:
        return kind, name
    for kind, file in (("local-dir", OPEN_CLIP_CONFIG), ("hf", HUGGING_FACE_CONFIG)):
        if (Path(reference) / file).is_file():
            return kind, reference
    return "run", reference


class CocaTowers(TowerPair):
    """CoCa normalises features unless it is told not to."""

    def encode_image(
        self, images: Float[Tensor, "b 3 h w"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        return self.towers.encode_image(images, normalize=normalize)  # type: ignore[operator,no-any-return]

    def encode_text(
        self, tokens: Int[Tensor, "b c"], normalize: bool = False
    ) -> Float[Tensor, "b d"]:
        return self.towers.encode_text(tokens, normalize=normalize)  # type: ignore[operator,no-any-return]


def open_clip_model(reference: str, name: str) -> Loaded:
    """`NAME/TAG`, `NAME/FILE` for weights in a file, or `NAME` for an untrained model."""
    published = check_open_clip_model(reference, name)
    name, _, tag = name.partition("/")
    repository = published.get("hf_hub", "").rpartition("/")[0]
    with readable_errors(reference, repository or text_repository(towers.named_config(name))):
        built = seeded(
            towers.named_towers,
            name,
            pretrained=tag if published else None,
            weights="published" if published else "new",
        )
        if tag and not published:
            open_clip.load_checkpoint(built, tag)
        tokenizer = towers.build_tokenizer(name)
    if not tag:
        say(f"note: {reference}: untrained, with seed 0; no weights are named")
    return open_clip_pair(built), open_clip_transform(built), tokenizer


def check_open_clip_model(reference: str, name: str) -> dict[str, Any]:
    """What open_clip knows of the weights; empty for those in a file, or new ones."""
    name, _, tag = name.partition("/")
    return published_weights(reference, name, "" if Path(tag).is_file() else tag)


def published_library(name: str, tag: str | None) -> AbstractContextManager[None]:
    """Reads open_clip's published weights for `model.pretrained`, from the hub if it answers."""
    published = open_clip.get_pretrained_cfg(name, tag) if tag else None
    repository = (published or {}).get("hf_hub", "").rpartition("/")[0]
    if not repository:
        return nullcontext()
    return readable_errors(f"model.pretrained: {name}/{tag}", repository)


def published_weights(reference: str, name: str, tag: str) -> dict[str, Any]:
    """What open_clip knows of its weights `tag`; empty without a tag."""
    require_model(reference, name)
    published: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if tag and not published:
        known = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"{reference}: open_clip has no weights '{tag}' for {name}; it has "
            f"{', '.join(known) or 'none'}"
        )
    return published


def open_clip_folder(reference: str, name: str) -> Loaded:
    """A folder with a model's configuration and weights, as open_clip's `local-dir:` reads it."""
    check_open_clip_folder(reference, name)
    folder = Path(name)
    with readable_errors(reference):
        config = json.loads(read_local(folder / OPEN_CLIP_CONFIG))["model_cfg"]
    text_files = own_text_files(folder)
    repository = "" if text_files else text_repository(config)
    with readable_errors(reference, repository):
        if wrong := misshapen(folder):  # open_clip would list every tensor
            raise Misfit(f"does not fit {OPEN_CLIP_CONFIG}: {examples_of(wrong)}")
        if text_files is None:
            built = seeded(open_clip.create_model, f"local-dir:{folder}")
        else:
            description = json.loads(read_local(folder / OPEN_CLIP_CONFIG))
            built = seeded(towers.described_towers, description, text_files=text_files)
            open_clip.load_checkpoint(built, str(open_clip_weights(folder)))
        tokenizer = towers.build_tokenizer(f"local-dir:{folder}")
    return open_clip_pair(built), open_clip_transform(built), tokenizer


def check_open_clip_folder(reference: str, name: str) -> None:
    if not (Path(name) / OPEN_CLIP_CONFIG).is_file():
        raise ValueError(f"{reference}: no folder with {OPEN_CLIP_CONFIG}")
    files = [path.name for path in Path(name).iterdir()]
    require_safetensors(reference, files, OPEN_CLIP_WEIGHTS)


def reference_checkpoint(reference: str, given: str) -> Loaded:
    """`FILE,model=NAME`: a checkpoint of the paper's reference code, of the open_clip model NAME.

    The code gives QuickGELU to all towers that are not timm's. Without projection heads in the
    file, as for its CLIP baselines, the model has none.
    """
    name, weights = reference_weights(reference, given)
    description = reference_description(name)
    with readable_errors(reference, text_repository(description["model_cfg"])):
        built = seeded(towers.described_towers, description)
        tokenizer = towers.build_tokenizer(name)
    model: TowerPair = TowerPair(built)
    if (heads := reference_heads(weights)) is not None:
        model = ProtoCLIP(built, projection_head(weights["image_head.0.weight"].shape[1], heads))
    if wrong := misfits(model, weights):
        raise ValueError(f"{reference}: does not fit {name}: {examples_of(wrong)}")
    model.load_state_dict(weights)
    return model.eval(), open_clip_transform(built), tokenizer


def reference_weights(reference: str, given: str) -> tuple[str, dict[str, Tensor]]:
    """The model's name and the weights, by our names, of `FILE,model=NAME`."""
    file, name = check_reference_checkpoint(reference, given)
    with readable_errors(reference):
        content = torch.load(file, map_location="cpu", weights_only=True)
        content = dict(content.get("state_dict", content))
    return name, {reference_name(key): value for key, value in content.items()}


def check_reference_checkpoint(reference: str, given: str) -> tuple[str, str]:
    """The file and the model's name of `FILE,model=NAME`."""
    file, separator, name = given.rpartition(",model=")
    if not separator:
        raise ValueError(f"{reference}: name its model too, as in reference:FILE,model=RN50")
    require_model(reference, name)
    if not Path(file).is_file():
        raise ValueError(f"{reference}: no such file")
    return file, name


def reference_description(name: str) -> dict[str, Any]:
    """An open_clip model as the reference code builds it, as in an `open_clip_config.json`."""
    config = towers.named_config(name)
    if "timm_model_name" not in config["vision_cfg"]:
        config["quick_gelu"] = True
    return {"model_cfg": config, "preprocess_cfg": {}}


def reference_heads(weights: Mapping[str, Tensor]) -> HeadConfig | None:
    """The projection heads in a checkpoint of the reference code, if there are any."""
    first, last = weights.get("image_head.0.weight"), weights.get("image_head.3.weight")
    if first is None or last is None:
        return None
    return HeadConfig(hidden_layers=1, hidden_dim=len(first), projection_dim=len(last))


def reference_name(key: str) -> str:
    """Our name of a tensor that the reference code saved."""
    key = key.removeprefix("module.")
    for theirs, ours in REFERENCE_NAMES.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return f"towers.{key}"


def hugging_face(reference: str, name: str, read: Callable[[str], Any] = open_model) -> Any:
    """A model of `transformers`, or what `read` makes of its name on the hub or its folder."""
    if local := Path(name).is_dir():
        require_safetensors(reference, [path.name for path in Path(name).iterdir()])
    elif not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise ValueError(f"{reference}: no such folder")
    with readable_errors(reference, "" if local else name):
        return seeded(read, name)


OPENERS: Mapping[str, Callable[[str, str], Loaded]] = {
    "open_clip": open_clip_model,
    "local-dir": open_clip_folder,
    "hf": hugging_face,
    "reference": reference_checkpoint,
}
# What refuses a reference that names no model, without reading weights.
CHECKS: Mapping[str, Callable[[str, str], Any]] = {
    "open_clip": check_open_clip_model,
    "local-dir": check_open_clip_folder,
    "hf": partial(hugging_face, read=open_config),
    "reference": check_reference_checkpoint,
}


def open_clip_pair(built: nn.Module) -> TowerPair:
    is_coca = isinstance(built, open_clip.CoCa)
    return (CocaTowers if is_coca else TowerPair)(built).eval()


def open_clip_transform(built: Any) -> ImageTransform:
    """What open_clip does to an image, so that its numbers come back; the usual case is ours."""
    settings = PreprocessCfg(**built.visual.preprocess_cfg)
    sides = settings.size if isinstance(settings.size, tuple | list) else [settings.size]
    usual = (settings.resize_mode, settings.interpolation) == ("shortest", "bicubic")
    if usual and len(set(sides)) == 1:
        mean, std = towers.image_normalisation(built)
        return PillowTransform(size=sides[0], mean=mean, std=std)
    apply = image_transform_v2(settings, is_train=False)
    return LibraryTransform(settings=str(settings), apply=apply)


def require_model(reference: str, name: str) -> None:
    known = {known.lower(): known for known in open_clip.list_models()}
    if name not in known.values():
        near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.3)
        closest = ", ".join(known[one] for one in near) or "none"
        raise ValueError(f"{reference}: open_clip has no model '{name}'; the closest: {closest}")


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


def open_clip_weights(folder: Path) -> Path:
    return next(folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file())


def own_text_files(folder: Path) -> Path | None:
    """An open_clip folder itself, if it has the configuration of its Hugging Face text tower.

    Then `hf_model_name` may name a place that is gone, as in a folder that was moved.
    """
    try:
        own = json.loads(read_local(folder / HUGGING_FACE_CONFIG))
        config = json.loads(read_local(folder / OPEN_CLIP_CONFIG))["model_cfg"]
        has = config["text_cfg"].get("hf_model_name") and own["model_type"] in HF_TEXT_KINDS
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if has else None


def misshapen(folder: Path) -> list[str]:
    """The tensors of an open_clip folder that are of another shape than its model's.

    Names that the model does not have may be of an older version, which open_clip still reads.
    """
    file = open_clip_weights(folder)
    description = json.loads(read_local(folder / OPEN_CLIP_CONFIG))
    with torch.device("meta"):
        files = own_text_files(folder)
        own = towers.described_towers(description, weights="none", text_files=files).state_dict()
    require_regular(file)
    with safe_open(file, "pt") as stored:
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    wrong = [name for name in shapes.keys() & own.keys() if [*own[name].shape] != shapes[name]]
    return sorted(name for name in wrong if "positional_embedding" not in name)


def misfits(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """The tensors that only the model or only the weights have, or that differ in shape."""
    own = without_adapters(model.state_dict())
    wrong = own.keys() ^ weights.keys()
    wrong |= {n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape}
    return sorted(wrong)


def seeded(build: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """What `build` makes with new weights of seed 0; the global random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build(*arguments, **settings)


def text_repository(config: Mapping[str, Any]) -> str:
    """Where on the hub the text tower or tokenizer of an open_clip model is; "" if nowhere."""
    text = config["text_cfg"]
    name = str(text.get("hf_model_name") or text.get("hf_tokenizer_name") or "")
    return "" if Path(name).is_absolute() else name


@contextmanager
def readable_errors(reference: str, repository: str = "") -> Iterator[None]:
    """Turn what other libraries raise into one line.

    They reach the hub only for a `repository`, and only if it answers within seconds; else they
    read what was downloaded before.
    """
    from huggingface_hub import HfApi, constants, errors

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
        if repository and answer is None:
            raise ValueError(
                f"{reference}: the hub does not answer, and there is no earlier download; check "
                "the network, HF_ENDPOINT and HF_HUB_OFFLINE"
            ) from error
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
