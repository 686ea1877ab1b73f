"""Data sets that models are evaluated on, and the references that name them.

`readers.py` reads the files of others, and `data/sources.py` opens pairs to train on.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torchvision
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from protoclip.config import DataConfig, SourceConfig
from protoclip.data.access import digest, fingerprint, is_url, join, reason_of
from protoclip.data.emoji import emoji_path, emoji_table
from protoclip.data.folders import class_folders, classes_in, shard_split
from protoclip.data.index import cache_folder
from protoclip.data.pairs import BadSample, ImageTextPairs, cells_of
from protoclip.data.sources import open_source
from protoclip.data.view import PairsView
from protoclip.evaluation import data_names, readers
from protoclip.evaluation.readers import (
    LazySplits,
    ShardFolder,
    TorchvisionImages,
    parse_class,
)
from protoclip.evaluation.zero_shot import parse_templates, read_templates
from protoclip.files import read_local
from protoclip.rules import COLUMN_OPTIONS, DATA_HINT, with_options
from protoclip.terminal import visible

SPLITS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
DEFAULT_TEMPLATES = ("a photo of a {c}.",)
SYNSETS = "LOC_synset_mapping.txt"  # as Kaggle ships it with ImageNet
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
HUB = "wds:https://huggingface.co/datasets/clip-benchmark/wds_"
CLOOB = "https://github.com/ml-jku/cloob#downstream-tasks"
# Kinds of data whose classes and captions are not in columns.
WITHOUT_COLUMNS = ("emoji", "wds", "torchvision", "karpathy")
#: Where data sets can be downloaded. Keys are lower case letters and digits; docs/evaluation.md has
#: more.
DOWNLOADS = {
    **{
        name: f"{HUB}{name}" for name in ("country211", "gtsrb", "imagenetv2", "objectnet", "stl10")
    },
    **{name: f"{HUB}vtab-{name}" for name in ("cifar10", "cifar100", "flowers")},
    **{f"imagenet{letter}": f"{HUB}imagenet-{letter}" for letter in "aor"},
    "imagenet": f"{HUB}imagenet1k",
    "imagenetsketch": f"{HUB}imagenet_sketch",
    "cars": f"{HUB}cars",
    "birdsnap": CLOOB,
    "ucf101": CLOOB,
    "coco": f"{HUB}mscoco_captions",
    "captionsval2017": "https://cocodataset.org/#download",
    "flickr30k": f"{HUB}flickr30k",
}


@runtime_checkable
class Images(Protocol):
    """Images in a fixed order. `image` is upright and RGB, or raises `BadSample`.

    `key` identifies the content, for caches of features; if it is empty, nothing is cached.
    """

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    def __len__(self) -> int: ...
    def sample_id(self, row: int) -> str: ...
    def image(self, row: int) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images of one split, with their labels and captions."""

    images: Images
    #: Class numbers; for multilabel data, which classes are present.
    labels: Int[Tensor, " n"] | Bool[Tensor, "n k"] | None = None
    #: One or more for each image.
    captions: Sequence[tuple[str, ...]] | None = None
    #: Images of one group share their captions. Unset, each image is its own group.
    groups: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """One data set. Its splits are some of `train`, `validation` and `test`."""

    name: str  # as in records, such as "cifar10"
    splits: Mapping[str, Split]
    class_names: Sequence[str] = ()  # by class number
    templates: Sequence[str] = ("{c}",)  # prompts; "{c}" stands for the class name
    language: str = "en"
    #: Split -> a name for every image. Only the emoji have them, beside the classes.
    image_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    #: The number of `pairs`, and of those whose `images` a run was trained on.
    trained_on: Mapping[str, int] = field(default_factory=dict)
    #: What the user should know, such as samples that were left out.
    notes: Sequence[str] = ()
    #: Splits whose bad images were named, which is done once even if a split is measured again.
    warned_splits: set[str] = field(default_factory=set, compare=False, repr=False)


