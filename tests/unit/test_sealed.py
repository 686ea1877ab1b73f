"""Files that appear whole, and JSON objects with a checksum of themselves."""

import json
from pathlib import Path

import pytest

from protoclip.files import has_changed, read_sealed, sealed, to_json, write_atomically


def test_an_object_knows_whether_it_changed(tmp_path: Path) -> None:
    """Whatever its values are, after a way through JSON; one without a checksum has not changed."""
    content = {"number": 0.1, "list": (1, float("nan")), "text": "ünïcode\u2028"}
    path = tmp_path / "a.json"
    path.write_text(to_json(sealed(content), indent=2), encoding="utf-8")
    assert read_sealed(path) == {"number": 0.1, "list": [1, None], "text": "ünïcode\u2028"}
    written = json.loads(path.read_text(encoding="utf-8"))
    assert not has_changed(written)
    assert has_changed({**written, "number": 0.2})
    assert not has_changed({"number": 0.2})
    for text in (path.read_text(encoding="utf-8").replace("0.1", "0.2"), to_json(content)):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"a\.json: damaged .* checksum differs"):
            read_sealed(path)


def test_an_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the temporary one, which a folder that became read-only does not let go either."""

    def refuse(self: Path, *given: object, **more: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=r"Read-only file system: '[^']*/a\.json'$"):
        write_atomically(tmp_path / "a.json", "{}")
