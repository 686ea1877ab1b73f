"""Files that appear whole, locks, and JSON objects with a checksum of themselves."""

import json
from pathlib import Path
from threading import Event, Thread

import pytest

from protoclip import files
from protoclip.files import has_changed, in_turn, read_sealed, seal, to_json


def test_an_object_knows_whether_it_changed(tmp_path: Path) -> None:
    """Whatever its values are, after a way through JSON; one without a checksum has not changed."""
    content = {"number": 0.1, "list": (1, float("nan")), "text": "ünïcode\u2028"}
    path = tmp_path / "a.json"
    path.write_text(to_json(seal(content), indent=2), encoding="utf-8")
    assert read_sealed(path) == {"number": 0.1, "list": [1, None], "text": "ünïcode\u2028"}
    written = json.loads(path.read_text(encoding="utf-8"))
    assert not has_changed(written)
    assert has_changed({**written, "number": 0.2})
    assert not has_changed({"number": 0.2})
    for text in (path.read_text(encoding="utf-8").replace("0.1", "0.2"), to_json(content)):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"a\.json: damaged .* checksum differs"):
            read_sealed(path)


def test_who_waits_for_a_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "QUIET_SECONDS", 0.05)
    path, done = tmp_path / "rows.npz", Event()

    def work() -> None:
        with in_turn(path):
            done.set()

    with in_turn(path):
        other = Thread(target=work)
        other.start()
        assert not done.wait(0.5)
    other.join(60)
    assert done.is_set()
    assert f"note: waiting for another process to finish with {path}" in capsys.readouterr().err
