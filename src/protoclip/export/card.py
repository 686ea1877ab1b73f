"""What goes along with the weights: the model card, and the prototypes of a run."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from huggingface_hub import ModelCardData
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

import protoclip
from protoclip.config import Config, flatten
from protoclip.data import sources
from protoclip.data.access import cache_folder, is_url
from protoclip.data.pairs import BadSample, Pairs
from protoclip.encode.features import Encoder
from protoclip.evaluation.paired import RunResults, read_results
from protoclip.export.open_clip import Source
from protoclip.files import read_json, read_toml, to_json, write_atomically
from protoclip.models.checkpoint import (
    MODEL,
    RESUME,
    SETTINGS,
    checkpoints,
    find_checkpoint,
    read_clusters,
    read_config,
    run_of,
)
from protoclip.prototypes.targets import back_translate
from protoclip.results.compare import compare_runs
from protoclip.results.table import decimals, format_cell, markdown_lines
from protoclip.terminal import line, visible, without_secrets
from protoclip.training.folder import list_names

CARD, FIGURE, PROTOTYPES = "README.md", "training.png", "prototypes"
# Most pairs whose captions are read, and the number of captions of a prototype.
PAIRS, NEAREST = 20_000, 5
# Sections of a run's settings that the card shows.
SECTIONS = ("data", "model", "episodes", "prototypes", "teacher", "teachers", "loss", "optim")
# Every card has these words; an export does not replace a folder without them.
ADDRESS = "https://github.com/protoclip/protoclip"
EXPORTED = "An image tower and a text tower with one joint space, exported from"
# What a card says of each reader, with a few lines of code.
READERS = read_toml(Path(__file__).parent / "readers.toml")


def write_prototypes(
    source: Source, folder: Path, *, allow_links: bool = False
) -> tuple[str | None, str | None]:
    """Write the prototypes of a checkpoint, and the captions nearest to them.

    `prototypes.safetensors` holds for image, text and each teacher `SPACE.centroids` `(k, p)` and
    `SPACE.sizes` `(k,)`, the number of members; and `image_head.*` and `text_head.*`, the heads
    that turn features into the space of the centroids. For image and teachers, whose spaces differ
    from the captions', `SPACE.in_text` `(k, p)` is the mean of the text centroids of a prototype's
    members, and the nearest captions are those of this mean: no loss brings the projections of
    images and captions together. `prototypes.json` describes these tensors, and has the captions
    nearest to each prototype that has members.

    Returns:
        Why there are no prototypes, and why no captions; None where there are.
    """
    checkpoint = source.checkpoint
    alpha = None if checkpoint is None else read_json(checkpoint / MODEL).get("alpha")
    if checkpoint is not None and alpha is not None and checkpoints(checkpoint):
        end, part = checkpoints(checkpoint)[-1], f"this is alpha {alpha:g}"
        if alpha < 1:
            return f"they are of the end of fine-tuning, and {part}; export {end}", None
        checkpoint = end
    if checkpoint is None or not (checkpoint / RESUME).is_file():
        return "no checkpoint of a run", None
    if not (clusters := read_clusters(checkpoint)):
        return "the checkpoint holds none", None
    no_captions, captions = None, list[str]()
    if "text" in clusters:
        try:
            captions = read_captions(run_of(checkpoint), allow_links=allow_links)
        except (ValueError, OSError) as error:
            no_captions = f"the run's data cannot be opened ({line(str(error))})"
    projected = project(source, captions) if captions else None
    tensors, spaces = dict[str, Tensor](), dict[str, Any]()
    for space, (centroids, assignments) in clusters.items():
        valid = assignments >= 0
        sizes = torch.bincount(assignments[valid], minlength=len(centroids))
        tensors |= {f"{space}.centroids": centroids, f"{space}.sizes": sizes}
        spaces[space] = {"number": len(centroids), "width": centroids.shape[1]}
        spaces[space]["sizes"] = sizes.tolist()
        in_text = centroids
        if space != "text" and "text" in clusters:
            text_centroids = clusters["text"][0][clusters["text"][1]]
            in_text = back_translate(assignments[valid], text_centroids[valid], len(centroids))
            tensors[f"{space}.in_text"] = in_text
        if projected is not None:
            # Projections have unit norm, so the largest product is the smallest distance.
            order = (in_text @ projected.T).topk(min(NEAREST, len(captions))).indices.tolist()
            spaces[space]["nearest_captions"] = [
                [captions[number] for number in row] if size else []
                for row, size in zip(order, sizes.tolist(), strict=True)
            ]
    for name in ("image_head", "text_head"):
        head = source.model.get_submodule(name).state_dict()
        tensors |= {f"{name}.{key}": value for key, value in head.items()}
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    write_atomically(folder / f"{PROTOTYPES}.safetensors", save(contiguous))
    facts = {
        "about": "K-means of one episode's projections: h = normalize(head(features))",
        "spaces": spaces,
        "heads": str(source.model.get_submodule("image_head")),
    }
    write_atomically(folder / f"{PROTOTYPES}.json", to_json(facts, indent=2) + "\n")
    return None, no_captions


def read_captions(run: Path | None, *, allow_links: bool) -> list[str]:
    """Captions of at most `PAIRS` of a run's pairs, evenly spread; raises `ValueError` for none."""
    if run is None:
        raise ValueError("the checkpoint is not in the folder of its run")
    config = read_config(run, allow_links=allow_links)
    for entry in sources.list_entries(config.data):
        if is_url(entry.path) or entry.path.startswith("hf:"):
            raise ValueError(f"{without_secrets(entry.path)} is not on this machine")
    pairs = sources.open_samples(sources.allow_bad(config))
    if not isinstance(pairs, Pairs):
        raise ValueError("a stream has no order to draw from")
    captions: dict[str, None] = {}
    for row in np.unique(np.linspace(0, len(pairs) - 1, PAIRS).astype(int)):
        with suppress(BadSample):
            captions |= dict.fromkeys(pairs.sample_captions(int(row)))
    if not captions:
        raise ValueError("it has no captions")
    return list(captions)


