"""Data sets that models are evaluated on, and the references that name them.

`readers.py` reads the files of others, and `data/sources.py` opens pairs to train on.
"""

import inspect
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torchvision
from jaxtyping import Bool, Int
from torch import Tensor

from protoclip.config import DataConfig, SourceConfig
from protoclip.data.access import cache_folder, describe_error, digest, fingerprint, is_url, join
from protoclip.data.emoji import emoji_path, emoji_table
from protoclip.data.pairs import BadSample, ImageTextPairs, clean_captions, read_cells
from protoclip.data.sources import PairsView, open_entry
from protoclip.encode.features import Images
from protoclip.evaluation import readers
from protoclip.rules import DATA_HINT, with_options
from protoclip.terminal import visible, without_secrets

SPLITS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
#: Names of folders or tables of one split, which do not distinguish data sets.
SPLIT_NAMES = ("train", "val", "valid", "validation", "dev", "test")
FEWEST_COMMON = 10  # images on which columns of captions are compared
DEFAULT_TEMPLATES = ("a photo of a {c}.",)
WNID = re.compile(r"n\d{8}")
#: torchvision's classification sets with usual class names, and its names of their splits.
TORCHVISION = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST"), "train test"),
    **dict.fromkeys(("Food101", "StanfordCars", "STL10", "SVHN", "USPS"), "train test"),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "RenderedSST2"), "train val test"),
    "OxfordIIITPet": "trainval test",
    **dict.fromkeys(("ImageNet", "Imagenette"), "train val"),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SUN397"), ""),  # not split
}
SPLIT_ALIASES = {"": "test", "trainval": "train", "val": "validation"}


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images of one split, with their labels and captions."""

    images: Images
    #: Class numbers; for multilabel data, which classes are present.
    labels: Int[Tensor, " n"] | Bool[Tensor, "n k"] | None = None
    captions: Sequence[tuple[str, ...]] | None = None  # one or more for each image
    #: The column of each caption, where an image's come from several.
    columns: Sequence[tuple[str, ...]] | None = None
    #: Images of one group share their captions. Unset, each image is its own group.
    groups: Sequence[int] | None = None
    #: Of the images, beside their classes. Only the emoji have them.
    names: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """One data set. Its splits are some of `train`, `validation` and `test`."""

    name: str  # as in records, such as "cifar10"
    splits: Mapping[str, Split]
    class_names: Sequence[str] = ()  # by class number
    templates: Sequence[str] = ("{c}",)  # prompts; "{c}" stands for the class name
    language: str = "en"
    column: str = ""  # of the captions, if data have several
    #: The number of `pairs`, and of those whose `images` a run was trained on.
    trained_on: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()  # what the user should know, such as samples that were left out
    #: Splits whose bad images were named, which is done once even if a split is measured again.
    warned_splits: set[str] = field(default_factory=set, compare=False, repr=False)


def open_data(
    reference: str, *, split: str = "test", config: DataConfig | None = None
) -> EvaluationData:
    """Open the data set that a reference names; docs/evaluation.md lists what it may be.

    Only the given split is read at once. Columns and the root behind a reference win over settings
    of these names. One source of pairs is taken as the requested split. From folders or
    torchvision, ImageNet's validation images are the `test` split, since all measure on them.

    Args:
        split: The split to measure: `test`, `validation` or `train`.
        config: Columns of tables, `allow_links`, and as `root` the folder of the images of tables,
            `karpathy:` and `torchvision:`.

    Raises:
        ValueError: The reference or a file is missing or damaged, or the split is missing, empty
            or has fewer than two classes; in one line.
    """
    if split not in SPLITS:
        raise ValueError(f"split: '{split}' is not one of {', '.join(SPLITS)}")
    reference, options = with_options(reference)
    values: dict[str, Any] = {"sources": [], "read": "auto", **options}
    settings = replace(config or DataConfig(), **values)
    kind, _, location = reference.partition(":")
    if readers.holds_shards(Path(reference)):
        kind, location = "wds", reference
    if reference == "emoji":
        data = emoji()
    elif kind == "wds":
        data = open_wds(location, split)
    elif kind == "torchvision":
        data = open_torchvision(location, settings.root, split)
    elif kind == "karpathy":
        data = open_captions(location, settings.root, split)
    elif folders := readers.class_folders(Path(reference)):
        data = open_class_folders(Path(reference), folders, split)
    else:
        is_path = "*" in reference or "{" in reference or Path(reference).expanduser().exists()
        if not (kind == "hf" or is_url(reference) or is_path):
            raise ValueError(
                f"{reference}: no such file, and no reference to a data set ({DATA_HINT})"
            )
        data = open_pairs(reference, settings, split)
    if data.splits[split].labels is not None and len(data.class_names) < 2:
        names = visible(", ".join(data.class_names)[:60]) or "no names"
        raise ValueError(f"{reference}: has fewer than two classes ({names})")
    if twice := [name for name, number in Counter(data.class_names).items() if number > 1]:
        several = f"'{visible(twice[0])}'" + f" and {len(twice) - 1} more" * (len(twice) > 1)
        note = f"{reference}: several classes are called {several}; zero_shot takes each such name "
        note += "for the first of its classes"
        data = replace(data, notes=[*data.notes, note])
    return data


def open_pairs(reference: str, config: DataConfig, split: str) -> EvaluationData:
    """Captions, classes or both, of one source of pairs."""
    try:
        pairs = open_entry(config, SourceConfig(path=add_split(reference, split)))
    except ValueError as error:  # the settings of `data` belong to other pairs
        way_out = r"write ,\1=NAME behind it"
        raise ValueError(re.sub(r"set --(\w+_column) to one\b", way_out, str(error))) from error
    if not isinstance(pairs, ImageTextPairs):
        raise ValueError(
            f"{reference}: evaluation reads in any order; copy the shards, or if they lie in a "
            "folder of CLIP_benchmark's layout, name that with wds:"
        )
    notes = list(pairs.notes)
    rows, captions, columns = list(range(len(pairs))), None, None
    if pairs.caption_columns and config.needs_captions:
        rows, captions, columns = collect_captions(pairs, rows)
        if not rows and pairs.class_column is None:
            raise ValueError(f"{reference}: no image has a caption")
        if not rows:
            notes.append(f"{reference}: no image has a caption, so only the classes are used")
            rows, captions, columns = list(range(len(pairs))), None, None
    if len(rows) < len(pairs):
        notes.append(
            f"{reference}: {len(pairs)} rows are {len(rows)} images with captions; rows without a "
            "caption are left out, and rows with the same image are one"
        )
    labels, classes = None, list[str]()
    if pairs.class_column is not None:
        texts = read_classes(pairs, rows)
        classes = pairs.class_labels or sort_names(texts)
        labels = find_positions(texts, classes)
    names, templates = name_classes(classes)
    images: Any = pairs if len(rows) == len(pairs) else PairsView([(pairs, rows)])
    # Its own name, or that of the folder above it.
    folders = [folder.name for folder in Path(without_secrets(reference).rstrip("/")).parents]
    parts = [simplify_name(Path(pairs.name.rstrip("/")).stem), *map(simplify_name, folders[:2])]
    first, second, *_ = *filter(None, parts), "", ""
    return EvaluationData(
        name=add_folder(first, second) or "data",
        splits={split: Split(images=images, labels=labels, captions=captions, columns=columns)},
        class_names=names,
        templates=templates,
        notes=notes,
    )


def add_split(reference: str, split: str) -> str:
    """A reference with the split to read, if it is on the hub and names none."""
    on_hub = reference.startswith("hf:") and not is_url(reference)
    return f"{reference},split={split}" if on_hub and ",split=" not in reference else reference


def collect_captions(
    pairs: ImageTextPairs, rows: Iterable[int]
) -> tuple[list[int], list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The first row of each image that has captions, the captions of all its rows, and the column
    of each, where captions come from several."""
    names = pairs.image_names()
    first: dict[Any, int] = {}
    captions: dict[Any, Counter[tuple[str, str]]] = {}
    for row in rows:
        try:
            texts = pairs.sample_captions(row)
        except BadSample:
            continue
        image = (names[row].as_py() if names is not None else None) or row
        counts, columns = captions.setdefault(image, Counter()), pairs.name_captions(row)
        named = zip(texts, columns or [""] * len(texts), strict=True)
        for text, number in Counter(named).items():  # a copy of a pair adds nothing
            counts[text] = max(counts[text], number)
        first.setdefault(image, row)
    found = [[*captions[image].elements()] for image in first]
    texts_of, columns_of = ([tuple(one[n] for one in every) for every in found] for n in (0, 1))
    return list(first.values()), texts_of, columns_of


