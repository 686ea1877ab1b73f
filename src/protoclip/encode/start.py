"""What the frozen start of a run, as its teacher, makes of the captions: once for all runs.

Features of one model over the same pairs are in one folder of the cache. Whose features a run
learns from is decided in `teachers.py`.
"""

import socket
from contextlib import ExitStack
from pathlib import Path

from protoclip.config import START
from protoclip.data.loader import Tokenizer
from protoclip.data.pairs import Pairs
from protoclip.distributed.collectives import (
    all_gather_object,
    raise_on_all_ranks,
    rank0_first,
)
from protoclip.encode import store
from protoclip.encode.encoder import PART_ROWS, finish, text_encoder
from protoclip.encode.parts import identity
from protoclip.encode.rows import hashes_of_captions
from protoclip.encode.store import StoredFeatures
from protoclip.files import checksum, locked
from protoclip.models.precision import Autocast
from protoclip.models.protoclip import TowerPair


def captions_key(samples: Pairs) -> str:
    captions, counts = hashes_of_captions(samples)
    return checksum(captions.tobytes() + counts.tobytes())


def embed_start(
    start: TowerPair,
    tokenizer: Tokenizer,
    samples: Pairs,
    *,
    cache: Path,
    of_run: Path,
    autocast: Autocast,
) -> StoredFeatures:
    """Text features of the model that a run starts from, for all its samples.

    They are in a folder in `cache`, by the model and by the samples with their captions. Several
    hosts, which may have a cache each, take the folder `of_run`; so does a run that finds another
    process at work in the first, and it goes on with what it took.

    All ranks call it. What an earlier call left unfinished is finished.

    Args:
        start: The frozen towers, on their device.
        autocast: Makes the context of forward passes.

    Raises:
        ValueError: The folder of the run has features of another model or of other samples.
    """
    device = next(start.parameters()).device
    encoder = text_encoder(start, device, tokenizer, start.encode_text, autocast=autocast)
    settings = {
        "teacher": START,
        **identity(samples, samples.sample_ids(), None),
        "reduced_to": None,
        "weights": encoder.checksum(),
        "modality": "text",
        "part_rows": PART_ROWS["text"],
    }
    is_one_host = len({*all_gather_object(socket.gethostname())}) == 1
    with ExitStack() as stack:
        read = rank0_first(lambda: captions_key(samples))

        def chosen() -> Path:
            if not is_one_host or (of_run / store.FACTS).is_file():
                return of_run
            out = cache / checksum(f"{encoder.key()} {settings['ids']} {read}".encode())
            try:
                if "rows" not in store.read_facts(out):  # reading disturbs nobody
                    stack.enter_context(locked(out))
            except (ValueError, OSError):  # damaged, in use, or not to be written
                return of_run
            return out

        out = rank0_first(chosen)
        # Whatever table has the samples; earlier versions wrote down its name in a run.
        before = rank0_first(lambda: store.read_facts(out)) if out == of_run else {}
        settings |= {"source": before.get("source", START), "captions": read}
        finish(encoder, samples, out, settings, batch_size=256)
    features = raise_on_all_ranks(lambda: store.open_folder(out))
    features.way_out = "delete the folder, and give the command again"
    return features
