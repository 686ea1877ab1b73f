"""transformers.js computes what the model does, from an exported folder.

PROTOCLIP_TRANSFORMERS_JS is a folder in which `npm install @huggingface/transformers` was run;
without it, and without node, this is skipped.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import protoclip
from tiny_hugging_face import save_dual_encoder, save_siglip

PACKAGES = os.environ.get("PROTOCLIP_TRANSFORMERS_JS")
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "transformers_js.mjs"
TEXTS = ["a red square", "it is 2 cats, & a dog!"]
PIXELS = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)

pytestmark = pytest.mark.skipif(
    PACKAGES is None or shutil.which("node") is None,
    reason="needs node, and PROTOCLIP_TRANSFORMERS_JS",
)


@pytest.mark.parametrize("save", [save_siglip, save_dual_encoder])
def test_transformers_js_computes_the_same(save, tmp_path):
    """Its own image processor resizes images of the model's size not at all."""
    pytest.importorskip("onnxruntime")
    protoclip.export(f"hf:{save(tmp_path / 'model')}", tmp_path / "out", ["hf", "onnx"])
    model, transform, tokenizer = protoclip.load(tmp_path / "out")
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "image.png")
    pixels = transform(image)[None]
    request = {
        "folder": str(tmp_path / "out"),
        "images": [str(tmp_path / "image.png")],
        "captions": TEXTS,
        "pixels": {"dims": [*pixels.shape], "data": pixels.flatten().tolist()},
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        ["node", SCRIPT, PACKAGES, tmp_path / "request.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        image_features = model.encode_image(pixels)
        text_features = model.encode_text(tokenizer(TEXTS))
    for name, wanted in (
        ("image", image_features),
        ("own_image", image_features),
        ("text", text_features),
    ):
        torch.testing.assert_close(torch.tensor(found[name]), wanted, atol=1e-5, rtol=1e-5)
