"""`protoclip completion`: what a shell runs at each Tab, and the words that it then asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from protoclip.cli.spec import full_name, options, positional

ASKS = "_PROTOCLIP_COMPLETE"  # set where a shell asks what may follow the words of a command
SCRIPTS = {
    "bash": f"""_protoclip() {{
    local found
    found=$({ASKS}=1 "${{COMP_WORDS[@]:0:COMP_CWORD}}" 2>/dev/null)
    COMPREPLY=($(compgen -W "$found" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _protoclip protoclip""",
    "zsh": f"""_protoclip() {{
    local -a found
    found=(${{(f)"$({ASKS}=1 $words[1,CURRENT-1] 2>/dev/null)"}})
    compadd -a found || _files
}}
compdef _protoclip protoclip""",
    "fish": f"complete -c protoclip -a '(env {ASKS}=1 (commandline -opc) 2>/dev/null)'",
}


@dataclass(frozen=True)
class Completion:
    """Print a script that completes commands and options in a shell.

    Put `source <(protoclip completion bash)` into ~/.bashrc, or the same with zsh
    into ~/.zshrc; in fish, `protoclip completion fish | source`.
    """

    shell: Literal["bash", "zsh", "fish"]  # bash, zsh or fish.

    def __call__(self) -> None:
        print(SCRIPTS[self.shell])


def complete(commands: Mapping[str, type[Any]], words: list[str]) -> list[str]:
    """The commands, options or choices that may follow some words; nothing where files may."""
    names = [name.split() for name in commands]
    if after := [name[len(words)] for name in names if name[: len(words)] == words != name]:
        return after
    kind = commands.get(words[0]) or commands.get(" ".join(words[:2]))
    types = dict(options(kind)) if kind else {}
    hint = types.get(full_name(words[-1].lstrip("-").replace("-", "_"), types), bool)
    if words[-1].startswith("--") and hint is not bool:  # which has a value
        return [choice for choice in get_args(hint) if isinstance(choice, str)]
    arguments = positional(kind) if kind else []
    return [f"--{name}" for name in types if name not in arguments]
