"""Readers of public evaluation data: images, labels, captions and prompts.

They read CLIP_benchmark's tars, folders of classes, caption files of COCO and Flickr30k, and
torchvision's data sets; `datasets.py` makes data sets of them.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from protoclip.config import ImagesConfig
from protoclip.data.access import describe_error, digest, download, is_url, read_file
from protoclip.data.decode import upright
from protoclip.data.folders import IMAGE_SUFFIXES
from protoclip.data.pairs import BadSample, ImageTextPairs, clean_captions
from protoclip.data.shards import open_shards
from protoclip.files import checksum, in_turn, open_local, read_json, read_local, write_atomically
from protoclip.progress import Progress
from protoclip.terminal import visible

T = TypeVar("T")
CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"
#: For each type of data, the extension of the file beside an image that labels it.
BESIDE_IMAGE = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
#: What the folder of a split may be called.
SPLIT_FOLDERS = {
    "test": ("test",),
    "validation": ("validation", "val", "valid"),
    "train": ("train",),
}
TABLES = ("metadata.*", "*.parquet", "*.tar", "state.json")  # or parts of one, in a folder
NUM_SHARDS = "nshards.txt"  # in the folder of a split, in CLIP_benchmark's layout
HUB_PAGE = re.compile(r"(https://huggingface\.co/datasets/[^/]+/[^/]+)(?:/(?:tree|raw|blob)/(.+))?")


@dataclass(frozen=True, kw_only=True)
class ShardFolder:
    """A folder or URL in CLIP_benchmark's layout, with the text files that describe it.

    Remote files are copied to `cache` once, the shards of a split when it is first read.
    """

    location: str
    texts: Mapping[str, str]  # by path below the folder; only those that exist
    cache: Path

    @classmethod
    def open(cls, location: str, *, cache: Path) -> "ShardFolder":
        """Read the files that describe it; raises `ValueError` if there is no split."""
        if page := HUB_PAGE.fullmatch(location.rstrip("/")):
            location = f"{page[1]}/resolve/{page[2] or 'main'}"
        location, is_remote = location.rstrip("/"), is_url(location)
        if is_remote and "?" in location:  # a name behind it would be part of a secret
            raise ValueError(f"{location}: a folder takes no query; leave it out, or copy the data")
        if not is_remote and not Path(location).is_dir():
            raise ValueError(f"{location}: no such folder")
        cache = cache / digest({"url": location})
        copy = cache / "layout.json"
        if is_remote and copy.is_file():
            texts = read_json(copy)
        else:
            folders = chain(*SPLIT_FOLDERS.values())
            names = [CLASS_NAMES, TEMPLATES, DATASET_TYPE, *(f"{f}/{NUM_SHARDS}" for f in folders)]
            texts = {name: text for name in names if (text := read_text(f"{location}/{name}"))}
        if not any(name.endswith(NUM_SHARDS) for name in texts):
            raise ValueError(
                f"{location}: no split in CLIP_benchmark's layout, such as test/{NUM_SHARDS} with "
                "test/0.tar"
            )
        if is_remote:
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(copy, json.dumps(texts))
        return cls(location=location, texts=texts, cache=cache)

    @property
    def folders(self) -> dict[str, str]:
        """The folder of each split."""
        return {
            split: name
            for split, names in SPLIT_FOLDERS.items()
            for name in reversed(names)
            if f"{name}/{NUM_SHARDS}" in self.texts
        }

    def read_split(self, split: str, extension: str) -> tuple[ImageTextPairs, list[bytes]]:
        """The images of a split, and the content of the file beside each.

        Raises `ValueError` if a tar is missing, compressed or damaged, or a sample lacks a file.
        """
        folder = self.folders[split]
        where, number = f"{self.location}/{folder}", self.texts[f"{folder}/{NUM_SHARDS}"].strip()
        if not re.fullmatch(r"0*[1-9]\d{0,5}", number):
            shown = visible(number[:20])
            raise ValueError(f"{where}/{NUM_SHARDS}: holds '{shown}', not a number of tars")
        shards = [f"{where}/{shard}.tar" for shard in range(int(number))]
        if is_url(where):
            progress = Progress(f"Downloading {where}", len(shards))
            for done, url in enumerate(shards):
                copy = self.cache / folder / f"{done}.tar"
                copy.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with in_turn(copy):  # of several ranks
                        if not copy.exists():
                            download(url, copy)
                except Exception as error:  # the clients of stores have exceptions of their own
                    raise ValueError(f"{url}: {describe_error(error)}") from None
                shards[done] = str(copy)
                progress.update(done + 1)
        pairs = open_shards(shards, ImagesConfig(), name=where, beside=extension)
        if pairs.notes:
            raise ValueError(pairs.notes[0])
        for column, what in (("offset", "image"), ("beside", f".{extension}")):
            if (row := pc.index(pairs.table[column].is_null(), True).as_py()) >= 0:
                types = ", ".join(f"{name}: .{kind}" for name, kind in BESIDE_IMAGE.items())
                raise ValueError(
                    f"{pairs.where(row)}: sample '{visible(pairs.sample_id(row))}' has no {what}; "
                    f"{DATASET_TYPE} says which file lies beside an image ({types})"
                )
        return pairs, pairs.table["beside"].to_pylist()


def read_text(file: str | Path) -> str:
    """The content of a text file without space at its end; empty if there is none."""
    try:
        return read_file(str(file)).decode().rstrip()
    except FileNotFoundError:
        return ""
    except Exception as error:
        raise ValueError(f"{file}: {describe_error(error)}") from None


def parse_each(
    images: Any, contents: Iterable[Any], parse: Callable[[Any, int], T], num_classes: int = 0
) -> list[T]:
    """The parsed content for each image; raises `ValueError`, which names a faulty sample."""
    values: list[T] = []
    for row, content in enumerate(contents):
        try:
            values.append(parse(content, num_classes))
        except (ValueError, EOFError, MemoryError) as error:
            sample = f"{images.name}: sample '{images.sample_id(row)}'"
            raise ValueError(visible(f"{sample}: {describe_error(error)}")) from None
    return values


def parse_class(content: Any, num_classes: int) -> int:
    """The content of a `.cls` file, or a number."""
    text = content.decode(errors="replace") if isinstance(content, bytes) else str(content)
    if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", text):  # `int` takes 0_1 too
        raise ValueError(f"{str(content)[:20]} is not a class number")
    if not 0 <= int(text) < num_classes:
        raise ValueError(f"class {int(text)}, but the class names go from 0 to {num_classes - 1}")
    return int(text)


def parse_presence(content: bytes, num_classes: int) -> Bool[np.ndarray, " k"]:
    """The content of an `.npy` file."""
    vector = np.load(io.BytesIO(content), allow_pickle=False)
    if vector.shape != (num_classes,):
        raise ValueError(f"shape {vector.shape} in its .npy, but {num_classes} class names")
    if vector.dtype.kind not in "biuf" or not np.isfinite(vector).all():
        raise ValueError("its .npy holds something other than numbers of 0 or more")
    return np.asarray(vector > 0)


def holds_shards(folder: Path) -> bool:
    """Whether a folder is in CLIP_benchmark's layout, which keeps shards."""
    names = chain(*SPLIT_FOLDERS.values())
    return any(os.path.isfile(folder / name / NUM_SHARDS) for name in names)  # noqa: PTH113 (a name may be of any length)