@torch.inference_mode()
def project(source: Source, captions: Sequence[str]) -> Float[Tensor, "n p"]:
    """The normalised projections of captions."""
    encoder = Encoder(
        model=source.model,
        transform=source.transform,
        tokenizer=source.tokenizer,
        cache=cache_folder() / "features",
        show=True,
    )
    features = encoder.encode_texts(captions, stage="captions of prototypes")
    projected = source.model.text_head(features)  # type: ignore[operator]
    return torch.nn.functional.normalize(projected, dim=1)


def write_front_matter(license: str, libraries: Sequence[str]) -> str:
    """The card's part for the hub; a licence that cannot be an identifier is `other`, by name."""
    is_listed = re.fullmatch(r"[a-z0-9.+-]+", license.lower()) is not None
    return ModelCardData(
        license=license.lower() if is_listed else "other",
        license_name=None if is_listed else visible(license),
        library_name=(*libraries, "onnx")[0],
        pipeline_tag="zero-shot-image-classification",
        tags=["clip", "protoclip", *libraries[1:]],
    ).to_yaml()


def escape_markdown(text: str) -> str:
    """A text that others wrote, for a heading or the brackets of an image."""
    return re.sub(r"([\\\[\]<>`!])", r"\\\1", visible(text))


def write_card(
    source: Source, folder: Path, facts: Mapping[str, Any], *, hub_name: str | None
) -> None:
    """Write the model card; `facts` are what `export` returns."""
    run = None if source.checkpoint is None else run_of(source.checkpoint)
    settings = read_toml(run / SETTINGS) if run else {}
    name = flatten(settings).get("run.name") or Path(facts["folder"]).name
    names = {"open_clip": "open_clip", "hf": "transformers", "timm": "timm"}
    libraries = [names[kind] for kind in facts["formats"] if kind in names]
    missing = facts["prototypes"]
    lines = [
        *["---", write_front_matter(facts["license"], libraries), "---", ""],
        *[f"# {escape_markdown(str(name))}", ""],
        f"{EXPORTED} `{visible(source.reference)}` by "
        f"[protoclip {protoclip.__version__}]({ADDRESS}).",
        "",
        f"Images become tensors of shape {source.image_shape}, and captions "
        f"{source.context_length} tokens. For a softmax, multiply similarities by "
        f"{source.towers.logit_scale.exp().item():.4g}.",
        *["", "## Load", "", *describe_loading(folder, facts, hub_name)],
        *["", READERS["elsewhere"], ""] * bool(libraries),
        *["## Data and settings", "", *describe_settings(settings, source.checkpoint)],
        *["", "## Metrics", "", *describe_metrics(run, source.checkpoint, settings, folder)],
        *["", "## Prototypes", ""],
        f"None: {missing}." if missing else "`prototypes.safetensors`, `prototypes.json`.",
    ]
    (folder / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe_loading(folder: Path, facts: Mapping[str, Any], hub_name: str | None) -> list[str]:
    """The formats, and a few lines of code for each reader."""
    differences, rows = facts["differences"], []
    for name, kind in {**facts["formats"], "protoclip": "`protoclip.load`"}.items():
        if name in differences:
            values = [differences[name][modality] for modality in ("image", "text")]
            rows.append([name, kind, *("-" if v is None else f"{v:.1e}" for v in values)])
    code = f"folder = {json.dumps(Path(facts['folder']).name)}"
    if hub_name is not None:
        code = f'import huggingface_hub\nfolder = huggingface_hub.snapshot_download("{hub_name}")'
    parts = ["parts"] if (folder / "tokenizer_config.json").exists() else []
    return [
        "Features were compared with those of the original model, on images and captions of the",
        "emoji data. The largest difference is relative to the mean norm of the features.",
        "",
        *markdown_lines(["format", "what it is", "image features", "text features"], rows),
        *(f"\nNot as {name}: {reason}." for name, reason in facts["left_out"].items()),
        "",
        *write_examples([*differences, *parts], code),
        *[READERS["moved"], ""] * bool(facts["names_its_path"] and hub_name is None),
    ]


def write_examples(formats: Sequence[str], find_folder: str) -> Iterator[str]:
    """A few lines of code for each reader, after the code that finds the folder."""
    examples, prepare = READERS["examples"], READERS["prepare"]
    for name in (name for name in formats if name in examples):
        code = [READERS["common"].format(folder=find_folder), "", examples[name]]
        if name == "onnx":
            code[2:2] = [prepare[next((kind for kind in prepare if kind in formats), "none")]]
        yield "\n".join(["```python", *code, "```", ""])


def describe_settings(settings: Mapping[str, Any], checkpoint: Path | None) -> list[str]:
    """What a model was made of: start or towers, weights, teachers, data, positives, settings."""
    if not settings:
        return ["Not known: the model does not come from a run folder."]
    values, rows = flatten(settings), list[tuple[str, str]]()
    if start := values.get("model.start") or values.get("model.name"):
        tag = f", weights `{visible(str(tag))}`" if (tag := values.get("model.pretrained")) else ""
        rows.append(("start", f"`{visible(str(start))}`{tag}"))
    else:
        for tower in ("image", "text"):
            name = values.get(f"model.{tower}.name") or f"new, `model.{tower}` below"
            rows.append((f"{tower} tower", visible(str(name))))
    alpha = None if checkpoint is None else read_json(checkpoint / MODEL).get("alpha")
    if alpha is not None:
        way = f"{alpha:g} of the way from the start to the end of fine-tuning"
        rows.append(("weights", way))
    for what, many, key, one in (
        ("teachers", "teachers", "features", "teacher.features"),
        ("data", "data.sources", "path", "data.train"),
    ):
        names = [f"`{visible(name)}`" for name in list_names(values, many, key, one)]
        rows.append((what, ", ".join(names) or "none"))
    rows.append(("positives", f"`{visible(str(values.get('loss.positives', 'pair')))}`"))
    shown = {name: settings[name] for name in SECTIONS if settings.get(name)}
    lines = [*markdown_lines(["made of", ""], rows), ""]
    lines += ["```toml", tomli_w.dumps(shown).strip(), "```"]
    with suppress(ValueError):  # another version of the package wrote them
        if taught := Config.from_dict(settings).uses_of_teachers:
            lines += ["", f"Taught by {visible(taught)}."]
    return lines


def describe_metrics(
    run: Path | None, checkpoint: Path | None, settings: Mapping[str, Any], folder: Path
) -> list[str]:
    """The metrics of a finished run and its learning curves, if the checkpoint is its last."""
    lines = ["None: there are no results of this checkpoint."]
    if run is None or checkpoint is None or checkpoint.resolve() != find_checkpoint(run.resolve()):
        return lines
    if (run / "results.json").is_file():
        lines = table_of_metrics(read_results(run), settings) or lines
    if all(find_spec(name) is not None for name in ("jinja2", "matplotlib")):
        from protoclip.results.figures import draw_run

        with suppress(ValueError):  # without a log
            if (figure := draw_run(run)) is not None:
                (folder / FIGURE).write_bytes(figure[0])
                lines += ["", f"![{escape_markdown(figure[1])}]({FIGURE})"]
    return lines


def table_of_metrics(results: RunResults, settings: Mapping[str, Any]) -> list[str]:
    """The metrics of a run with their intervals, beside those of its start if it fine-tuned one."""
    (entry,) = compare_runs([results])
    metrics = results.facts.get("start_metrics")
    before = metrics if isinstance(metrics, dict) else {}
    rows = []
    for name, value in entry["metrics"].items():
        cell, start = format_cell(value, scale=1.0, digits=4), before.get(name)
        starts = [decimals(start, 4) if isinstance(start, float) else "-"] * bool(before)
        rows.append([f"`{name}`", *starts, cell.value, cell.interval or "-"])
    if not rows:
        return []
    return [
        *[name_validation(settings), ""],
        *markdown_lines(["metric", *["start"] * bool(before), "value", "95% interval"], rows),
        "",
        "Intervals are over groups of test samples, and wide where few are wrong, or few right; "
        "they leave out other seeds.",
    ]


def name_validation(settings: Mapping[str, Any]) -> str:
    """Names the data of a run's metrics. Data that a setting names may be trained on, too."""
    values = flatten(settings)
    guards = values.get("run.guard")
    names = [values.get("data.validation"), *(guards if isinstance(guards, list) else [])]
    # A share is held out, and the emoji have splits of their own.
    names = [name for name in names if isinstance(name, str) and name != "emoji"]
    if not names:
        return "On data that the run did not train on:"
    listed = ", ".join(f"`{visible(name)}`" for name in names)
    return f"On the validation data of the run; {listed} may share pairs with its training data:"
