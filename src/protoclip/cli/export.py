"""`protoclip export`: its options, what it prints, and the question before an upload."""

import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from protoclip.cli.spec import Answers, quick_imports
from protoclip.rules import require_model, require_place
from protoclip.terminal import say, visible


@dataclass(frozen=True)
class Export(Answers):
    """Write a model as a folder that other libraries load.

    They are open_clip, transformers, timm, ONNX Runtime and Immich. Each loads
    what was written, and must compute the same features.
    """

    model: str  # A run, or another model that protoclip.load opens.
    folder: str  # A new folder; with --overwrite, an earlier export.
    _: KW_ONLY
    formats: str = "auto"  # With commas: open_clip, hf, timm, onnx, immich.
    opset: int = 18  # Opset of the ONNX graphs.
    license: str = "unknown"  # Licence for the model card, such as mit.
    push_to_hub: str | None = None  # Also upload to the Hugging Face hub, as me/model.
    allow_links: bool = False  # Follow symbolic links to the run's captions.
    overwrite: bool = False  # Replace a folder that export wrote.
    yes: bool = False  # Upload without showing the model card and asking.

    def __call__(self) -> None:
        require_model("", self.model)
        require_place("folder", self.folder, is_folder=True)
        terminal = sys.stdin is not None and sys.stdin.isatty()
        if self.push_to_hub is not None and not (self.yes or terminal):
            raise ValueError(
                "--push-to-hub: needs a terminal to ask before uploading; give --yes to upload "
                "without asking"
            )
        with quick_imports():
            from protoclip.export.run import export

        facts = export(
            self.model,
            self.folder,
            [name.strip() for name in self.formats.split(",") if name.strip()],
            opset=self.opset,
            license=self.license,
            push_to_hub=self.push_to_hub,
            allow_links=self.allow_links,
            overwrite=self.overwrite,
            agrees=self.agrees,
        )
        self.answer(facts, lambda: self.show(facts))

    def show(self, facts: Mapping[str, Any]) -> None:
        print(f"{'format':<12}{'image':>10}{'text':>10}  largest difference of features")
        for name, by_modality in facts["differences"].items():
            differences = by_modality.values()
            values = [f"{'-' if d is None else format(d, '.1e'):>10}" for d in differences]
            print(f"{name:<12}{''.join(values)}  {facts['formats'].get(name, 'protoclip.load')}")
        for name, reason in facts["left_out"].items():
            say(f"note: not as {name}: {reason}")
        if facts["names_its_path"] and "url" not in facts:
            say(
                "note: open_clip finds the text tower by the folder's path in "
                "open_clip_config.json; change it there if you move the folder"
            )
        if facts["prototypes"]:
            say(f"note: no prototypes: {facts['prototypes']}")
        if facts["captions"]:
            say(f"note: no captions of prototypes: {facts['captions']}")
        say(f"written to {visible(facts.get('url', facts['folder']))}")

    def agrees(self, card: str) -> bool:
        """Show the model card and ask whether to upload."""
        if self.yes:
            return True
        for line in card.splitlines():
            say(line, is_question=True)
        question = f"Upload {self.folder} with this model card to {self.push_to_hub}? [y/N]"
        say(question, is_question=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")
