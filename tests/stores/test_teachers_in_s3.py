"""Features of a teacher in an S3 bucket: fetched once, whole, and anew when they change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protoclip.encode import teachers as fetched
from protoclip.encode.teachers import StoredFeatures, read_teacher, write_folder
from protoclip.files import to_json

IDS = ["a", "b", "c"]


def put_teacher(store: Any, folder: Path, *, times: float = 1.0, checked: bool = True) -> str:
    folder.mkdir()
    features = times * np.arange(6, dtype=np.float32).reshape(3, 2)
    facts = write_folder(folder, IDS, [features], {"modality": "text"})
    if not checked:  # as earlier versions wrote it
        (folder / "checksums.npy").unlink()
        (folder / "facts.json").write_text(to_json(facts))
    url: str = store.upload(folder, "teacher")
    return url


def rows_of(teacher: StoredFeatures) -> list[list[float]]:
    rows: list[list[float]] = teacher.rows(IDS).tolist()
    return rows


def test_a_teacher_folder_is_fetched_once_and_anew_when_it_changes(store, tmp_path, capsys):
    url = put_teacher(store, tmp_path / "first")
    for _ in range(2):  # as two ranks do
        teacher = read_teacher(url)
        assert rows_of(teacher) == [[0, 1], [2, 3], [4, 5]]
        assert (teacher.modality, teacher.name.partition(",")[0]) == ("text", url)
    assert store.requests.count("GET /bucket/teacher/features.npy") == 1
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: {url} is copied to {tmp_path}")
    put_teacher(store, tmp_path / "second", times=2.0)
    assert rows_of(read_teacher(url)) == [[0, 2], [4, 6], [8, 10]]


def test_a_file_of_features_is_fetched_with_its_ids(store, tmp_path):
    np.save(tmp_path / "mine.npy", np.eye(3, dtype=np.float32))
    url = store.put("mine.npy", (tmp_path / "mine.npy").read_bytes())
    with pytest.raises(ValueError, match=r"^s3://bucket/mine\.ids\.txt: no such file$"):
        read_teacher(url)
    store.put("mine.ids.txt", "\n".join(IDS).encode())
    assert rows_of(read_teacher(url)) == np.eye(3).tolist()


def test_what_changes_while_it_is_fetched_is_not_taken(store, tmp_path, monkeypatch):
    """Nor is a folder that is damaged there."""
    url, download = put_teacher(store, tmp_path / "made"), fetched.download

    def and_change(location: str, copy: Path) -> None:
        download(location, copy)
        if copy.name == "features.npy":  # the last
            store.put("teacher/facts.json", b"{}")

    with monkeypatch.context() as patch:
        patch.setattr(fetched, "download", and_change)
        with pytest.raises(ValueError, match=f"^{url}: changed while it was fetched; give the sam"):
            read_teacher(url)
    put_teacher(store, tmp_path / "again")
    store.put("teacher/features.npy", store.read("teacher/features.npy")[:-1])
    with pytest.raises(ValueError, match=rf"^{url}: damaged \(.*protoclip embed-teacher again$"):
        read_teacher(url)