def find_positions(values: Iterable[str], among: Sequence[str]) -> Int[Tensor, " n"]:
    """The index of each value in a list of distinct ones."""
    position = {value: index for index, value in enumerate(among)}
    return torch.tensor([position[value] for value in values], dtype=torch.long)


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
        )
    return EvaluationData(
        name=name,
        splits=splits,
        class_names=[value.replace("-", " ") for value in classes],
        image_names={split: list(images.column("label")) for split, images in pairs.items()},
    )


def open_data(
    reference: str,
    *,
    root: str | None = None,
    class_column: str | None = None,
    split: str = "test",
    config: DataConfig | None = None,
) -> EvaluationData:
    """Open the data set that a reference names. Only the given split is read at once.

    * `emoji`: the bundled emoji.
    * A table, a folder of pairs, local tar shards or `hf:OWNER/NAME`, read like `data.train`:
      captions. With a `class_column` of a table, classes, and captions if there are any.
    * A folder with `train|val|test/CLASS/*.jpg`, or with `CLASS/*.jpg`: classes.
    * A folder in CLIP_benchmark's layout, or `wds:FOLDER_OR_URL`: classes, one or more an image; or
      captions.
    * `torchvision:NAME`: classes.
    * `karpathy:FILE.json`: captions of COCO or Flickr30k.

    A reference may end in `,class_column=NAME`, other columns of a table and `,root=FOLDER`, which
    win over the arguments and settings of these names. One source of pairs is taken as the
    requested split. From folders or torchvision, ImageNet's validation images are the `test` split,
    since everyone measures on them.

    Args:
        root: Folder of the images of tables, of `karpathy:` and of `torchvision:`.
        class_column: Column of a table with classes: texts or whole numbers.
        split: The split to measure: `test`, `validation` or `train`.
        config: Columns, `allow_links` and the cache folder of the data.

    Raises:
        ValueError: The reference or a file is missing or damaged, or the split is missing, empty
            or has fewer than two classes; in one line.
    """
    if split not in SPLITS:
        raise ValueError(f"split: '{split}' is none of {', '.join(SPLITS)}")
    reference, options = with_options(reference)
    class_column = options.get("class_column", class_column)
    settings = replace(config or DataConfig(), sources=[], read="auto")
    values: dict[str, Any] = {"root": root or settings.root, **options}
    settings = replace(settings, **values)
    named = next((name for name in COLUMN_OPTIONS if name in options), None)
    named = named or ("class_column" if class_column is not None else None)
    kind, _, location = reference.partition(":")
    if shard_split(Path(reference)):
        kind, location = "wds", reference
    if named and kind in WITHOUT_COLUMNS:
        raise no_columns(reference, named)
    if reference == "emoji":
        data = emoji()
    elif kind == "wds":
        data = _open_wds(location, settings, split)
    elif kind == "torchvision":
        data = _open_torchvision(location, settings.root, split)
    elif kind == "karpathy":
        data = _open_captions(location, settings.root, split)
    elif folders := class_folders(Path(reference)):
        if named:
            raise no_columns(reference, named)
        data = _open_class_folders(Path(reference), folders, split)
    elif kind in ("hf", "pipe") or is_url(reference) or _exists(reference):
        data = _open_pairs(reference, settings, split, class_column)
    else:
        raise ValueError(
            f"{reference}: no such file, and no reference to a data set ({DATA_HINT})"
            f"{download_hint(reference)}"
        )
    if data.splits[split].labels is not None and len(data.class_names) < 2:
        shown = visible(", ".join(data.class_names)[:60]) or "no names"
        raise ValueError(f"{reference}: has fewer than two classes ({shown})")
    if twice := [name for name, number in Counter(data.class_names).items() if number > 1]:
        shown = f"'{visible(twice[0])}'" + f" and {len(twice) - 1} more" * (len(twice) > 1)
        note = f"{reference}: several classes are called {shown}; zero_shot takes each such name "
        note += "for the first of its classes"
        data = replace(data, notes=[*data.notes, note])
    return data


