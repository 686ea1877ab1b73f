"""How images and texts are grouped, over the checkpoints of a run.

The paper starts from this effect (arXiv 2206.10996): InfoNCE aligns the image and the text of a
pair, and groups similar images only by way of their texts, and similar texts by way of their
images. Everything is measured on pairs that the run has not trained on.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from safetensors import safe_open
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from protoclip.config import Config, DataConfig
from protoclip.data import sources
from protoclip.data.decode import decode
from protoclip.data.inspect import drawn
from protoclip.data.loader import read_sample
from protoclip.data.pairs import MAX_IMAGE_PIXELS, Pairs
from protoclip.evaluation import datasets, retrieval
from protoclip.evaluation.geometry import modality_gap
from protoclip.models import loading
from protoclip.models.protoclip import ProtoCLIP
from protoclip.progress import Progress
from protoclip.prototypes.kmeans import kmeans
from protoclip.prototypes.nearest import nearest

MODALITIES = ("image", "text")
NEIGHBOURS = 10
PAIRS_PER_GROUP = 5  # at least, in the mean
ITERATIONS, RESTARTS = 20, 3  # of K-means
BATCH_SIZE = 256
HINT = "train with --run.save_steps N --run.keep_checkpoints 100"

Assignments = dict[str, Int[Tensor, " n"]]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Pairs to analyse, and the class of each where the data has classes."""

    name: str
    images: Sequence[bytes]  # Encoded.
    captions: Sequence[str]
    classes: Int[Tensor, " n"] | None
    skipped: int  # Samples that could not be read.


def agreement(one: Int[Tensor, " n"], other: Int[Tensor, " n"]) -> float:
    """Adjusted mutual information of two groupings: 1 if they are equal, 0 by chance.

    Vinh et al. 2010, arithmetic mean.
    """
    return float(adjusted_mutual_info_score(one.numpy(), other.numpy()))


