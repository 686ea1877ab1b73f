"""Which page of `docs/` explains a setting or a command, for errors and for the reference."""

import re

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
SETTING = re.compile(r"(?:--)?([a-z]+)\.[a-z]")
OPTION = re.compile(r"(?:--)?[a-z_]+: ")


def with_page(message: str, command: str) -> str:
    """The message of an error, with the page that explains the setting or option it begins with.

    >>> with_page("data.train: cc12m: no such file", "train")
    'data.train: cc12m: no such file (docs/data.md)'
    """
    page = None
    if (setting := SETTING.match(message)) and setting[1] in SECTIONS:
        page = SECTIONS[setting[1]]
    elif OPTION.match(message):
        page = COMMANDS.get(command)
    return message if page is None or ".md" in message else f"{message} (docs/{page})"