def no_columns(reference: str, option: str = "class_column") -> ValueError:
    return ValueError(
        f"{reference}: is no table and has no columns; leave out {option}, or write it behind "
        f"its table alone (TABLE,{option}=NAME)"
    )


def download_hint(reference: str) -> str:
    """The end of a message on a data set that can be downloaded; empty for others."""
    last = reference.rstrip("/").rpartition("/")[2].rpartition(":")[2].lower()
    plain = re.sub(r"[^a-z0-9]", "", last)
    name = max((name for name in DOWNLOADS if name in plain), key=len, default="")
    return f"; download {name} from {DOWNLOADS[name]}" if name else ""


def fetch_hint(name: str, root: str) -> str:
    """How to download a set of torchvision, or another copy of it."""
    return f"torchvision.datasets.{name}({root!r}, download=True) may fetch it{download_hint(name)}"


def _names(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip().splitlines()]


def add_split(reference: str, split: str) -> str:
    """A reference with the split to read, if it is on the hub and names none."""
    on_hub = reference.startswith("hf:") and not is_url(reference)
    return f"{reference},split={split}" if on_hub and ",split=" not in reference else reference


def _exists(path: str) -> bool:
    return "*" in path or "{" in path or Path(path).expanduser().exists()


def _open_pairs(
    reference: str, config: DataConfig, split: str, class_column: str | None
) -> EvaluationData:
    """Captions, classes or both, of one source of pairs."""
    path = add_split(reference, split)
    config = replace(config, class_column=class_column or config.class_column)
    try:
        pairs = open_source(config, SourceConfig(path=path))
    except ValueError as error:  # the settings of `data` belong to other pairs
        way_out = r"write ,\1=NAME behind it"
        raise ValueError(re.sub(r"set (\w+_column) to one\b", way_out, str(error))) from error
    if not isinstance(pairs, ImageTextPairs):
        raise ValueError(
            f"{reference}: evaluation reads in any order; copy the shards, or if they lie in a "
            "folder of CLIP_benchmark's layout, name that with wds:"
        )
    if class_column is not None and pairs.class_column is None:
        raise no_columns(reference)
    notes = list(pairs.notes)
    images: Any = pairs
    rows, captions = list(range(len(pairs))), None
    if pairs.caption_columns:
        rows, captions = collect_captions(pairs, rows)
        if not rows and pairs.class_column is None:
            raise ValueError(f"{reference}: no image has a caption")
        if not rows:
            notes.append(f"{reference}: no image has a caption, so only the classes are used")
            rows, captions = list(range(len(pairs))), None
    if len(rows) < len(pairs):
        notes.append(
            f"{reference}: {len(pairs)} rows are {len(rows)} images with captions; rows without a "
            "caption are left out, and rows with the same image are one"
        )
        images = PairsView([(pairs, rows)])
    labels, classes = None, list[str]()
    if pairs.class_column is not None:
        texts = read_classes(pairs, rows)
        classes = pairs.class_labels or sort_names(texts)
        labels = find_positions(texts, classes)
        if several := count_ambiguous_images(pairs) if len(rows) < len(pairs) else 0:
            notes.append(
                f"{reference}: {several:,} image(s) have different classes in different rows, and "
                "the first counts; give each image one class"
            )
    only = Split(images=images, labels=labels, captions=captions)
    names, templates = name_classes(classes)
    return EvaluationData(
        name=data_names.name_pairs(pairs.name, reference),
        splits={split: only},
        class_names=names,
        templates=templates,
        notes=notes,
    )


