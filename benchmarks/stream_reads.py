"""How many samples of a stream does a rank read for each that it trains on?

One of 8 and one of 64 ranks, with the default sizes: 131,072 pairs an episode, 4,096 samples in
`data.shuffle_buffer`, and shards of 10,000 samples, as img2dataset writes them. Samples are counted
as they come from shards, also those of shards that are begun anew and of blocks that are read
ahead. Nothing is decoded, and shards are no files.

    python benchmarks/stream_reads.py > FILE
"""

import datetime
from collections.abc import Iterator

import torch

from protoclip.data.loader import EpisodeLoader, Pass
from protoclip.data.pairs import Sample
from protoclip.data.sampler import EXTRACTION_STREAM, TRANSFORM_STREAM, Episode
from protoclip.data.shards import ShardStream
from protoclip.data.transforms import EvaluationTransform

EPISODE, BATCH, SHARD = 131_072, 4096, 10_000
TRANSFORM = EvaluationTransform(size=8, mean=(0.0,) * 3, std=(1.0,) * 3)


class Counted(ShardStream):
    """Shards that hold the same samples, and are counted."""

    read_samples = 0

    def read(self, shard: str) -> Iterator[Sample]:
        for number in range(SHARD):
            self.read_samples += 1
            yield Sample(sample_id=str(number), image=b"", captions=("a",), where=shard)


def reads(ranks: int, episodes: int, *, extracts: bool) -> float:
    """Samples read for each that is trained on; the first episode is without prototypes."""
    stream = Counted("https://host/{00000..09999}.tar", seed=0, lanes=ranks)
    loader = EpisodeLoader(
        pairs=stream,
        tokenizer=lambda captions: torch.zeros(len(captions), 4),
        transform=TRANSFORM,
        batch_size=BATCH // ranks,
        seed=0,
        device=torch.device("cpu"),
        world_size=ranks,
    )
    trained = 0
    for index in range(episodes):
        episode = Episode(index=index, rows=torch.arange(EPISODE))
        passes = [EXTRACTION_STREAM] * (extracts and index > 0) + [TRANSFORM_STREAM]
        for kind in passes:
            made = loader.requests(Pass(episode, stream=kind))
            numbers = sum(len(request.position) for request in made)
        trained += numbers
    loader.close()
    return stream.read_samples / trained


def main() -> None:
    print(
        "# Samples of a stream that a rank reads for each that it trains on\n\n"
        f"`python benchmarks/stream_reads.py`, {datetime.date.today()}. One rank, simulated, with "
        "the default sizes and shards of 10,000 samples. At its end a run has read up to two "
        "blocks of `data.shuffle_buffer` ahead for each kind of pass.\n"
    )
    print("| ranks | episodes | training alone | with extraction |\n|---|---|---|---|")
    for ranks in (8, 64):
        for episodes in (35, 100):
            one, two = (reads(ranks, episodes, extracts=way) for way in (False, True))
            print(f"| {ranks} | {episodes} | {one:.2f} | {two:.2f} |", flush=True)


if __name__ == "__main__":
    main()
