"""Decode passes launched as one graph, where everything they need stays in place."""

from __future__ import annotations

from collections.abc import Callable

from atlas.cuda_graph import CudaGraph, GraphUnavailableError
from atlas.device_cache import DeviceCache
from atlas.target import CudaTarget


class DecodeGraph:
    """Runs the same pass again and again: kernel by kernel at first, then as a captured graph.

    A pass is captured when it has run once and all shards are resident for good; until then, and
    where there are no graphs, its kernels are launched one by one.

    Parameters
    ----------
    target, cache
        Where it runs, and what its shards lie in.

    Attributes
    ----------
    reason
        Why passes are not replayed, or "" if they are.
    """

    def __init__(self, target: CudaTarget, cache: DeviceCache) -> None:
        self._target = target
        self._cache = cache
        self._graph: CudaGraph | None = None
        self._has_run = False
        self._hits = 0  # of a pass
        self._is_available = True
        self.reason = "no pass has been captured yet"

    def run(self, work: Callable[[], None]) -> None:
        """Run the pass once.

        Parameters
        ----------
        work
            Launches the pass's kernels, the same ones every time; nothing in it may depend on what
            the host knows of the token.
        """
        if not (self._is_available and self._cache.is_complete):
            self._graph = None
            work()
            return
        if not self._has_run or (self._graph is None and not self._capture(work)):
            work()
            self._has_run = True  # so everything is compiled
            return
        assert self._graph is not None
        self._graph.launch()
        self._cache.count_hits(self._hits)

    def drop(self) -> None:
        """Forget the captured pass: the next one is given something else."""
        self._graph = None
        self._has_run = False

    def _capture(self, work: Callable[[], None]) -> bool:
        hits = self._cache.hits
        try:
            self._graph = CudaGraph(self._target, work)
        except GraphUnavailableError as error:
            self._is_available = False
            self.reason = str(error)
        else:
            self.reason = ""
        # Nothing has run: the uses of shards that were counted on the way are those of one pass.
        self._hits = self._cache.hits - hits
        self._cache.count_hits(-self._hits)
        return self._graph is not None
