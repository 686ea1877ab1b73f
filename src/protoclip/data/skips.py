"""What training leaves out: a record of bad samples, and an end to a run that has too many."""

import json
from pathlib import Path

from protoclip.data.access import visible
from protoclip.data.pairs import BadSample

# Reasons that the message of a stopped run quotes.
QUOTED = 10


class SkipLog:
    """Counts bad samples and writes each once, with its reason, to a file of JSON lines.

    Args:
        path: The file, made with the first bad sample and continued where it exists.
        max_share: Share of bad samples, in [0, 1], above which the run stops.
        at_least: Samples that the share is taken of until so many were read, so that one bad file
            among the first few does not stop a run.
    """

    def __init__(self, path: Path, *, max_share: float, at_least: int) -> None:
        self.path, self.max_share, self.at_least = path, max_share, at_least
        self.read = self.skipped = 0
        self.notes: list[str] = []
        self._quoted: list[str] = []
        self._known: set[str] = set()
        self._torn = False
        if path.exists():
            self._read()

    def _read(self) -> None:
        """What the file knows; a name in it may hold line breaks of Unicode's other than `\\n`."""
        text, bad = self.path.read_text(encoding="utf-8", errors="replace"), 0
        self._torn = not text.endswith("\n")  # as a process that was killed leaves it
        for line in filter(None, text.split("\n")):
            try:
                self._known.add(str(json.loads(line)["sample_id"]))
            except (ValueError, KeyError, TypeError):
                bad += 1
        if bad:
            self.notes.append(f"{self.path}: {bad} lines are damaged and passed over")

    @property
    def distinct(self) -> int:
        """Bad samples so far, each counted once."""
        return len(self._known)

    def add(self, read: int, bad: list[BadSample]) -> None:
        """Record what one batch met.

        Args:
            read: Samples that were read for it, bad ones included.
            bad: The bad ones.

        Raises:
            ValueError: More than `max_share` of all samples read so far were bad.
        """
        self.read += read
        self.skipped += len(bad)
        for sample in bad:
            if sample.sample_id in self._known:
                continue
            self._known.add(sample.sample_id)
            if len(self._quoted) < QUOTED:
                self._quoted.append(visible(f"{sample.where}: {sample.reason}"))
            self._write(sample)
        if self.skipped > self.max_share * max(self.read, self.at_least):
            raise ValueError(
                f"{self.skipped} of {self.read} samples read are bad, more than "
                f"data.max_bad_share ({self.max_share:g}) allows; mend the data or raise it "
                f"({'; '.join(self._quoted)}; all in {self.path})"
            )

    def _write(self, sample: BadSample) -> None:
        facts = {"sample_id": sample.sample_id, "where": sample.where, "reason": sample.reason}
        line = "\n" * self._torn + json.dumps(facts, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:  # errors of writing do not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._torn = False