def split_columns(data: EvaluationData, split: str) -> list[EvaluationData]:
    """The data, and the same with the captions of one column alone for each of several columns.

    Recall depends on the number of candidates, so columns are measured on the images that all of
    them describe; each on its own where these are fewer than `FEWEST_COMMON`.
    """
    whole, sets = data.splits[split], [data]
    captions, columns = whole.captions or (), whole.columns or ()
    names = sorted({*chain.from_iterable(columns)} - {""})
    common = [row for row, present in enumerate(columns) if {*names} <= {*present}]
    for name in names if len(names) > 1 else ():
        own = [
            tuple(text for text, column in zip(*both, strict=True) if column == name)
            for both in zip(captions, columns, strict=True)
        ]
        has_some = [row for row, texts in enumerate(own) if texts]
        rows = common if len(common) >= FEWEST_COMMON else has_some
        part = Split(images=PairsView([(whole.images, rows)]), captions=[own[row] for row in rows])
        named = replace(data, name=f"{data.name}-{simplify_name(name)}", column=name)
        language = name.rpartition("_")[2]  # as of caption_de
        sets.append(replace(named, splits={split: part}, class_names=(), language=language))
    return sets


def read_classes(pairs: ImageTextPairs, rows: Sequence[int]) -> list[str]:
    """The class of each of these rows, by name.

    The table names the numbers of a `ClassLabel`. Any other value is the name itself. Raises
    `ValueError` if a row has no class.
    """
    if not (known := find_with_class(pairs)[rows]).all():
        raise ValueError(
            f"{pairs.name}: sample '{pairs.sample_id(rows[int(known.argmin())])}' has no class; "
            "fill it in, or leave its row out"
        )
    column, names = pairs.select_column(str(pairs.class_column)), pairs.class_labels
    cells = read_cells(column.take(pa.array(rows, pa.int64())))
    return [names[value] if names else str(value) for value in cells]