def class_folders(folder: Path) -> dict[str, Path]:
    """The folder of each split, if classes are folders of images in it; else nothing.

    A folder of classes without splits is a `test` split. A folder with a table, or with captions
    beside images, holds pairs.
    """

    def may_hold_classes(path: Path) -> bool:
        return path.is_dir() and not any(any(path.glob(table)) for table in TABLES)

    def has_classes(path: Path) -> bool:
        classes = classes_in(path) if may_hold_classes(path) else []
        for one in (path, *(path / name for name in classes)) if classes else ():
            files = list(one.iterdir())
            texts = {file.stem for file in files if file.suffix.lower() in (".txt", ".json")}
            if any(file.stem in texts for file in files if is_image(file)):
                return False
        return bool(classes)

    if not may_hold_classes(folder):
        return {}
    folders = {
        split: folder / name
        for split, names in SPLIT_FOLDERS.items()
        for name in reversed(names)
        if has_classes(folder / name)
    }
    return folders or ({"test": folder} if has_classes(folder) else {})


def classes_in(folder: Path) -> list[str]:
    """The names of the subfolders that hold an image, sorted; hidden ones are passed over."""
    folders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    return sorted(path.name for path in folders if any(map(is_image, path.iterdir())))


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def open_image_files(names: Sequence[str], *, root: str, name: str) -> ImageTextPairs:
    """Images in files below a folder, without captions."""
    return ImageTextPairs(
        pa.table({"sample_id": list(names), "path": list(names)}),
        name=name,
        root=root,
        allow_links=True,  # the user named the folder
        caption_columns=(),
    )


