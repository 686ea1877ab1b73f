"""Typos in paths, found in milliseconds: commands look here before they import anything slow.

Of what a file holds only the columns that settings name are looked for, by `columns.py`; all else
is seen by what reads it. Standard library only.
"""

import difflib
import os
import re
from contextlib import suppress
from itertools import islice
from pathlib import Path

from protoclip.columns import require_columns
from protoclip.config import HALVES, START, Config, DataConfig, SourceConfig
from protoclip.files import kind_of, read_local

# What names something else than a local file or folder, as the beginning of a reference.
DATA_KINDS = ("pipe:", "hf:", "wds:", "torchvision:", "karpathy:")
MODEL_KINDS = ("open_clip:", "hf:", "local-dir:", "reference:", "timm:")
# What may stand behind a data set that judges a model, as in `pairs.tsv,root=images`.
COLUMN_OPTIONS = ("image_column", "caption_column", "id_column", "class_column")
DATA_OPTIONS = (*COLUMN_OPTIONS, "root")
# What the model card of each export says; a folder without it is not replaced by another export.
EXPORTED = "An image tower and a text tower with one joint space, exported from"
DATA_HINT = "emoji, a table or folder of pairs, tar shards, hf:OWNER/NAME, a folder of classes, "
DATA_HINT += "wds:FOLDER_OR_URL, torchvision:NAME, karpathy:FILE.json"
MODEL_HINT = "other models are written open_clip:NAME[/TAG], hf:NAME_OR_FOLDER, "
MODEL_HINT += "local-dir:FOLDER or reference:FILE,model=NAME"


def require_paths(config: Config) -> None:
    """Refuse local paths in the settings of a run that do not exist.

    Raises:
        ValueError: Names the setting, and a file or folder of nearly that name if there is one.
    """
    require_data_paths(config.data)
    require_model("model.start", config.model.start)
    for teacher in (config.teacher, *config.teachers):
        if teacher.features not in ("emoji", START, *HALVES.values()):
            require_features(teacher.features)
    for guard in config.run.guard:
        require_data_set("run.guard", guard)


def require_data_paths(data: DataConfig) -> None:
    """As `require_paths`, for the section `data`."""
    if not data.sources:
        require_source("data.train", data.train)
    for number, source in enumerate(data.sources):
        require_source(f"data.sources[{number}].path", source.path)
        require_folder(f"data.sources[{number}].root", source.root)
    if isinstance(data.validation, str):
        require_source("data.validation", data.validation)
    require_folder("data.root", data.root)
    require_file("data.only", data.only)
    require_file("data.without", data.without)
    for source in data.sources or [SourceConfig(path=data.train)]:
        if not is_no_path(source.path):
            require_columns(source.path, named_columns(source, data))


def named_columns(source: SourceConfig, data: DataConfig) -> list[str]:
    """The columns of a source that its settings, or else those of `data`, name."""
    names: list[str] = []
    for setting in ("image_column", "caption_column", "id_column", "class_column"):
        named = getattr(source, setting)
        named = getattr(data, setting) if named is None else named
        names += named if isinstance(named, list) else [named or ""]
    return [name for name in names if name]


def is_no_path(reference: str) -> bool:
    """Whether data are named otherwise than by a path, whatever files there are."""
    return reference == "emoji" or reference.startswith(DATA_KINDS)


def require_source(setting: str, path: str) -> None:
    """Refuse a source of data that is a local path, without a pattern, and does not exist."""
    is_pattern = any(sign in path for sign in "*{?[")
    if not is_no_path(path) and not is_pattern:
        require_path(setting, path, "no such file")


def require_data_set(setting: str, reference: str) -> None:
    """As `require_source`, for what may also be the name of a data set, with options behind it.

    A word that is no path passes: its reader says where such a data set is to be had.
    """
    reference, options = with_options(reference, setting)
    require_folder(f"{setting}: root", options.get("root"))
    is_pattern = any(sign in reference for sign in "*{?[")
    is_word = re.fullmatch(r"[\w-]+", reference) and not suggestion(reference)
    if not (is_no_path(reference) or is_pattern or is_word):
        what = f"no such file, and no reference to a data set ({DATA_HINT})"
        require_path(setting, reference, what)


