"""Which page of `docs/` explains a setting or a command, for errors and for the reference."""

import re

from protoclip.config import Config

# By section of the settings.
SECTIONS = {
    "run": "training.md",
    "data": "data.md",
    "model": "models.md",
    "episodes": "data.md#episodes",
    "prototypes": "method.md",
    "teacher": "training.md#a-teacher",
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
    "embed-teacher": "training.md#a-teacher",
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
    "loss.positives": "models.md#fine-tune",
    "loss.keep_by": "models.md#fine-tune",
    "episodes.micro_batch_size": "scaling.md",
}
SETTING = re.compile(r"(?:--)?(([a-z]+)\.[a-z_]+)(?=[:.\[\s])")
OPTION = re.compile(r"(?:--)?[a-z_]+: ")


def names_setting(words: str) -> bool:
    """Whether these words are a setting, and no file such as `run.html`."""
    section, _, name = words.partition(".")
    return section in SECTIONS and hasattr(getattr(Config(), section), name)


def with_page(message: str, command: str) -> str:
    """The message of an error, with the page that explains the setting or option it begins with.

    >>> with_page("data.train: cc12m: no such file", "train")
    'data.train: cc12m: no such file (docs/data.md)'
    """
    page = None
    if (setting := SETTING.match(message)) and names_setting(setting[1]):
        page = SETTINGS.get(setting[1], SECTIONS[setting[2]])
    elif OPTION.match(message):
        page = COMMANDS.get(command)
    return message if page is None or ".md" in message else f"{message} (docs/{page})"