def neighbours_in_group(
    features: Float[Tensor, "n d"], groups: Int[Tensor, " n"], *, neighbours: int = NEIGHBOURS
) -> float:
    """Share of each row's nearest other rows, by cosine, that are in the row's group; in [0, 1].

    With the texts' groups and the images' features: how often do the texts of an image and of its
    neighbour fall into one group?
    """
    rows, shares = F.normalize(features.float(), dim=1), []
    size = max(1, retrieval.CHUNK // len(rows))
    for start in range(0, len(rows), size):
        similarity = rows[start : start + size] @ rows.T
        similarity.diagonal(offset=start).fill_(float("-inf"))  # a row is not its own neighbour
        found = similarity.topk(min(neighbours, len(rows) - 1)).indices
        shares.append((groups[found] == groups[start : start + size, None]).float().mean(dim=1))
    return float(torch.cat(shares).mean())


def same_group_by_chance(groups: Int[Tensor, " n"]) -> float:
    """Probability that two different rows are in one group: `neighbours_in_group` by chance."""
    sizes = torch.bincount(groups).double()
    return float((sizes * (sizes - 1)).sum() / (len(groups) * (len(groups) - 1)))


def spread(features: Float[Tensor, "n d"]) -> float:
    """Variance of unit-norm rows, 1 - |mean|^2: 0 if all are one point, near 1 if all around."""
    return 1 - float(features.double().mean(dim=0).square().sum())


def effective_rank(features: Float[Tensor, "n d"]) -> float:
    """Exponential of the entropy of the normalised singular values, in [1, min(n, d)].

    The number of directions that the rows use (Roy and Vetterli 2007). Rows are not centred.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def group_sizes(groups: Int[Tensor, " n"], number: int) -> dict[str, float]:
    """Sizes of `number` groups, and how many of these are `dead`, that is without a member."""
    sizes = torch.bincount(groups, minlength=number).double()
    return {
        "number": float(number),
        "dead": float((sizes == 0).sum()),
        "smallest": float(sizes.min()),
        "median": float(sizes.quantile(0.5)),
        "largest": float(sizes.max()),
    }


def measure(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "n d"],
    *,
    num_groups: int,
    captions: Sequence[str],
    classes: Int[Tensor, " n"] | None = None,
    previous: Assignments | None = None,
    seed: int = 0,
) -> tuple[dict[str, float], Assignments]:
    """Group each modality by K-means; measure the groups and the space they lie in.

    Args:
        images, texts: Unit-norm rows of pairs.
        num_groups: Groups of each modality.
        captions: Pairs of equal captions are each other's matches in `recall@10`.
        classes: Adds `classes/...`, the agreement of the groups with them.
        previous: Groups of an earlier checkpoint; adds `stability/...`, the agreement with them.

    Returns:
        Measures by name, as docs/grouping.md lists them; and the group of each row by modality.
    """
    spaces, partner = {"image": images, "text": texts}, {"image": "text", "text": "image"}
    settings: dict[str, Any] = {"iterations": ITERATIONS, "restarts": RESTARTS, "seed": seed}
    groups = {
        name: kmeans(rows, num_groups, **settings).assignments for name, rows in spaces.items()
    }
    found = {"agreement": agreement(groups["image"], groups["text"])}

    def for_each(measure: str, value: Any) -> None:
        found.update({f"{measure}/{modality}": value(modality) for modality in MODALITIES})

    if classes is not None:
        for_each("classes", lambda name: agreement(groups[name], classes))
    for_each("neighbours", lambda name: neighbours_in_group(spaces[name], groups[partner[name]]))
    for_each("neighbours_by_chance", lambda name: same_group_by_chance(groups[partner[name]]))
    if previous is not None:
        for_each("stability", lambda name: agreement(groups[name], previous[name]))
    for_each("effective_rank", lambda name: effective_rank(spaces[name]))
    for_each("spread", lambda name: spread(spaces[name]))
    found.update(modality_gap(images, texts))
    number = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
    same = torch.tensor([number[caption] for caption in captions])
    for name, other in partner.items():
        ranks = retrieval.best_relevant_rank(spaces[name], spaces[other], same, same)
        found[f"recall@10/{name}_to_{other}"] = float((ranks < 10).double().mean())
    for modality, rows in groups.items():
        sizes = group_sizes(rows, num_groups)
        found.update({f"groups/{name}/{modality}": size for name, size in sizes.items()})
    return found, groups


def analyze(
    run: Path,
    *,
    data: str | None = None,
    samples: int = 5000,
    num_groups: int | None = None,
    device: torch.device,
) -> dict[str, Any]:
    """Measure every checkpoint of a run on held-out pairs.

    Features always; projections too if the run trains its heads. `prototypes/...` are the sizes of
    the run's own prototypes, where a checkpoint has some: how many held-out samples are nearest to
    each. `measure` describes the other values.

    Args:
        run: A run folder.
        data: As `data.train`; unset or "emoji", the validation split of the bundled data.
        samples: Pairs to use at most, drawn evenly; of a stream the first ones.
        num_groups: Groups of each modality; else the run's number of prototypes, but at least five
            pairs to a group.

    Raises:
        ValueError: This is no run, it has no checkpoint or no held-out data, or pairs or groups are
            too few.
    """
    config = run_config(run)
    checkpoints = loading.checkpoints(run)
    if not checkpoints:
        raise ValueError(f"{run}: no checkpoint to analyse; {HINT}")
    pairs = held_out(run, config, data, samples)
    if len(pairs.images) < 2 * PAIRS_PER_GROUP:
        least = 2 * PAIRS_PER_GROUP
        raise ValueError(f"{pairs.name}: {len(pairs.images)} pairs are too few; needs {least}")
    most = len(pairs.images) // PAIRS_PER_GROUP
    number = num_groups or min(config.prototypes.number, most)
    if not 2 <= number <= most:
        raise ValueError(f"{number} groups: choose from 2 to {most} with --groups")
    entries, before = [], dict[str, Assignments]()
    progress = Progress(f"analyze {config.run.name}", len(checkpoints))
    for done, checkpoint in enumerate(checkpoints, 1):
        step = int(checkpoint.name.removeprefix("step-"))
        entry: dict[str, Any] = {"step": step, "samples": step * config.episodes.batch_size}
        spaces = embed(checkpoint, pairs, project=config.uses_prototypes, device=device)
        for space, rows in spaces.items():
            entry[space], before[space] = measure(
                **rows,
                num_groups=number,
                captions=pairs.captions,
                classes=pairs.classes,
                previous=before.get(space),
                seed=config.run.seed,
            )
        for modality, centroids in prototypes(checkpoint).items():
            rows = spaces["projections"][f"{modality}s"]
            sizes = group_sizes(nearest(rows, centroids)[0], len(centroids))
            named = {f"prototypes/{name}/{modality}": size for name, size in sizes.items()}
            entry["projections"].update(named)
        entries.append(entry)
        progress.update(done)
    return {
        "name": config.run.name,
        "seed": config.run.seed,
        "folder": str(run),
        "data": pairs.name,
        "pairs": len(pairs.images),
        "skipped": pairs.skipped,
        "groups": number,
        "checkpoints": entries,
    }


def run_config(run: Path) -> Config:
    """The settings of a run."""
    path = run / "config.toml"
    if not path.is_file():
        raise ValueError(f"{run}: not a run folder, which has a config.toml")
    try:
        return Config.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def held_out(run: Path, config: Config, data: str | None, samples: int) -> HeldOut:
    """Pairs that the run has not trained on, as `analyze` describes them."""
    source: Any
    classes: Tensor | None = None
    if data in (None, "emoji"):
        if data is None and not config.data.has_held_out_splits:
            raise ValueError(f"{run}: data.train has no held-out split; name pairs with --data")
        emoji = datasets.emoji()
        source, classes = emoji.validation, emoji.labels("validation")
    else:
        source = sources.pairs(Config(data=DataConfig(train=data)))
    if isinstance(source, Pairs):
        items: Any = drawn(len(source), min(samples, len(source)), seed=0)
    else:
        items = islice(source.samples(), samples)
    known: set[str] = set()
    images, captions, rows, skipped = [], [], [], 0
    for item in items:
        try:
            sample = read_sample(source, item)
            decode(sample.image, max_pixels=MAX_IMAGE_PIXELS)
        except ValueError:  # BadSample too
            skipped += 1
            continue
        if sample.sample_id not in known:  # a stream starts again at its end
            known.add(sample.sample_id)
            images.append(sample.image)
            captions.append(sample.captions[0])
            rows.append(item)
    return HeldOut(
        name=source.name,
        images=images,
        captions=captions,
        classes=None if classes is None else classes[rows],
        skipped=skipped,
    )


@torch.inference_mode()
def embed(
    checkpoint: Path, pairs: HeldOut, *, project: bool, device: torch.device
) -> dict[str, dict[str, Float[Tensor, "n _"]]]:
    """`images` and `texts` of unit norm on the CPU: the `features`, and perhaps `projections`."""
    model: ProtoCLIP
    model, transform, tokenizer = loading.load(checkpoint)
    model = loading.to_device(model, device).eval()
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(pairs.images), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        decoded = (decode(image, max_pixels=MAX_IMAGE_PIXELS) for image in pairs.images[batch])
        inputs = torch.stack([transform(Image.fromarray(pixels)) for pixels in decoded])
        tokens = tokenizer(list(pairs.captions[batch]))
        for name, rows in vars(model(inputs.to(device), tokens.to(device), project)).items():
            if rows is not None and rows.ndim == 2:
                parts.setdefault(name, []).append(rows.float().cpu())
    joined = {name: torch.cat(rows) for name, rows in parts.items()}
    if not all(rows.isfinite().all() for rows in joined.values()):
        raise ValueError(f"{checkpoint}: the model's features are not finite; it has diverged")
    return {
        space: {"images": joined[f"image_{space}"], "texts": joined[f"text_{space}"]}
        for space in ("features", "projections")
        if f"image_{space}" in joined
    }


def prototypes(checkpoint: Path) -> Mapping[str, Float[Tensor, "k p"]]:
    """The run's prototypes of each modality at a checkpoint; none in the warm-up, and in CLIP."""
    if not (checkpoint / loading.RESUME).is_file():
        return {}
    with safe_open(checkpoint / loading.RESUME, "pt") as file:
        names = {modality: f"clusters/{modality}/centroids" for modality in MODALITIES}
        present = set(file.keys())
        return {m: file.get_tensor(name).float() for m, name in names.items() if name in present}