def collect_captions(
    pairs: ImageTextPairs, rows: Iterable[int]
) -> tuple[list[int], list[tuple[str, ...]]]:
    """The first row of each image that has captions, and the captions of all its rows."""
    names = pairs.image_names()
    first: dict[Any, int] = {}
    captions: dict[Any, Counter[str]] = {}
    for row in rows:
        try:
            texts = pairs.sample_captions(row)  # compares the row with its checksum
        except BadSample:
            continue
        image = (names[row].as_py() if names is not None else None) or row
        counts = captions.setdefault(image, Counter())
        for text, number in Counter(texts).items():  # a copy of a pair adds nothing
            counts[text] = max(counts[text], number)
        first.setdefault(image, row)
    return list(first.values()), [tuple(captions[image].elements()) for image in first]


def count_ambiguous_images(pairs: ImageTextPairs) -> int:
    """How many images have different classes in different rows."""
    classes = pairs.kept(pairs.checked.column(str(pairs.class_column)))
    names = pairs.image_names()
    if names is None or "list" in str(classes.type):
        return 0
    columns = {"image": names, "class": classes.cast(pa.large_string())}
    table = pa.table(columns).filter(pc.is_valid(names))
    counts = table.group_by("image").aggregate([("class", "count_distinct")]).column(1)
    return int(np.count_nonzero(counts.to_numpy() > 1))


def read_class_cells(pairs: ImageTextPairs, rows: Sequence[int]) -> list[Any]:
    """The cells of the class column in these rows."""
    column = pairs.kept(pairs.checked.column(str(pairs.class_column)))
    values = cells_of(column.take(pa.array(rows, pa.int64())))
    if not pairs.class_labels:
        return values
    return [None if isinstance(cell, int) and cell < 0 else cell for cell in values]  # unknown


def has_no_class(value: Any) -> bool:
    """Whether a cell of the class column names none."""
    return value is None or not str(value).strip()


def have_class(pairs: ImageTextPairs) -> Bool[np.ndarray, " n"]:
    """Whether each row names a class; equal values in a block are looked at once."""
    masks = []
    for part in pairs.in_blocks():
        values = part.kept(part.table.column(str(part.class_column))).combine_chunks()
        codes = values.dictionary_encode().indices.fill_null(-1)
        _, first, number = np.unique(codes, return_index=True, return_inverse=True)
        has_class = [not has_no_class(value) for value in read_class_cells(part, first.tolist())]
        masks.append(np.array(has_class, bool)[number])
    return np.concatenate(masks)


def read_classes(pairs: ImageTextPairs, rows: Sequence[int]) -> list[str]:
    """The class of each of these rows, by name.

    The table names the numbers of a `ClassLabel`. Any other value is the name itself.

    Raises:
        ValueError: A row has no class, or a number without a name.
    """
    values = read_class_cells(pairs, rows)
    for row, value in zip(rows, values, strict=True):
        if has_no_class(value):
            raise ValueError(
                f"{pairs.name}: sample '{pairs.sample_id(row)}' has no class; "
                "fill it in, or leave its row out"
            )
    if names := pairs.class_labels:
        images = PairsView([(pairs, rows)])
        return [names[n] for n in readers.parse_each(images, values, parse_class, len(names))]
    return list(map(str, values))


def sort_names(names: Iterable[str]) -> list[str]:
    """The distinct names, sorted; numbers by their value, and equal ones by their digits."""
    distinct = sorted(set(names))
    return sorted(distinct, key=int) if all(map(str.isdecimal, distinct)) else distinct


def _open_class_folders(folder: Path, splits: dict[str, Path], first: str) -> EvaluationData:
    classes = sort_names(name for path in splits.values() for name in classes_in(path))
    listed = _names(_read_beside(folder, readers.CLASS_NAMES))
    if listed and len(listed) != len(classes):
        raise ValueError(
            f"{folder / readers.CLASS_NAMES}: names {len(listed)} classes, but there are "
            f"{len(classes)} folders"
        )
    imagenet = None if listed else imagenet_names(classes, numbers=True)
    synsets = dict(line.partition(" ")[::2] for line in _names(_read_beside(folder, SYNSETS)))
    # A synset has several names; the first one is the usual one.
    usual = {wnid: names.partition(",")[0] for wnid, names in synsets.items()}
    names = imagenet or [usual.get(c, c).replace("_", " ") for c in classes]
    if imagenet and "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    templates = list(DEFAULT_TEMPLATES)
    if text := _read_beside(folder, readers.TEMPLATES):
        templates = parse_templates(text, str(folder / readers.TEMPLATES))
    elif imagenet:
        templates = read_templates("openai")
    in_ids = folder.resolve().name

    def read_split(split: str) -> Split:
        name = f"{in_ids}/{split}"
        images, labels = readers.read_class_folder(splits[split], classes, name=name)
        return Split(images=images, labels=labels)

    return EvaluationData(
        name=data_names.name_folder(folder),
        splits=LazySplits(read_split, splits, first=first, source=str(folder)),
        class_names=listed or names,
        templates=templates,
    )


