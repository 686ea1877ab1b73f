"""What builds towers and a tokenizer, one dataclass a way to describe them: here open_clip's.

Those of `transformers` are in `hugging_face.py`, small towers and two halves in `halves.py`.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from protoclip.config import ModelConfig
from protoclip.models import towers
from protoclip.models.opening import readable_errors, text_repository
from protoclip.models.towers import Tokenizer, TowerKind, Weights


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
        raise NotImplementedError

    def tokenizer(self) -> Tokenizer:
        raise NotImplementedError


class DescribedTowers(Architecture):
    """open_clip's, by the content of an `open_clip_config.json`."""

    @property
    def open_clip_config(self) -> dict[str, Any]:
        assert self.towers_json is not None
        return dict(self.towers_json["model_cfg"])

    def towers(self, weights: Weights) -> nn.Module:
        assert self.towers_json is not None
        assert weights != "published"
        with self._hub():
            return towers.described_towers(
                self.towers_json, weights=weights, text_files=self.text_files, **self.sizes
            )

    def tokenizer(self) -> Tokenizer:
        length, source = self.sizes["context_length"], self.tokenizer_source
        with self._hub():
            return towers.described_tokenizer(
                self.open_clip_config["text_cfg"], context_length=length, source=source
            )

    def _hub(self) -> AbstractContextManager[None]:
        """Reads a text tower of Hugging Face from the hub, unless its files are here."""
        text = self.open_clip_config["text_cfg"]
        if self.text_files or not (text.get("hf_model_name") or text.get("hf_tokenizer_name")):
            return nullcontext()
        return readable_errors(
            f"model.start: {self.model.start}", text_repository(self.open_clip_config)
        )


class NamedTowers(Architecture):
    """open_clip's, by the name of a model and maybe the tag of its weights."""

    @property
    def open_clip_config(self) -> dict[str, Any]:
        return towers.named_config(str(self.model.name))

    def towers(self, weights: Weights) -> nn.Module:
        name, tag = str(self.model.name), self.model.pretrained
        repository = towers.repository_of(name, tag) if weights == "published" else ""
        reads = readable_errors(f"model.pretrained: {name}/{tag}", repository)
        with reads if repository else nullcontext():
            return towers.named_towers(name, pretrained=tag, weights=weights, **self.sizes)

    def tokenizer(self) -> Tokenizer:
        return towers.build_tokenizer(self.model.name, context_length=self.sizes["context_length"])
