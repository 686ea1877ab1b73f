"""`scripts/distil_text.py` writes an encoder that `align` opens, near its teacher in both
languages."""

import json
import sys
from pathlib import Path

import torch
from tiny_hugging_face import save_bert

from protoclip.encode.encoder import open_encoder

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
import distil_text  # noqa: E402


def test_both_languages_learn_the_vectors_of_the_teacher(tmp_path, monkeypatch):
    colours, things = ("red", "blue", "green", "black"), ("cat", "dog", "ball", "tree")
    cs = {"red": "rudá", "blue": "modrá", "green": "zelená", "black": "černá", "cat": "kočka"}
    cs |= {"dog": "fena", "ball": "koule", "tree": "bříza"}
    rows = [{"en": f"{a} {b}", "cs": f"{cs[a]} {cs[b]}"} for a in colours for b in things]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "sentences.jsonl").write_text(lines, encoding="utf-8")
    teacher, out = save_bert(tmp_path / "teacher"), tmp_path / "czech"
    options = [f"--teacher=hf:{teacher}", "--new=cs", "--width=32", "--layers=1", "--passes=250"]
    arguments = ["distil_text.py", str(tmp_path / "sentences.jsonl"), str(out), *options]
    monkeypatch.setattr(sys, "argv", [*arguments, "--vocabulary=200"])
    distil_text.main()
    cpu = torch.device("cpu")
    student = open_encoder(f"hf:{out}", modality="text", pooling="mean", device=cpu)
    known, new = (student.encode([row[language] for row in rows]) for language in ("en", "cs"))
    assert known.shape == (16, 32)
    similarities = new @ known.T
    assert (similarities.argmax(dim=1) == torch.arange(16)).float().mean() > 0.8