def read_captions_json(file: str) -> tuple[str, dict[str, dict[str, tuple[str, ...]]]]:
    """The name of a data set, and its captions by split and image file.

    Reads Karpathy's files (`dataset_coco.json`, `dataset_flickr30k.json`), whose `restval` counts
    as `train`, and COCO's own (`captions_val2017.json`), which is one `test` split.

    Raises `ValueError` if the file is neither.
    """
    name = Path(file).stem.removeprefix("dataset_")
    splits: dict[str, dict[str, tuple[str, ...]]] = {}
    try:
        with open_local(file) as opened:
            content = json.load(opened)
        if "annotations" in content:
            files = {image["id"]: image["file_name"] for image in content["images"]}
            captions: dict[str, list[str]] = {}
            for entry in content["annotations"]:
                captions.setdefault(files[entry["image_id"]], []).append(entry["caption"])
            for path, texts in captions.items():
                with suppress(ValueError):
                    splits.setdefault("test", {})[path] = clean_captions(texts)
            return name, splits
        for image in content["images"]:
            split = {"restval": "train", "val": "validation"}.get(image["split"], image["split"])
            if not isinstance(split, str):
                raise TypeError(f"split: {split!r} is no name")
            path = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            with suppress(ValueError):  # an image without a caption cannot be retrieved
                sentences = clean_captions(sentence["raw"] for sentence in image["sentences"])
                splits.setdefault(split, {})[path] = sentences
    except OSError as error:
        raise ValueError(f"{file}: {describe_error(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else describe_error(error)
        raise ValueError(
            f"{file}: is neither Karpathy's JSON (images, each with filename, split and sentences) "
            f"nor COCO's captions ({missing})"
        ) from None
    # The name becomes a part of metric names, between slashes.
    title = re.sub(r"[^\w-]+", "-", str(content.get("dataset") or "")).strip("-")
    return title or name, splits


def read_templates(reference: str) -> list[str]:
    """Prompts in which "{c}" stands for the class name.

    They are `openai` (the 80 of ImageNet), `simple` (seven of these), or those of a text file, one
    a line, where "{}" stands for the class name too. Raises `ValueError` if the file cannot be
    read, is empty, or a line has no place for the class.
    """
    if reference in ("openai", "simple"):
        import open_clip

        templates = getattr(open_clip, f"{reference.upper()}_IMAGENET_TEMPLATES")
        return [template("{c}") for template in templates]
    try:
        text = read_local(reference)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{reference}: no file of prompts ({describe_error(error)}); give openai, simple or a "
            "file"
        ) from None
    return parse_templates(text, reference)


def parse_templates(text: str, source: str) -> list[str]:
    """The prompts of a text, one a line; raises `ValueError`, which names the source."""
    templates = [line.strip().replace("{}", "{c}") for line in text.splitlines() if line.strip()]
    if not templates:
        raise ValueError(f"{source}: holds no prompt")
    check_templates(templates, source)
    return templates


def check_templates(templates: Sequence[str], source: str) -> None:
    """Raise `ValueError`, which names the source, if a template has no place for the class."""
    for template in templates:
        if "{c}" not in template:
            shown = visible(template[:60])
            raise ValueError(f"{source}: '{shown}' has no place for the class; write {{c}} there")


class TorchvisionImages:
    """The images of a torchvision data set, whose samples are pairs of a PIL image and a class."""

    def __init__(self, samples: Any, *, name: str) -> None:
        self.samples, self.name = samples, name

    @cached_property
    def key(self) -> str:
        """Of pixels in memory, or of files' sizes and times; empty if there are neither."""
        pixels = getattr(self.samples, "data", None)
        if isinstance(pixels, (np.ndarray, Tensor)):
            return checksum(np.ascontiguousarray(np.asarray(pixels)).tobytes())
        for attribute in ("_image_files", "_images", "_samples", "samples"):
            entries = getattr(self.samples, attribute, None) or ()
            files = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
            if files and all(isinstance(file, (str, Path)) for file in files):
                statuses = [Path(file).stat() for file in files]
                facts = [(status.st_size, status.st_mtime_ns) for status in statuses]
                return digest({"files": [*map(str, files)], "facts": facts})
        return ""

    def __len__(self) -> int:
        return len(self.samples)

    def sample_id(self, row: int) -> str:
        return f"{self.name}/{row}"

    def image(self, row: int) -> Image.Image:
        """The image, upright and as RGB; raises `BadSample`."""
        try:
            return upright(self.samples[row][0])
        except Exception as error:  # damaged files make readers raise anything
            raise BadSample(self.sample_id(row), self.name, describe_error(error)) from error

    def labels(self) -> Iterable[Any]:
        """The class numbers, without reading the images if the data set lists them."""
        for attribute in ("targets", "labels", "_labels", "y"):
            if (labels := getattr(self.samples, attribute, None)) is not None:
                return np.asarray(labels)
        return (sample[1] for sample in getattr(self.samples, "_samples", self.samples))


class LazySplits(Mapping[str, Any]):
    """Splits that are opened when they are first needed: `train` may be large or remote.

    Raises `ValueError` if the `first` one, which is opened at once, is missing or empty.
    """

    def __init__(
        self, read: Callable[[str], Any], names: Iterable[str], *, first: str, source: str
    ) -> None:
        self._read, self._names = cache(read), sorted(names)
        if first not in self:
            raise ValueError(f"{source}: has no split '{first}', only {', '.join(self)}")
        if len(self[first].images) == 0:
            raise ValueError(f"{source}: its split '{first}' is empty")

    def __getitem__(self, split: str) -> Any:
        if split not in self._names:
            raise KeyError(split)
        return self._read(split)

    def __contains__(self, split: object) -> bool:
        return split in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
