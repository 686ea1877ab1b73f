"""The record of bad samples."""

import json
from pathlib import Path

from protoclip.data.skips import SkipLog

from protoclip.data.pairs import BadSample


def bad(name: str) -> BadSample:
    return BadSample(sample_id=name, where=name, reason="damaged")


def test_skipped_samples_are_known_again_whatever_their_names(tmp_path: Path) -> None:
    """Names may hold Unicode line breaks. A note counts damaged lines, which are passed over."""
    path = tmp_path / "skipped.jsonl"
    names = ["a\u2028b.png", "c\x85d.png", "e\nf.png"]
    log = SkipLog(path, max_share=1.0, at_least=1)
    log.add(9, [bad(name) for name in names])
    assert SkipLog(path, max_share=1.0, at_least=1).notes == []
    with path.open("ab") as file:
        file.write(b'garbage\n[1]\n\xff\n{"sample_id": "g.p')
    log = SkipLog(path, max_share=1.0, at_least=1)
    assert log.distinct == 3
    (note,) = log.notes
    assert str(path) in note
    assert "4" in note.removeprefix(str(path))
    log.add(9, [bad(names[0]), bad("h.png")])
    assert log.distinct == 4
    assert SkipLog(path, max_share=1.0, at_least=1).distinct == 4
    assert json.loads(path.read_bytes().split(b"\n")[-2])["sample_id"] == "h.png"
