"""K-means of rows that are known before they are needed, in a thread beside training."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from protoclip.clustering import KMeans


def one_core() -> None:
    """Give this thread's operations one core."""
    torch.get_num_threads()  # the first look at it in a thread would undo what was set before
    torch.set_num_threads(1)


def same(expected: Tensor | None, rows: Tensor) -> bool:
    """Whether these are the rows that were expected."""
    return expected is not None and expected.shape == rows.shape and torch.equal(expected, rows)


class Ahead:
    """Clusters what is expected while something else runs; who asks for it then waits less.

    What is asked for and was not expected, or not with these rows, is clustered then, to the same
    bits. On a CPU the thread has one core, so that it does not hold up those that train; on a GPU
    it has a stream of its own.

    Args:
        cluster: K-means of one space, `(space, rows) -> KMeans`.
        device: Where rows are clustered.
    """

    def __init__(self, cluster: Callable[[str, Tensor], KMeans], device: torch.device) -> None:
        self.cluster = cluster
        self.device = device
        self.stream = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if device.type == "cuda"
            else None
        )
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="clustering")
        self.expected: dict[str, Future[tuple[Tensor, KMeans]]] = {}
        # It also sets what threads that come later start with, so this one's is set again.
        threads = torch.get_num_threads()
        self.pool.submit(one_core).result()
        torch.set_num_threads(threads)

    def expect(self, space: str, rows: Callable[[], Tensor]) -> None:
        """Begin to cluster the rows of a space; they are made in the thread too."""
        self.expected[space] = self.pool.submit(self._run, space, rows)

    def __call__(self, space: str, rows: Tensor) -> KMeans:
        """K-means of these rows, from the thread if it was given the same ones."""
        waiting = self.expected.pop(space, None)
        expected, result = waiting.result() if waiting is not None else (None, None)
        if result is None or not same(expected, rows):
            if self.stream is not None:  # the rows may still be in the making
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
            _, result = self.pool.submit(self._run, space, lambda: rows).result()
        if self.stream is not None:
            # Else its memory could be given away while this stream still reads it.
            current = torch.cuda.current_stream(self.device)
            result.centroids.record_stream(current)
            result.assignments.record_stream(current)
        return result

    def _run(self, space: str, rows: Callable[[], Tensor]) -> tuple[Tensor, KMeans]:
        if self.stream is None:
            found = rows()
            return found, self.cluster(space, found)
        with torch.cuda.stream(self.stream):
            found = rows()
            result = self.cluster(space, found)
        self.stream.synchronize()
        return found, result
