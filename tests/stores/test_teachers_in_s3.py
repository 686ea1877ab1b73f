"""Features of a teacher in an S3 bucket: fetched once, whole, and anew when they change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protoclip.encode.teachers import TeacherFeatures, read_teacher, write_folder

IDS = ["a", "b", "c"]


def put_teacher(store: Any, folder: Path, *, times: float = 1.0) -> str:
    folder.mkdir()
    features = times * np.arange(6, dtype=np.float32).reshape(3, 2)
    write_folder(folder, IDS, [features], {"modality": "text"})
    url: str = store.upload(folder, "teacher")
    return url


def rows_of(teacher: TeacherFeatures) -> list[list[float]]:
    rows: list[list[float]] = teacher.rows(IDS).tolist()
    return rows


def test_a_teacher_folder_is_fetched_once_and_anew_when_it_changes(store, tmp_path, capsys):
    url = put_teacher(store, tmp_path / "first")
    for _ in range(2):  # as two ranks do
        teacher = read_teacher(url)
        assert rows_of(teacher) == [[0, 1], [2, 3], [4, 5]]
        assert teacher.modality == "text"
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