def with_options(reference: str, setting: str = "") -> tuple[str, dict[str, str]]:
    """A data set that judges a model, and the options behind it, by name.

    Raises:
        ValueError: There is no such option, or it has no value.
    """
    name, *options = re.split(r",(?=\w+=)", reference)
    if name in DATA_KINDS:
        what = {"wds:": "FOLDER_OR_URL", "hf:": "OWNER/NAME", "karpathy:": "FILE.json"}
        raise ValueError(
            f"{f'{setting}: ' * bool(setting)}'{reference}' is not complete; give "
            f"{name}{what.get(name, 'NAME')}"
        )
    known = [option for option in options if option.partition("=")[0] in DATA_OPTIONS]
    others = [option for option in options if option not in known]
    # Names on the hub have options of their own, and a file may be called as if it had some.
    start = f"{setting}: " if setting else ""
    if (options and not name) or any(option.endswith("=") for option in known):
        raise ValueError(f"{start}'{reference}' is not complete; give REF,class_column=NAME")
    name = ",".join([name, *others])
    is_free = re.match(r"hf:|.*(://|[*{?[])", name)
    path = re.sub(r"^(wds|karpathy):", "", name)
    if others and not is_free and not os.path.exists(path):  # noqa: PTH110 (Path raises)
        raise ValueError(
            f"{start}'{reference}': no option '{others[0].partition('=')[0]}' and no such file; "
            f"behind a data set may stand {', '.join(COLUMN_OPTIONS)} (,class_column=NAME) and "
            ",root=FOLDER"
        )
    return name, dict(option.split("=", 1) for option in known)


def require_model(setting: str, reference: str | None) -> None:
    """Refuse a model that is a local path and does not exist."""
    if reference is not None and not reference.startswith(MODEL_KINDS):
        what = f"no such run or checkpoint folder; {MODEL_HINT}"
        require_path(setting, reference, what)


def require_teacher(setting: str, reference: str) -> None:
    """Refuse a teacher that is a local path and does not exist."""
    if reference != "minilm" and not reference.startswith(MODEL_KINDS):
        what = "no such run folder or file of features; other teachers are written minilm, "
        what += "hf:NAME_OR_FOLDER, open_clip:MODEL/TAG or timm:MODEL"
        require_path(setting, reference, what)


def require_half(setting: str, reference: str) -> None:
    """Refuse a pretrained half that is a local path and does not exist."""
    if reference != "minilm" and not reference.startswith(MODEL_KINDS):
        what = "no such run folder; other halves are written minilm, hf:NAME_OR_FOLDER, "
        what += "timm:MODEL or open_clip:MODEL/TAG"
        require_path(setting, reference, what)


def require_run(folder: str) -> None:
    """Refuse a run folder that does not exist."""
    require_path("", folder, "no such run folder")


def require_file(setting: str, path: str | None) -> None:
    """Refuse a file or folder that does not exist, a URL, and a pipe or device."""
    if path is not None:
        require_path(setting, path, "no such file")
        if "://" in path:
            raise ValueError(f"{setting}: {path}: is not read from a URL; copy it here first")


def require_features(path: str | None) -> None:
    """Refuse features of a teacher that are no URL and do not exist."""
    if path is not None:
        require_path("teacher.features", path, "no such file")


def require_folder(setting: str, path: str | None) -> None:
    """Refuse a folder that does not exist, or is none."""
    if path is not None:
        require_path(setting, path, "no such folder")
        if "://" not in path and not Path(path).is_dir():
            raise ValueError(f"{setting}: {path}: is a file, not a folder; name a folder")


def require_path(setting: str, path: str, what: str) -> None:
    """Refuse a local path that does not exist, as `what`, and a pipe or device."""
    start = f"{setting}: {path}" if setting else path
    if not path.strip():
        raise ValueError(f"{setting or 'an argument'}: is empty; name a file or folder")
    if "://" in path:
        return
    if "\0" in path:
        raise ValueError(f"{start}: a path holds no zero byte; leave it out")
    try:
        kind = kind_of(Path(path).expanduser().stat())
    except FileNotFoundError:
        if Path(path).is_symlink():
            what, path = f"is a link to {Path(path).readlink()}, which is not there", ""
        raise ValueError(f"{start}: {what}{suggestion(path)}") from None
    except NotADirectoryError:
        above = next(folder for folder in Path(path).parents if folder.exists())
        raise ValueError(f"{start}: {what}; {above} is a file, not a folder") from None
    # RuntimeError: of a user without a home. UnicodeError: no file has half of a character.
    except (OSError, RuntimeError, UnicodeError) as error:
        error = getattr(error, "strerror", None) or error
        raise ValueError(f"{start}: cannot be opened ({error}); check the path") from None
    if kind not in ("a file", "a folder"):  # may block, or have no end
        raise ValueError(f"{start}: is {kind}, not a file; name a file that can be read again")


