"""Images and captions without partner: the plan that joins them, and the files they come from."""

import gzip

import pytest
import torch
import torch.nn.functional as F

from protoclip.data.tables import read_texts
from protoclip.encode.unpaired import WEIGHT, solve_transport, transport


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_plan_gives_each_image_and_each_text_its_share():
    plan = solve_transport(0.1 * draw(30, 50).clamp(-3, 3))
    torch.testing.assert_close(plan.sum(0), torch.full((50,), 1 / 50))
    torch.testing.assert_close(plan.sum(1), torch.full((30,), 1 / 30), rtol=1e-2, atol=0)


def test_a_plan_finds_partners_that_cosines_alone_do_not():
    """A text that is near to all images is the nearest of most, but gets the share of one."""
    images = F.normalize(draw(40, 12), dim=1)
    texts = F.normalize(images + 0.1 * draw(40, 12, seed=1), dim=1)
    cosines = images @ texts.T
    cosines[:, 7] += 1.0
    own = torch.arange(40)
    assert (cosines.argmax(1) == own).float().mean() < 0.5
    assert (solve_transport(cosines).argmax(1) == own).float().mean() > 0.9


def test_moments_are_sums_over_the_plan():
    images, texts, maps = draw(20, 5), draw(30, 4, seed=1), (draw(5, 3), draw(4, 3, seed=2))
    cosines = F.normalize(images @ maps[0], dim=1) @ F.normalize(texts @ maps[1], dim=1).T
    plan, made = solve_transport(cosines).double(), transport(maps, images, texts)
    assert made.samples == round(WEIGHT * 20)
    cross, text = torch.zeros(5, 4).double(), torch.zeros(4, 4).double()
    for j, y in enumerate(texts.double()):
        text += torch.outer(y, y) / 30 * made.samples
        for i, x in enumerate(images.double()):
            cross += plan[i, j] * torch.outer(x, y) * made.samples
    torch.testing.assert_close(made.cross, cross, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.text, text)
    torch.testing.assert_close(made.sum_of_texts, texts.double().mean(0) * made.samples)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions", "\ufeffa dog\r\n\n a cat, asleep \na dog\n"),
        ("captions.tsv", "title\tcaption\nno\ta dog\nno\ta cat, asleep\n"),
        ("captions.csv.gz", 'caption\na dog\n"a cat, asleep"\n'),
        ("captions.jsonl", '{"captions": ["a dog", "a cat, asleep"]}\n{"captions": null}\n'),
    ],
)
def test_captions_come_from_text_files_and_tables(name, content, tmp_path):
    raw, file = content.encode(), tmp_path / name
    file.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert read_texts(str(file)) == (["a dog", "a cat, asleep"], [])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n \n", "holds no caption; write one a line"),
        ("a.txt", b"caf\xe9\n", "cannot be read (.*utf-8.*)"),
        ("a.csv", b"name\na dog\n", "no column with captions; .* it has 'name'"),
        ("a.csv", b"", "no column with captions; .* it has none"),
    ],
)
def test_a_file_without_captions_is_refused(name, content, said, tmp_path):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file}: {said}"):
        read_texts(str(file))


def test_bad_lines_of_a_table_are_left_out_and_said(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_bytes(b"caption\nred\tblue\ncaf\xe9\na dog\n")
    captions, notes = read_texts(str(file))
    assert captions == ["a dog"]
    assert len(notes) == 2
