"""What builds towers and a tokenizer, one dataclass a way to describe them: here open_clip's.

Those of `transformers` are in `hugging_face.py`, small towers and two halves in `halves.py`.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
from torch import nn

from protoclip.config import ModelConfig
from protoclip.models import towers
from protoclip.models.opening import readable_errors, text_repository
from protoclip.models.towers import OPEN_CLIP_CONFIG, Tokenizer, TowerKind, Weights


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Towers and their tokenizer.

    Attributes:
        model: The `[model]` section. Sizes that are None there are the architecture's own.
        towers_json: What describes the towers in `model.json`; None where `model` says it all.
        text_files: Folder of a Hugging Face text tower, which else is looked up by its name.
        tokenizer_source: Folder or hub name of the tokenizer, which else is looked up by its name.
    """

    model: ModelConfig
    towers_json: Mapping[str, Any] | None = None
    text_files: Path | None = None
    tokenizer_source: str | None = None

    @property
    def open_clip_config(self) -> dict[str, Any] | None:
        """open_clip's configuration of the model; None if it is one of `transformers`."""
        raise NotImplementedError

    @property
    def tower_kind(self) -> TowerKind | None:
        """The kind of the image tower; None for small towers that start untrained."""
        return towers.tower_kind((self.open_clip_config or {})["vision_cfg"])

    @property
    def embed_dim(self) -> int:
        """Width of the joint space."""
        return int((self.open_clip_config or {})["embed_dim"])

    @property
    def has_logit_bias(self) -> bool:
        """Whether the towers have the bias of the sigmoid loss."""
        return (self.open_clip_config or {}).get("init_logit_bias") is not None

    @property
    def sizes(self) -> dict[str, Any]:
        """`image_size` in pixels and `context_length` in tokens."""
        length = self.model.text.context_length
        return {"image_size": self.model.image.size, "context_length": length}

    def towers(self, weights: Weights) -> nn.Module:
        """Towers with new weights, or those that `model` names without a start: `published`."""
        with self._reading(self.repository(weights)):
            return self.read_towers(weights)

    def tokenizer(self) -> Tokenizer:
        with self._reading(self.repository("new")):
            return self.read_tokenizer()

    def repository(self, weights: Weights) -> str | None:
        """What is read from the hub; "" for a folder, and None if no other library reads."""
        raise NotImplementedError

    def read_towers(self, weights: Weights) -> nn.Module:
        raise NotImplementedError

    def read_tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    def reading_text_files(self, config: dict[str, Any]) -> dict[str, Any]:
        """open_clip's configuration of a model, whose text tower and tokenizer are in `text_files`
        if there are any, whatever they are called where the model was made."""
        config = deepcopy(config)
        if self.text_files is not None:
            names = {"hf_model_name", "hf_tokenizer_name"} & config["text_cfg"].keys()
            config["text_cfg"] |= dict.fromkeys(names, str(self.text_files))
        return config

    def _reading(self, repository: str | None) -> AbstractContextManager[None]:
        model = self.model
        setting = f"model.pretrained: {model.name}/{model.pretrained}"
        if model.pretrained is None:
            setting = f"model.name: {model.name}"
        if model.start is not None:
            setting = f"model.start: {model.start}"
        return nullcontext() if repository is None else readable_errors(setting, repository)


class DescribedTowers(Architecture):
    """open_clip's, by the content of an `open_clip_config.json`."""

    @property
    def open_clip_config(self) -> dict[str, Any]:
        assert self.towers_json is not None
        return self.reading_text_files(dict(self.towers_json["model_cfg"]))

    def repository(self, weights: Weights) -> str | None:
        return None if self.text_files else text_repository(self.open_clip_config)

    def read_towers(self, weights: Weights) -> nn.Module:
        assert self.towers_json is not None
        assert weights != "published"
        description = deepcopy(dict(self.towers_json))
        text, size = description["model_cfg"]["text_cfg"], self.sizes["image_size"]
        if text.get("hf_model_name"):
            text["hf_model_name"] = str(self.text_files or text["hf_model_name"])
            # open_clip would offer to run code.
            config = towers.transformers_config(text["hf_model_name"])
            if length := self.sizes["context_length"]:
                towers.require_length(length, config, "this model")
        towers.require_fitting_size(size, description["model_cfg"]["vision_cfg"], "this model")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # open_clip warns that there are no weights
        with TemporaryDirectory() as folder, ExitStack() as stack:
            stack.callback(logging.disable, before)
            Path(folder, OPEN_CLIP_CONFIG).write_text(json.dumps(description), encoding="utf-8")
            built: nn.Module = open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=False,
                pretrained_text=False,
                device="meta" if weights == "none" else "cpu",
                force_image_size=size,
                force_context_length=self.sizes["context_length"],
            )
        towers.set_trunk_size(built, size, "this model")
        return built

    def read_tokenizer(self) -> Tokenizer:
        text, length = self.open_clip_config["text_cfg"], self.sizes["context_length"]
        return towers.described_tokenizer(text, context_length=length, source=self.tokenizer_source)


class NamedTowers(Architecture):
    """open_clip's, by the name of a model and maybe the tag of its weights.

    They read images normalised as these weights need, and have QuickGELU where these were trained
    with it, also while their own weights are new.
    """

    @property
    def open_clip_config(self) -> dict[str, Any]:
        return self.reading_text_files(towers.named_config(str(self.model.name)))

    def repository(self, weights: Weights) -> str | None:
        name, tag = str(self.model.name), self.model.pretrained
        published = towers.repository_of(name, tag) if weights == "published" else ""
        text = None if self.text_files else text_repository(self.open_clip_config)
        return published or text

    def read_towers(self, weights: Weights) -> nn.Module:
        name, tag, size = str(self.model.name), self.model.pretrained, self.sizes["image_size"]
        towers.require_fitting_size(size, self.open_clip_config["vision_cfg"], name)
        text, length = self.open_clip_config["text_cfg"], self.sizes["context_length"]
        if text.get("hf_model_name") and length:
            config = towers.transformers_config(text["hf_model_name"])
            towers.require_length(length, config, name)
        known = {} if tag is None else towers.published_weights(name, tag)
        is_published = weights == "published"
        built: nn.Module = open_clip.create_model(
            name,
            pretrained=tag if is_published else None,
            pretrained_text=is_published,
            device="meta" if weights == "none" else "cpu",
            force_quick_gelu=bool(known.get("quick_gelu")),
            force_preprocess_cfg=None if is_published else known or None,
            force_image_size=size,
            force_context_length=length,
            **self.text_of_files(),
        )
        towers.set_trunk_size(built, size, name)
        return built

    def text_of_files(self) -> dict[str, Any]:
        """What open_clip is told of a text tower in `text_files`, instead of what the name says."""
        if self.text_files is None:
            return {}
        length = self.sizes["context_length"]
        text = {**self.open_clip_config["text_cfg"], "hf_model_pretrained": False}
        return {"text_cfg": text | ({} if length is None else {"context_length": length})}

    def read_tokenizer(self) -> Tokenizer:
        text, length = self.open_clip_config["text_cfg"], self.sizes["context_length"]
        if self.text_files is None:
            return towers.build_tokenizer(self.model.name, context_length=length)
        return towers.described_tokenizer(text, context_length=length, source=self.tokenizer_source)
