"""Pairs that are only a number of rows and captions."""

from PIL import Image

from protoclip.data.pairs import Pairs, Sample
from testing import save_to_bytes


class Numbered(Pairs):
    """So many pairs, with so many different captions and equal images."""

    name = "numbered"

    def __init__(self, rows: int, captions: int, *, words: int = 1, side: int = 64) -> None:
        self.rows, self.captions, self.words = rows, captions, words
        self.image = save_to_bytes(Image.new("RGB", (side, 2 * side)))

    def __len__(self) -> int:
        return self.rows

    def sample_captions(self, row: int) -> tuple[str, ...]:
        return (f"{'caption ' * self.words}{row % self.captions}",)

    def sample(self, row: int) -> Sample:
        captions = self.sample_captions(row)
        return Sample(sample_id=str(row), image=self.image, captions=captions, where="nowhere")