def find_with_class(source: ImageTextPairs) -> npt.NDArray[np.bool_]:
    """Which pairs have a class."""
    cells = source.select_column(str(source.class_column))
    pattern = r"^\d" if source.class_labels else r"\S"  # a negative number is not known
    mask = pc.match_substring_regex(cells.cast(pa.large_string()), pattern)
    return np.array(pc.fill_null(mask, False))


def sort_names(names: Iterable[str]) -> list[str]:
    """The distinct names, sorted; numbers by their value, and equal ones by their digits."""
    distinct = sorted(set(names))
    return sorted(distinct, key=int) if all(map(str.isdecimal, distinct)) else distinct


def open_class_folders(folder: Path, splits: dict[str, Path], first: str) -> EvaluationData:
    """Classes, by a folder for each in the folders of splits."""
    classes = sort_names(name for path in splits.values() for name in readers.classes_in(path))
    names = [n.strip() for n in readers.read_text(folder / readers.CLASS_NAMES).splitlines()]
    if names and len(names) != len(classes):
        raise ValueError(
            f"{folder / readers.CLASS_NAMES}: names {len(names)} classes, but there are "
            f"{len(classes)} folders"
        )
    imagenet = None if names else imagenet_names(classes, numbers=True)
    names = names or imagenet or [name.replace("_", " ") for name in classes]
    if imagenet and "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    templates = readers.read_templates("openai") if imagenet else list(DEFAULT_TEMPLATES)
    if text := readers.read_text(folder / readers.TEMPLATES):
        templates = readers.parse_templates(text, str(folder / readers.TEMPLATES))

    real = folder.resolve()

    def read_split(split: str) -> Split:
        names, labels = list[str](), list[int]()
        for number, name in enumerate(classes):
            path = splits[split] / name
            files = sorted(filter(readers.is_image, path.iterdir())) if path.is_dir() else []
            names += [f"{name}/{file.name}" for file in files]
            labels += [number] * len(files)
        images = readers.open_image_files(
            names, root=str(splits[split]), name=f"{real.name}/{split}"
        )
        return Split(images=images, labels=torch.tensor(labels))

    return EvaluationData(
        name=add_folder(real.name, real.parent.name),
        splits=readers.LazySplits(read_split, splits, first=first, source=str(folder)),
        class_names=names,
        templates=templates,
    )