def require_empty(setting: str, folder: Path) -> None:
    """Refuse a folder that holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is not empty; choose a new folder with {setting}")


def require_place(setting: str, path: str, *, is_folder: bool, suffix: str = "") -> None:
    """Refuse a path where no file, or with `is_folder` no folder, can be written.

    A file needs the suffix, so that a wrong name does not replace something else. Whether a folder
    may already hold something is for others to say.
    """
    if not path.strip():
        raise ValueError(f"{setting}: is empty; name a {'folder' if is_folder else 'file'}")
    target, start = Path(path), f"{setting}: {path}"
    if "://" in path:
        raise ValueError(f"{start}: is a URL; name a place on a disk")
    if target.is_symlink() and not target.exists():
        raise ValueError(f"{start}: is a link that leads nowhere; choose another place")
    if target.is_dir() and not is_folder:
        raise ValueError(f"{start}: is a folder; name a file in it")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ValueError(f"{start}: is a device or a pipe; choose another place")
    if not path.lower().endswith(suffix):
        raise ValueError(f"{start}: needs a name that ends in {suffix}")
    above = target if is_folder else target.parent
    above = next(folder for folder in (above, *above.parents) if folder.exists())
    if not above.is_dir():
        what = "" if above == target else f"{above} "
        raise ValueError(f"{start}: {what}is a file, not a folder; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"{start}: {above} may not be written to; check its permissions, or choose another "
            "place"
        )


def require_store(setting: str, path: str) -> None:
    """Refuse a path that is no folder, and where none can be made.

    One that may not be written to will do, if it holds all that is asked for.
    """
    if not path.strip() or not Path(path).is_dir():
        require_place(setting, path, is_folder=True)


def require_new(folder: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that exists; with `overwrite` only one that is no export."""
    if not Path(folder).exists():
        return
    if has_git(Path(folder)):
        raise ValueError(
            f"{folder}: exists, and holds .git, which is never removed; choose another folder"
        )
    if not is_export(Path(folder)):
        raise ValueError(f"{folder}: exists; choose another folder, or remove it")
    if not overwrite:
        raise ValueError(f"{folder}: exists; choose another folder, or give --overwrite")


def require_apart(reference: str, folder: str | Path) -> None:
    """Refuse a folder that is a local model, or holds it: the model would go with the folder."""
    if not Path(folder).exists():
        return
    model = Path(re.sub(r"^(hf|local-dir|reference):|,model=[^,]*$", "", reference))
    if model.exists() and Path(folder).resolve() in (model.resolve(), *model.resolve().parents):
        raise ValueError(f"{folder}: the model that is exported lies here; choose another folder")


def is_export(folder: Path) -> bool:
    """Whether a folder has the model card of an export, and is no Git clone of one."""
    try:
        return EXPORTED in read_local(folder / "README.md") and not has_git(folder)
    except (OSError, ValueError):
        return False


def has_git(folder: Path) -> bool:
    """Whether a folder is a Git clone, whose history is nowhere else."""
    return os.path.lexists(folder / ".git")


def suggestion(path: str) -> str:
    """What to say about a name close to that of a path which does not exist; or nothing."""
    with suppress(OSError, ValueError):
        missing = Path(path)
        while not missing.parent.exists():  # a folder above may be the one that is misspelt
            missing = missing.parent
        names = [each.name for each in islice(missing.parent.iterdir(), 10_000)]
        names = [each for each in names if each.isascii() and each.isprintable()]
        for close in difflib.get_close_matches(missing.name, names, n=1):
            near = missing.with_name(close) / Path(path).relative_to(missing)
            return f"; did you mean {near}?" if near.exists() else ""
    return ""