def _read_beside(folder: Path, name: str) -> str:
    path = folder / name
    try:
        return read_local(path) if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 ({reason_of(error)})") from None


def imagenet_names(classes: Sequence[str], *, numbers: bool = False) -> list[str] | None:
    """CLIP's class names, if the classes are ImageNet's; else None.

    WordNet ids identify all or some of ImageNet's classes; names only all thousand: CLIP's, or
    WordNet's such as "tench, Tinca tinca" or "tench". With `numbers`, 0 to 999 are ImageNet's.
    """
    is_numbers = numbers and list(classes) == [str(number) for number in range(1000)]
    are_ids = bool(classes) and all(map(WNID.fullmatch, classes))
    if not (is_numbers or are_ids or len(classes) == 1000):
        return None
    import open_clip
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo("imagenet-1k")
    clip = list(open_clip.IMAGENET_CLASSNAMES)
    if are_ids:
        names = dict(zip(info.label_names(), clip, strict=True))
        return [names[wnid] for wnid in classes] if set(classes) <= names.keys() else None

    def firsts(synsets: Iterable[str]) -> list[str]:
        return [names.partition(",")[0].replace("_", " ").strip().lower() for names in synsets]

    # Lists differ in a few names, such as those of the two cranes.
    usual = zip(firsts(info.label_descriptions()), firsts(classes), strict=True)
    matches = is_numbers or list(classes) == clip or sum(a == b for a, b in usual) > 950
    return clip if matches else None


def name_classes(classes: list[str]) -> tuple[list[str], Sequence[str]]:
    """Names of classes, and prompts: CLIP's for ImageNet; other classes keep their names."""
    if names := imagenet_names(classes):
        return names, read_templates("openai")
    return classes, DEFAULT_TEMPLATES if classes else ("{c}",)


def _open_wds(location: str, config: DataConfig, split: str) -> EvaluationData:
    cache = cache_folder() / "evaluation"
    try:
        shards = ShardFolder.open(location, cache=cache)
    except ValueError as error:
        raise ValueError(f"{error}{download_hint(location)}") from None
    kind = shards.texts.get(readers.DATASET_TYPE, "classification").strip().lower()
    if kind not in readers.BESIDE_IMAGE:
        kinds = ", ".join(readers.BESIDE_IMAGE)
        shown = visible(kind[:30])
        raise ValueError(f"{location}/{readers.DATASET_TYPE}: '{shown}' is none of {kinds}")
    names, templates = _names(shards.texts.get(readers.CLASS_NAMES, "")), ["{c}"]
    if kind != "retrieval":
        if not names:
            raise ValueError(
                f"{location}: has no class names; write them into {readers.CLASS_NAMES}, one a line"
            )
        names, usual = name_classes(names)
        text = shards.texts.get(readers.TEMPLATES, "\n".join(usual))
        templates = parse_templates(text, f"{location}/{readers.TEMPLATES}")

    def read_split(split: str) -> Split:
        pairs, contents = shards.read_split(split, readers.BESIDE_IMAGE[kind])
        parse_each = partial(readers.parse_each, pairs, contents)
        if kind == "retrieval":
            return Split(images=pairs, captions=parse_each(readers.parse_captions))
        if kind == "multilabel":
            present = np.stack(parse_each(readers.parse_presence, len(names)))
            return Split(images=pairs, labels=torch.from_numpy(present))
        numbers = parse_each(readers.parse_class, len(names))
        return Split(images=pairs, labels=torch.tensor(numbers, dtype=torch.long))

    plain = Path(location).resolve().name
    if is_url(location):
        url = urlsplit(re.sub(r"/(tree|raw|blob|resolve)/.*", "", location.rstrip("/")))
        plain = url.path.rpartition("/")[2] or url.hostname or ""  # no user, no password
    return EvaluationData(
        name=plain.removeprefix("wds_"),
        splits=LazySplits(read_split, shards.folders, first=split, source=location),
        class_names=names if kind != "retrieval" else (),
        templates=templates,
    )