def imagenet_names(classes: Sequence[str], *, numbers: bool = False) -> list[str] | None:
    """CLIP's class names, if the classes are ImageNet's; else None.

    WordNet ids identify all or some of ImageNet's classes; names only all thousand: CLIP's, or
    WordNet's such as "tench, Tinca tinca" or "tench". With `numbers`, 0 to 999 are ImageNet's.
    """
    are_ids = bool(classes) and all(map(WNID.fullmatch, classes))
    if not (are_ids or len(classes) == 1000):
        return None
    import open_clip
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    clip = list(open_clip.IMAGENET_CLASSNAMES)
    if are_ids:
        names = dict(zip(info.label_names(), clip, strict=True))
        return [names[wnid] for wnid in classes] if set(classes) <= names.keys() else None

    def usual(synset: str) -> str:
        return synset.partition(",")[0].replace("_", " ").strip().lower()

    # Lists differ in a few names, such as those of the two cranes.
    pairs = zip(info.label_descriptions(), classes, strict=True)
    are_numbers = numbers and list(classes) == [str(number) for number in range(1000)]
    are_names = list(classes) == clip or sum(usual(a) == usual(b) for a, b in pairs) > 950
    return clip if are_numbers or are_names else None


def name_classes(classes: list[str]) -> tuple[list[str], Sequence[str]]:
    """Names of classes, and prompts: CLIP's for ImageNet; other classes keep their names."""
    if names := imagenet_names(classes):
        return names, readers.read_templates("openai")
    return classes, DEFAULT_TEMPLATES if classes else ("{c}",)


def open_wds(location: str, split: str) -> EvaluationData:
    """Classes, one or more an image, or captions, of a folder in CLIP_benchmark's layout."""
    shards = readers.ShardFolder.open(location, cache=cache_folder() / "evaluation")
    kind = shards.texts.get(readers.DATASET_TYPE, "classification").strip().lower()
    if kind not in readers.BESIDE_IMAGE:
        kinds = ", ".join(readers.BESIDE_IMAGE)
        raise ValueError(
            f"{location}/{readers.DATASET_TYPE}: '{visible(kind[:30])}' is not one of {kinds}"
        )
    lines = shards.texts.get(readers.CLASS_NAMES, "").rstrip().splitlines()
    names, templates = [line.strip() for line in lines], ["{c}"]
    if kind != "retrieval":
        if not names:
            raise ValueError(
                f"{location}: has no class names; write them into {readers.CLASS_NAMES}, one a line"
            )
        names, usual = name_classes(names)
        text = shards.texts.get(readers.TEMPLATES, "\n".join(usual))
        templates = readers.parse_templates(text, f"{location}/{readers.TEMPLATES}")

    def read_split(split: str) -> Split:
        pairs, contents = shards.read_split(split, readers.BESIDE_IMAGE[kind])
        parse_each = partial(readers.parse_each, pairs, contents)
        if kind == "retrieval":
            captions = parse_each(lambda content, _: clean_captions(content.decode().splitlines()))
            return Split(images=pairs, captions=captions)
        if kind == "multilabel":
            present = np.stack(parse_each(readers.parse_presence, len(names)))
            return Split(images=pairs, labels=torch.from_numpy(present))
        return Split(images=pairs, labels=torch.tensor(parse_each(readers.parse_class, len(names))))

    name = Path(location).resolve().name
    if is_url(location):
        url = urlsplit(re.sub(r"/(tree|raw|blob|resolve)/.*", "", location.rstrip("/")))
        name = url.path.rpartition("/")[2] or url.hostname or ""  # no user, no password
    return EvaluationData(
        name=name.removeprefix("wds_"),
        splits=readers.LazySplits(read_split, shards.folders, first=split, source=location),
        class_names=names if kind != "retrieval" else (),
        templates=templates,
    )


