"""Which page of `docs/` explains a setting or a command, for errors and for the reference.

The reference itself is written by `scripts/reference.py`.
"""

import re

from protoclip.config import Config

# By section of the settings.
SECTIONS = {
    "run": "training.md",
    "data": "data.md",
    "model": "models.md",
    "episodes": "data.md#episodes",
    "prototypes": "method.md",
    "teacher": "teachers.md",
    "loss": "method.md#the-sum",
    "optim": "training.md#the-model-and-what-follows-from-it",
    "align": "align.md",
    "parallel": "scaling.md",
}
COMMANDS = {
    "train": "training.md",
    "align": "align.md",
    "finetune": "models.md#fine-tune",
    "evaluate": "evaluation.md",
    "compare": "evaluation.md",
    "analyze": "grouping.md",
    "report": "report.md",
    "explore": "explore.md",
    "export": "models.md#export",
    "embed": "embed.md",
    "demo": "results.md#the-demonstration",
    "match": "match.md",
    "embed-teacher": "teachers.md",
    "data inspect": "data.md",
    "data pack": "data.md",
    "data index": "data.md",
}
# Of settings that another page than that of their section explains.
SETTINGS = {
    "run.sync": "run_folder.md",
    "run.guard": "models.md#fine-tune",
    "run.device": "scaling.md",
    "run.stop_by": "evaluation.md",
    "run.keep_best": "evaluation.md",
    "run.evaluate_every": "evaluation.md",
    "optim.layer_decay": "models.md#fine-tune",
    "loss.teacher": "teachers.md",
    "loss.positives": "models.md#fine-tune",
    "episodes.micro_batch_size": "scaling.md",
}
SETTING = re.compile(r"(?:--)?(([a-z]+)\.[a-z_]+)(?=[:.\[\s])")
SECTION = re.compile(r"(teacher|[a-z]+)s?: ")  # also the list of teachers


def names_setting(words: str) -> bool:
    """Whether these words are a setting, and no file such as `run.html`."""
    section, _, name = words.partition(".")
    return section in SECTIONS and hasattr(getattr(Config(), section), name)


def with_page(message: str, command: str) -> str:
    """The message of an error, with the page of what it begins with, else of the command.

    That is a setting or a section of settings. What names nothing at its beginning is no message of
    ours, and explained by no page.

    >>> with_page("data.train: cc12m: no such file", "train")
    'data.train: cc12m: no such file (docs/data.md)'
    >>> with_page("runs/mine: no run folder", "report")
    'runs/mine: no run folder (docs/report.md)'
    >>> with_page("teachers: 'x' is taken", "train")
    "teachers: 'x' is taken (docs/teachers.md)"
    >>> with_page("all the input array dimensions must match", "train")
    'all the input array dimensions must match'
    """
    page = COMMANDS.get(command) if ": " in message else None
    if (setting := SETTING.match(message)) and names_setting(setting[1]):
        page = SETTINGS.get(setting[1], SECTIONS[setting[2]])
    elif (section := SECTION.match(message)) and section[1] in SECTIONS:
        page = SECTIONS[section[1]]
    return message if page is None or ".md" in message else f"{message} (docs/{page})"