def _open_torchvision(name: str, root: str | None, split: str) -> EvaluationData:
    reference = f"torchvision:{name}"
    if name not in TORCHVISION:
        raise ValueError(
            f"{reference}: not a known classification set; known are {', '.join(TORCHVISION)}"
            f"{download_hint(name)}"
        )
    if root is None or not Path(root).is_dir():
        problem = f"{root}: no such folder" if root else "root is not set"
        raise ValueError(
            f"{reference}: {problem}; root is the folder that torchvision keeps it in; "
            f"{fetch_hint(name, 'FOLDER')}"
        )

    splits = {SPLIT_ALIASES.get(value, value): value for value in TORCHVISION[name].split(" ")}
    if "test" not in splits:  # the only split, or the one that everyone measures on
        splits["test"] = splits.pop("validation", "")

    @cache
    def samples(split: str) -> Any:
        make, value = getattr(torchvision.datasets, name), splits[split]
        settings: dict[str, Any] = {"split": value} if value else {}
        if "train" in inspect.signature(make).parameters:
            settings = {"train": value == "train"}
        try:
            return make(root, **settings)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{reference}: its {split} split is not in {root} ({reason_of(error)}); "
                f"{fetch_hint(name, root)}"
            ) from None
        except Exception as error:  # damaged files make torchvision raise anything
            raise ValueError(
                f"{reference}: the files of its {split} split in {root} are damaged "
                f"({reason_of(error)}); delete them, and fetch them again: {fetch_hint(name, root)}"
            ) from None

    names = getattr(samples("test"), "classes", getattr(samples("test"), "categories", None))
    if names is None:  # the sets without names are of digits
        names = [str(digit) for digit in range(10)]
    # The first of several synonyms is the usual one; MNIST writes "7 - seven".
    names = [str(entry if isinstance(entry, str) else entry[0]) for entry in names]
    names = [re.sub(r"^(\d) - .*", r"\1", entry).replace("_", " ") for entry in names]
    if name == "Caltech256":  # which writes "001.ak47" and "145.motorbikes-101"
        names = [re.sub(r"^\d{3}\.|-101$", "", entry) for entry in names]
    ids = getattr(samples("test"), "wnids", None)  # ImageNet's, which has cranes of two kinds
    imagenet = imagenet_names(ids) if ids else None

    def read_split(split: str) -> Split:
        images = TorchvisionImages(samples(split), name=f"{name.lower()}/{split}")
        numbers = readers.parse_each(images, images.labels(), readers.parse_class, len(names))
        return Split(images=images, labels=torch.tensor(numbers, dtype=torch.long))

    return EvaluationData(
        name=name.lower(),
        splits=LazySplits(read_split, splits, first=split, source=reference),
        class_names=imagenet or names,
        templates=read_templates("openai") if imagenet else DEFAULT_TEMPLATES,
    )


def _open_captions(file: str, root: str | None, split: str) -> EvaluationData:
    try:
        name, captions = readers.read_captions_json(file)
    except ValueError as error:
        raise ValueError(f"{error}{download_hint(file)}") from None
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
        name=name, splits=LazySplits(read_split, captions, first=split, source=file)
    )
