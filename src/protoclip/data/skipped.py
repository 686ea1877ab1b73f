"""The log of the samples that a run could not use.

Sources say why a sample cannot be used, by `BadSample` of `pairs.py`, and `loader.py` puts another
one in its place.
"""

import contextlib
import errno
import json
from pathlib import Path

from protoclip.data.access import GO_ON, is_url
from protoclip.data.pairs import LOST, BadSample
from protoclip.files import naming, open_to_append, read_local, to_json
from protoclip.terminal import say

DAMAGED = (ValueError, KeyError, TypeError, RecursionError)  # what a damaged line raises
QUOTED = 3  # reasons in the message of a run that is stopped


class SkipLog:
    """Counts bad samples, and writes each once, with its reason, to a file of JSON lines.

    It warns of shards that cannot be read to their end: how many samples they hold is not known.

    A share of bad samples above `max_share` stops the run. It is taken of `at_least` samples or
    more, so that one bad file among the first few does not stop it. `known` has the ids of the bad,
    and `broken` those of them with which more of a shard is lost.
    """

    def __init__(self, path: Path, *, max_share: float, at_least: int) -> None:
        self.path, self.max_share, self.at_least = path, max_share, at_least
        self.read = self.skipped = 0
        self._reasons: list[str] = []
        self.known, self.broken = set[str](), set[str]()
        self._warned = self._torn = False
        # Ranks have a file each. There may have been more of them before.
        for file in path.parent.glob("skipped*.jsonl"):
            try:
                text = read_local(file, errors="replace")
            except ValueError as error:
                raise ValueError(f"{file}: {error}; remove it") from None
            if file == path:  # a process that was killed leaves part of a line
                self._torn = bool(text) and not text.endswith("\n")
            self._learn(text)
        self._before = {*self.known}  # of all ranks

    @property
    def new(self) -> tuple[set[str], set[str]]:
        """The bad samples, and the broken shards, that no rank had met before this process."""
        return self.known - self._before, self.broken - self._before

    def _learn(self, text: str) -> None:
        """What lines of a file say is known from now on."""
        # Sample ids may hold line breaks of Unicode's other than "\n".
        for line in text.split("\n"):
            with contextlib.suppress(*DAMAGED):
                entry = json.loads(line)
                self.known.add(str(entry["sample_id"]))
                if str(entry["reason"]).endswith(LOST):
                    self.broken.add(str(entry["sample_id"]))

    @property
    def summary(self) -> str:
        """What was skipped so far, for a line of progress; empty if nothing was."""
        shards = f" and {len(self.broken)} shards not read to their end" if self.broken else ""
        return f", {len(self.known)} samples skipped{shards}" if self.known else ""

    def add(self, read: int, bad: list[BadSample]) -> None:
        """Record a batch: how many samples were read for it, and the bad ones among them.

        Raises:
            ValueError: More than `max_share` of all samples read so far were bad.
        """
        self.read += read
        self.skipped += len(bad)
        for sample in bad:
            if sample.sample_id in self.known:
                continue
            self.known.add(sample.sample_id)
            self._reasons = [*self._reasons, str(sample)][:QUOTED]
            if sample.reason.endswith(LOST):
                self.broken.add(sample.sample_id)
                unknown = "" if "samples) " in sample.reason else ", no one knows how many samples"
                say(f"warning: {sample.where}: {sample.reason}{unknown}")
            self._write(sample)
        if self.skipped > self.max_share * max(self.read, self.at_least):
            way = f", or {GO_ON}" if bad and is_url(bad[-1].where) else ""
            raise ValueError(
                f"{self.skipped} of {self.read} samples read are bad, more than "
                f"data.max_bad_share ({self.max_share:g}) allows; mend the data or raise it{way} "
                f"({'; '.join(self._reasons)}; all in {self.path})"
            )

    def _write(self, sample: BadSample) -> None:
        """Add a line; a full disk costs a warning, and not the run."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with naming(self.path), open_to_append(self.path) as file:
                line = ("\n" * self._torn + to_json(vars(sample)) + "\n").encode()
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "only a part was written; the disk may be full")
        except OSError as error:
            if not self._warned:
                say(f"warning: {error}; samples that are skipped are counted, and not listed there")
            self._warned = self._torn = True
            return
        self._torn = False
