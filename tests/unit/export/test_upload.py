"""Uploading an exported folder to a hub, which here is a web server of this process."""

import base64
import http.server
import io
import json
import re
from contextlib import suppress
from typing import Any, ClassVar

import huggingface_hub
import open_clip
import pytest
import yaml

import protoclip
from protoclip.cli import main
from protoclip.data import access
from tiny_hugging_face import save_bert
from tiny_starts import CLIP


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's API that an upload needs; all files are small ones."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    refuses = False

    def do_GET(self) -> None:
        if listed := re.match("/api/models/(.+)/tree/main", self.path):
            facts = {"type": "file", "oid": "0", "size": 1}
            self.answer([{**facts, "path": path} for path in self.repositories[listed[1]]], 200)
            return
        is_whoami = self.path == "/api/whoami-v2"
        self.answer({"name": "me", "type": "user", "orgs": []} if is_whoami else {}, 200)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuses:
            self.answer({"error": "You have no\nwrite access"}, 403)
        elif self.path == "/api/repos/create":
            name = f"me/{json.loads(sent)['name']}"
            self.repositories.setdefault(name, {})
            self.answer({"url": f"http://{self.headers['Host']}/{name}"}, 200)
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []}, 200)
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(sent)["files"]
            ]
            self.answer({"files": files}, 200)
        else:
            name = re.match("/api/models/(.+)/commit/main", self.path)[1]
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[name][line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/{name}/commit/0"
            self.answer({"commitUrl": url, "commitOid": "0", "success": True}, 200)

    def answer(self, content: Any, code: int) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


class Refusing(Hub):
    refuses = True


@pytest.fixture
def use_hub(serve, monkeypatch):
    """Makes a server the hub."""

    def use(handler: Any) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", serve(handler))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(access, "HUB_SECONDS", 5.0)
        monkeypatch.setenv("HF_TOKEN", "hf_none")

    return use


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", CLIP)
    return "open_clip:tiny"


def test_the_hub_gets_every_file(use_hub, model, tmp_path, capsys):
    """What else is there stays, and is told."""
    use_hub(Hub)
    Hub.repositories.clear()
    folder = tmp_path / "out"
    facts = protoclip.export(model, folder, push_to_hub="me/model")
    assert "also holds" not in capsys.readouterr().err
    assert facts["url"].endswith("/me/model")
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    found = Hub.repositories["me/model"]
    assert found == {name: path.read_bytes() for name, path in files.items()}
    assert b'snapshot_download("me/model")' in found["README.md"]
    protoclip.export(model, tmp_path / "less", ["open_clip"], push_to_hub="me/model")
    assert "me/model also holds" in (said := capsys.readouterr().err)
    assert "such as config.json (" in said


def test_a_text_tower_is_looked_up_where_the_folder_is_uploaded(use_hub, monkeypatch, tmp_path):
    """Its files are among those that the hub gets."""
    use_hub(Hub)
    bert = str(save_bert(tmp_path / "bert"))
    names = {"hf_model_name": bert, "hf_tokenizer_name": bert}
    text = {**names, "context_length": 12, "hf_proj_type": "linear"}
    vision = {"timm_model_name": "resnet10t", "image_size": 32}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "with-bert", config)
    protoclip.export(
        "open_clip:with-bert", tmp_path / "out", ["open_clip"], push_to_hub="me/with-bert"
    )
    found = Hub.repositories["me/with-bert"]
    described = json.loads(found["open_clip_config.json"])["model_cfg"]["text_cfg"]
    assert {described[name] for name in names} == {"me/with-bert"}
    assert json.loads(found["config.json"])["model_type"] == "bert"
    assert "tokenizer.json" in found
    # Where it is not uploaded, the folder itself.
    for name, agrees in (("refused", True), ("declined", False)):
        use_hub(Refusing)
        with suppress(ValueError):
            protoclip.export(
                "open_clip:with-bert",
                tmp_path / name,
                ["open_clip"],
                push_to_hub="me/with-bert",
                agrees=lambda card, agrees=agrees: agrees,
            )
        text = json.loads((tmp_path / name / "open_clip_config.json").read_text())
        assert text["model_cfg"]["text_cfg"]["hf_model_name"] == str(tmp_path / name)


def test_a_hub_that_takes_nothing_is_one_line(use_hub, model, tmp_path, capsys):
    use_hub(Refusing)
    folder = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(f"export {model} {folder} --formats open_clip --push-to-hub me/model --yes".split())
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("protoclip: error: me/model: not uploaded (")
    assert (folder / "open_clip_model.safetensors").is_file()


@pytest.mark.parametrize(("answer", "uploaded"), [("y\n", True), ("\n", False)])
def test_the_card_is_shown_before_it_is_uploaded(
    answer, uploaded, use_hub, model, tmp_path, monkeypatch, capsys
):
    use_hub(Hub)
    Hub.repositories.clear()
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    licence = "mit\n---\npwn: true"
    words = ["export", model, str(tmp_path / "out"), "--formats", "open_clip"]
    main([*words, "--push-to-hub", "me/model", "--license", licence])
    said = capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(line in said for line in card.splitlines())
    assert ("me/model" in Hub.repositories) is uploaded
    # The front matter is one document that holds the licence as it was given.
    front = yaml.safe_load(card.split("\n---\n")[0])
    assert front["license"] == "other"
    assert front["license_name"] == licence.replace("\n", r"\n")
    assert "pwn" not in front