def open_torchvision(name: str, root: str | None, split: str) -> EvaluationData:
    """Classes of a set that torchvision has in the folder `root`."""
    reference = f"torchvision:{name}"
    if name not in TORCHVISION:
        choices = ", ".join(TORCHVISION)
        raise ValueError(f"{reference}: not a known classification set; known are {choices}")
    way_out = f"torchvision.datasets.{name}({root or 'FOLDER'!r}, download=True) may fetch it"
    if root is None:
        raise ValueError(
            f"{reference}: root is not set; root is the folder that torchvision keeps it in; "
            f"{way_out}"
        )
    splits = {SPLIT_ALIASES.get(value, value): value for value in TORCHVISION[name].split(" ")}
    if "test" not in splits:  # the only split, or the one that everyone measures on
        splits["test"] = splits.pop("validation", "")

    @cache
    def open_samples(split: str) -> Any:
        make, value = getattr(torchvision.datasets, name), splits[split]
        settings: dict[str, Any] = {"split": value} if value else {}
        if "train" in inspect.signature(make).parameters:
            settings = {"train": value == "train"}
        try:
            return make(root, **settings)
        except Exception as error:  # damaged files make torchvision raise anything
            raise ValueError(
                f"{reference}: its {split} split in {root} is missing or damaged "
                f"({describe_error(error)}); {way_out}"
            ) from None

    samples = open_samples("test")
    names = getattr(samples, "classes", getattr(samples, "categories", None))
    if names is None:  # the sets without names are of digits
        names = [str(digit) for digit in range(10)]
    # The first of several synonyms is the usual one; MNIST writes "7 - seven".
    names = [str(entry if isinstance(entry, str) else entry[0]) for entry in names]
    names = [re.sub(r"^(\d) - .*", r"\1", entry).replace("_", " ") for entry in names]
    if name == "Caltech256":  # which writes "001.ak47" and "145.motorbikes-101"
        names = [re.sub(r"^\d{3}\.|-101$", "", entry) for entry in names]
    ids = getattr(samples, "wnids", None)  # ImageNet's, which has cranes of two kinds
    imagenet = imagenet_names(ids) if ids else None

    def read_split(split: str) -> Split:
        images = readers.TorchvisionImages(open_samples(split), name=f"{name.lower()}/{split}")
        numbers = readers.parse_each(images, images.labels(), readers.parse_class, len(names))
        return Split(images=images, labels=torch.tensor(numbers))

    return EvaluationData(
        name=name.lower(),
        splits=readers.LazySplits(read_split, splits, first=split, source=reference),
        class_names=imagenet or names,
        templates=readers.read_templates("openai") if imagenet else DEFAULT_TEMPLATES,
    )


def open_captions(file: str, root: str | None, split: str) -> EvaluationData:
    """Captions of COCO or Flickr30k, for images in the folder `root`."""
    name, captions = readers.read_captions_json(file)
    folder = root or str(Path(file).parent)

    def read_split(split: str) -> Split:
        files = list(captions[split])
        if files and not Path(join(folder, files[0])).is_file():
            raise ValueError(
                f"{join(folder, files[0])}: no such image; set root to the folder that the paths "
                f"in {file} start from"
            )
        images = readers.open_image_files(files, root=folder, name=f"{name}/{split}")
        return Split(images=images, captions=list(captions[split].values()))

    return EvaluationData(
        name=name, splits=readers.LazySplits(read_split, captions, first=split, source=file)
    )


@cache
def emoji() -> EvaluationData:
    """The bundled emoji, drawn in seven styles and split by concept family."""
    file = fingerprint(str(emoji_path()))
    pairs: dict[str, ImageTextPairs] = {}
    for split in SPLITS:
        key = digest({"file": file, "split": split})
        pairs[split] = ImageTextPairs(emoji_table(split), name=f"emoji/{split}", table_key=key)
    return make_concept_data("emoji", pairs)


def make_concept_data(name: str, pairs: Mapping[str, ImageTextPairs]) -> EvaluationData:
    """A data set of concepts, given the pairs of each split.

    Columns of the pairs: `concept`, whose images share their captions; `label`, the concept's
    name; and `subgroup`, a coarser class that all splits have.
    """
    classes = sorted({value for split in pairs.values() for value in split.column("subgroup")})
    splits: dict[str, Split] = {}
    for split, images in pairs.items():
        concepts = images.column("concept")
        splits[split] = Split(
            images=images,
            labels=find_positions(images.column("subgroup"), classes),
            captions=[images.sample_captions(row) for row in range(len(images))],
            groups=find_positions(concepts, sorted(set(concepts))).tolist(),
            names=list(images.column("label")),
        )
    class_names = [value.replace("-", " ") for value in classes]
    return EvaluationData(name=name, splits=splits, class_names=class_names)


