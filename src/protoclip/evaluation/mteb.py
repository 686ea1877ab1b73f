"""Models in mteb's image-text tasks (MIEB): `pip install 'protoclip[mteb]'`.

mteb asks an encoder for `encode`, `similarity`, `similarity_pairwise` and `mteb_model_meta` alone.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from protoclip.data.decode import upright
from protoclip.encode.encoder import prepare_image
from protoclip.encode.features import Encoder
from protoclip.models import loading

Vectors = Tensor | npt.NDArray[Any]


class MtebModel:
    """Any model that `protoclip.load` takes, for `mteb.evaluate(MtebModel(REFERENCE), tasks)`.

    mteb has one prompt a class, no ensemble, and its own linear probe: do not compare its numbers
    with those of CLIP's papers or of `protoclip evaluate`. Raises as `protoclip.load`. Unless a
    device is named, the model runs on the GPU if there is one.
    """

    def __init__(self, reference: str | Path, *, device: str | None = None) -> None:
        self.reference = str(reference)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, transform, tokenizer = loading.load(reference)
        model = loading.to_device(model, torch.device(device))
        self.encoder = Encoder(model=model, transform=transform, tokenizer=tokenizer, workers=0)

    def encode(self, inputs: Iterable[Mapping[str, Any]], **facts: Any) -> Float[Tensor, "n d"]:
        """Features of any norm, on the CPU, of batches with a list of PIL images as `image`, of
        texts as `text`, or both.

        An image with a text gives the sum of both, as for the CLIP models of mteb. The model does
        not need mteb's facts about the task. Raises `ValueError` for a batch with neither.
        """
        return torch.cat([self._encode(batch) for batch in inputs])

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> Float[Tensor, "n m"]:
        """Cosines of all rows with all rows."""
        return unit(embeddings1) @ unit(embeddings2).T

    def similarity_pairwise(
        self, embeddings1: Vectors, embeddings2: Vectors
    ) -> Float[Tensor, " n"]:
        """Cosines of rows with rows."""
        return (unit(embeddings1) * unit(embeddings2)).sum(dim=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """Names the model by its reference, and its revision by a digest of weights and transform.

        So mteb never takes stored results of other weights for this model's.
        """
        from mteb.models import ModelMeta

        name = re.sub(r"[^\w.-]+", "-", self.reference).strip("-.")
        facts = {
            "name": f"protoclip/{name}",
            "revision": self.encoder.key,
            "modalities": ["image", "text"],
            "n_parameters": sum(parameter.numel() for parameter in self.encoder.model.parameters()),
            "framework": ["PyTorch"],
            "similarity_fn_name": "cosine",
        }
        return ModelMeta.create_empty(overwrites=facts)

    def _encode(self, batch: Mapping[str, Any]) -> Float[Tensor, "b d"]:
        features = []
        if "image" in batch:
            transform = self.encoder.transform
            images = [prepare_image(upright(image), transform) for image in batch["image"]]
            features.append(self.encoder.encode_inputs("image", images))
        if "text" in batch:
            features.append(self.encoder.encode_inputs("text", [*batch["text"]]))
        if not features:
            raise ValueError(f"{self.reference}: a batch has neither image nor text")
        return torch.stack(features).sum(dim=0)


def unit(vectors: Vectors) -> Float[Tensor, "*n d"]:
    return F.normalize(torch.as_tensor(np.asarray(vectors)).float(), dim=-1)
