"""`scripts/distil_text.py` writes an encoder that `align` opens, near its teacher in both
languages."""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from protoclip.encode.encoder import open_encoder
from tiny_hugging_face import save_bert

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
import distil_text  # noqa: E402

COLOURS, THINGS = ("red", "blue", "green", "black"), ("cat", "dog", "ball", "tree")
CZECH = {"red": "rudá", "blue": "modrá", "green": "zelená", "black": "černá", "cat": "kočka"}
CZECH |= {"dog": "fena", "ball": "koule", "tree": "bříza"}


def test_both_languages_find_the_vectors_of_the_teacher(tmp_path, monkeypatch, capsys):
    words = dict(zip(CZECH, torch.eye(32), strict=False))
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS]
    targets = F.normalize(torch.stack([words[a] + words[b] for a, b in pairs]), dim=1)
    monkeypatch.setattr(distil_text, "encode_sentences", lambda teacher, sentences: targets)
    rows = [{"en": f"{a} {b}", "cs": f"{CZECH[a]} {CZECH[b]}"} for a, b in pairs]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "sentences.jsonl").write_text(lines, encoding="utf-8")
    arguments = [str(tmp_path / "sentences.jsonl"), str(tmp_path / "czech"), "--new=cs"]
    options = ["--passes=100", "--vocabulary=200", "--held_out=2", "--learning_rate=0.01"]
    monkeypatch.setattr(sys, "argv", ["distil_text.py", *arguments, *options])
    distil_text.main()

    cpu = torch.device("cpu")
    student = open_encoder(f"hf:{tmp_path / 'czech'}", modality="text", pooling="mean", device=cpu)
    for language in ("en", "cs"):
        vectors = student.encode([row[language] for row in rows])
        assert (vectors @ targets.T).argmax(dim=1).tolist() == list(range(16)), language
    assert "2 of 2 find their translation" in capsys.readouterr().out


def test_vectors_are_those_of_the_teacher_in_the_order_of_sentences(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    teacher = f"hf:{save_bert(tmp_path / 'teacher')}"
    sentences = ["a red dog by a tall tree", "a cat", "a red dog by a tall tree", "two balls"]
    encoder = open_encoder(teacher, modality="text", pooling="mean", device=torch.device("cpu"))
    for _ in range(2):  # the second time from the cache
        vectors = distil_text.encode_sentences(teacher, sentences)
        assert torch.allclose(vectors, encoder.encode(sentences), atol=1e-5)