def find_positions(values: Iterable[str], among: Sequence[str]) -> Int[Tensor, " n"]:
    """The index of each value in a list of distinct ones."""
    position = {value: index for index, value in enumerate(among)}
    return torch.tensor([position[value] for value in values], dtype=torch.long)


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Images and the texts to retrieve."""

    rows: list[int]  # of the images
    texts: list[str]
    ids: list[str]  # of the texts
    groups: Int[Tensor, " t"]  # of the texts' images
    image_of_pair: Int[Tensor, " p"]
    text_of_pair: Int[Tensor, " p"]
    numbers: Int[Tensor, " t"]  # equal for equal texts, from 0 in the order of the texts
    matches: Int[Tensor, "2 m"]  # images, and the numbers that are right for them


def match_captions(
    captions: Sequence[Sequence[str]],
    ids: Sequence[str],
    groups: Sequence[int] | None = None,
    content: Sequence[Hashable] | None = None,
) -> Captions:
    """The images in rows, and their texts: the captions of each image, or each group's once.

    Args:
        captions, ids: One of each a row.
        groups: Images of one group share their captions; then each row is one image.
            Unset, rows of equal content are one image, with the captions of all of them.
        content: Identifies the image of a row. Unset, all rows differ.
    """
    keys = range(len(ids)) if content is None else content
    # 1. Rows to images; an image has the row of its first appearance.
    image_by: dict[Hashable, int] = {}
    rows: list[int] = []
    image_of: list[int] = []
    for row, key in enumerate(keys):
        identity = key if groups is None else row
        if identity not in image_by:
            image_by[identity] = len(rows)
            rows.append(row)
        image_of.append(image_by[identity])
    # 2. Each group's texts. CLIP_benchmark counts a caption as often as an image has it; copies of
    # the image add none.
    group_of = image_of if groups is None else groups
    number_of: dict[str, int] = {}
    position: dict[tuple[int, str, int], int] = {}  # by group, text, and its earlier occurrences
    text_ids: list[str] = []
    pairs: dict[tuple[int, int], None] = {}
    for image, group, texts in zip(image_of, group_of, captions, strict=True):
        before = Counter[str]()
        for text in texts:
            number_of.setdefault(text, len(number_of))
            candidate = (group, text, before[text] if groups is None else 0)
            if candidate not in position:
                position[candidate] = len(position)
                text_ids.append(f"{ids[rows[image]]}: {text}")
            pairs[image, position[candidate]] = None
            before[text] += 1
    # 3. Matches. Images of equal content in several groups have the captions of all of them.
    numbers_of: dict[int, dict[int, None]] = {}
    for group, text, _ in position:
        numbers_of.setdefault(group, {})[number_of[text]] = None
    groups_of: dict[Hashable, dict[int, None]] = {}
    for key, group in zip(keys, group_of, strict=True):
        groups_of.setdefault(key, {})[group] = None
    matches = [
        (image, number)
        for image, row in enumerate(rows)
        for group in groups_of[keys[row]]
        for number in numbers_of[group]
    ]
    image_of_pair, text_of_pair = torch.tensor([*pairs]).T
    return Captions(
        rows=rows,
        texts=[text for _, text, _ in position],
        ids=text_ids,
        groups=torch.tensor([group for group, *_ in position]),
        image_of_pair=image_of_pair,
        text_of_pair=text_of_pair,
        numbers=torch.tensor([number_of[text] for _, text, _ in position]),
        matches=torch.tensor(matches).T,
    )


# Names


def simplify_name(name: str) -> str:
    """A name of letters, digits and hyphens only; empty for a pattern.

    >>> simplify_name("my shop"), simplify_name("*")
    ('my-shop', '')
    """
    return re.sub(r"[^\w-]+", "-", name).strip("-")


def add_folder(name: str, folder: str) -> str:
    """A name, with the name of the folder above it if it is a split's.

    >>> add_folder("test", "photos"), add_folder("shop", "photos")
    ('photos-test', 'shop')
    """
    return f"{folder}-{name}" if folder and name.lower() in SPLIT_NAMES else name
