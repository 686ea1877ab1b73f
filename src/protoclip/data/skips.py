"""What training leaves out: a record of bad samples, and an end to a run that has too many."""

import json
from pathlib import Path

from protoclip.data.locations import visible
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
        self._quoted: list[str] = []
        self._known: set[str] = set()
        if path.exists():
            # Not `splitlines`: a name may hold other characters that end lines of text.
            lines = path.read_text(encoding="utf-8").split("\n")
            self._known = {json.loads(line)["sample_id"] for line in lines if line.endswith("}")}

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts, ensure_ascii=False) + "\n")
