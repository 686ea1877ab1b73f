"""Numbers on the pages that users plan by are those of the code, which other tests make smaller."""

from datetime import timedelta
from pathlib import Path

import pytest

from protoclip.data import access, shards, stream
from protoclip.distributed import collectives
from protoclip.training import overfit, symptoms, sync

DOCS = Path(__file__).resolve().parents[2] / "docs"
MIB = 2**20


@pytest.mark.parametrize(
    ("page", "sentence", "constant", "value"),
    [
        ("data.md", "has 3 s to accept a connection", access.CONNECT_SECONDS, 3),
        ("data.md", "20 s for each piece of its answer", access.SILENCE_SECONDS, 20),
        ("data.md", "is tried three times", access.TRIES, 3),
        ("data.md", "A store has a minute for a sample's file", access.TOTAL_SECONDS, 60),
        ("data.md", "more than 256 MiB are not read", access.MAX_FILE_BYTES, 256 * MIB),
        ("data.md", "more than 256 MiB are not read", shards.MAX_MEMBER_BYTES, 256 * MIB),
        ("data.md", "when 32 shards in a row fail", stream.MAX_FAILED, 32),
        ("data.md", "cannot be read has taken ten minutes", access.PATIENCE_SECONDS, 600),
        ("run_folder.md", "up to 60 s for the last copy", sync.STOPPED_SECONDS, 60),
        ("run_folder.md", "a finished one half an hour", sync.END_SECONDS, 1800),
        ("scaling.md", "the timeout of 10 minutes", collectives.TIMEOUT, timedelta(minutes=10)),
        ("scaling.md", "wait up to seven days", collectives.WORK_TIMEOUT, timedelta(days=7)),
        ("training.md", "300 steps after the warm-up", symptoms.PATIENCE, 300),
        ("training.md", "it is 1.5 times that", symptoms.RISEN, 1.5),
        ("training.md", "or for 500 steps", overfit.STEPS, 500),
    ],
)
def test_a_page_says_what_the_code_does(page, sentence, constant, value):
    assert sentence in " ".join((DOCS / page).read_text(encoding="utf-8").split())
    assert constant == value
