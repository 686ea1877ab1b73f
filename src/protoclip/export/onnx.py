"""Image and text tower as ONNX graphs, with the names that transformers.js expects.

The settings and the tokenizer that transformers.js reads with them come from `huggingface.py`.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from protoclip.export.source import Features, Source, Unavailable
from protoclip.models.protoclip import TowerPair
from protoclip.models.transformers import MASKED_KIND, HuggingFaceTowers

FOLDER = "onnx"
LEAST_OPSET = 18  # the oldest that torch exports to
LARGEST = 1_900_000_000  # bytes of weights that fit into one file


class ImageGraph(nn.Module):
    def __init__(self, model: TowerPair) -> None:
        super().__init__()
        self.towers: Any = model.towers
        self.settings = model.settings

    def forward(self, pixel_values: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return self.towers.encode_image(pixel_values, **self.settings)  # type: ignore[no-any-return]


class TextGraph(nn.Module):
    def __init__(self, model: TowerPair) -> None:
        super().__init__()
        self.towers: Any = model.towers
        self.settings = model.settings

    def forward(
        self, input_ids: Int[Tensor, "b c"], attention_mask: Int[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Takes a mask if the text tower must not read padding."""
        if attention_mask is None:
            return self.towers.encode_text(input_ids, **self.settings)  # type: ignore[no-any-return]
        return self.towers.text(  # type: ignore[no-any-return]
            input_ids=input_ids, attention_mask=attention_mask
        )


def write_graphs(source: Source, folder: Path, *, opset: int = LEAST_OPSET) -> str:
    """Write `vision_model.onnx` and `text_model.onnx`; returns the opset.

    The batch has any size; images and captions have the model's sizes.

    Raises:
        Unavailable: The model reads images that do not fit into one tensor of pixels.
    """
    towers, length = source.towers, source.context_length
    kind = towers.kind if isinstance(towers, HuggingFaceTowers) else ""
    if kind == "siglip2":
        raise Unavailable("it reads images as patches, whose number differs by image")
    size = source.image_size
    tokens = torch.ones(2, length, dtype=torch.long)
    inputs = {"input_ids": tokens}
    if kind == MASKED_KIND:
        inputs["attention_mask"] = torch.ones_like(tokens)
    images = {"pixel_values": torch.zeros(2, 3, size, size)}
    (folder / FOLDER).mkdir()
    image, text = ImageGraph(source.model), TextGraph(source.model)
    write_graph(image, images, "image_embeds", folder / FOLDER / "vision_model.onnx", opset)
    write_graph(text, inputs, "text_embeds", folder / FOLDER / "text_model.onnx", opset)
    return f"opset {opset}"


def write_graph(
    module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path, opset: int
) -> None:
    torch.onnx.export(
        module.eval(),
        tuple(inputs.values()),
        str(path),
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes={name: {0: "batch"} for name in inputs},
        opset_version=opset,
        external_data=sum(value.nbytes for value in module.state_dict().values()) > LARGEST,
        dynamo=True,
        verbose=False,
    )


def embed_samples(
    folder: Path, images: Float[Tensor, "n 3 h w"], tokens: Int[Tensor, "m c"]
) -> Features:
    """Features that ONNX Runtime computes from the folder; masked padding has token -1."""
    import onnxruntime

    def run_graph(name: str, inputs: dict[str, Tensor]) -> Tensor:
        graph = str(folder / FOLDER / name)
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        arrays = {node.name: inputs[node.name].numpy() for node in session.get_inputs()}
        return torch.from_numpy(session.run(None, arrays)[0])

    mask = tokens >= 0
    text = {"input_ids": tokens.clamp(min=0), "attention_mask": mask.long()}
    return Features(
        image=run_graph("vision_model.onnx", {"pixel_values": images.contiguous()}),
        text=run_graph("text_model.onnx", text),
    )
