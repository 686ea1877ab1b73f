"""K-means of each space of an episode, with the settings of a run.

How K-means works is in `prototypes/kmeans.py`, which spaces there are in `prototypes/targets.py`.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from protoclip.config import HALVES, Config
from protoclip.distributed import collectives
from protoclip.prototypes.kmeans import KMeans, kmeans
from protoclip.prototypes.nearest import nearest
from protoclip.training.sizes import PAIRS_A_PROTOTYPE


class Clusterings:
    """Clusters one space after the other. Frozen halves never change, so once for a run."""

    def __init__(self, config: Config, *, captions: int = 1) -> None:
        self.config, self.captions = config, captions  # of an image, each a row
        self.fixed: dict[str, KMeans] = {}  # of the halves

    def __call__(self, space: str, rows: Tensor, positions: Tensor | None) -> KMeans:
        """The clusters of this rank's rows, at these positions of the episode. Collective."""
        settings, teacher = self.config.prototypes, self.config.external_teachers.get(space)
        number = settings.number if teacher is None else teacher.number
        if (fixed := self.fixed.get(space)) is not None:
            return replace(fixed, assignments=nearest(rows, fixed.centroids)[0])
        known = int(collectives.all_reduce(torch.tensor(len(rows), device=rows.device)))
        # A teacher that knows a part of the pairs has a tenth of these, or its number's share.
        pairs = known // self.captions
        share = number * pairs // self.config.episodes.size
        number = max(share, min(number, pairs // PAIRS_A_PROTOTYPE), 2)
        made = kmeans(
            rows,
            min(number, known),
            iterations=settings.iterations,
            restarts=settings.restarts,
            init=settings.init,
            seed=self.config.run.seed,
            positions=positions,
        )
        self.keep({space: made})
        return made

    def keep(self, clusters: Mapping[str, KMeans]) -> None:
        """Take those of the halves for the rest of the run."""
        teachers = self.config.external_teachers
        of_halves = {name for name, each in teachers.items() if each.features in HALVES.values()}
        self.fixed |= {space: made for space, made in clusters.items() if space in of_halves}
