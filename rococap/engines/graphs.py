"""CUDA graphs of a decoding step: one launch in place of a thousand.

A step of a model of 28 layers launches about a thousand kernels, which takes the CPU longer than the kernels take the
GPU. A graph holds all of them, for one number of rows and one width; the smallest graph that holds a step is replayed.
"""

import logging
from collections.abc import Callable
from itertools import product

import torch

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
N_WIDTHS = 4
"""Attention reads as many tokens as the graph is wide: with four widths, an eighth more than needed on average."""


class Graphs:
    """Graphs of `step(n, width)`, which works on fixed storages and must not read from the device."""

    def __init__(self, step: Callable[[int, int], None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def __bool__(self) -> bool:
        return bool(self._graphs)

    def clear(self) -> None:
        """Forgets all graphs, as is necessary when the storages change."""
        self._graphs.clear()

    def capture(self, limit: int, tokens: int, multiple: int) -> bool:
        """Captures steps of up to `limit` rows and up to `tokens` tokens, in widths that are multiples of `multiple`.

        Runs every step once before, because kernels that are loaded meanwhile would end the capture: no row may be in
        progress. If anything fails there are no graphs, the log says why, and the result is False.
        """
        shapes = sorted(product(rows_up_to(limit), widths_up_to(tokens, multiple)), reverse=True)
        try:
            with torch.cuda.device(self._device):
                for n, width in shapes:
                    self._step(n, width)
                pool = torch.cuda.graph_pool_handle()
                for n, width in shapes:  # the largest first: smaller ones fit into its memory
                    graph = torch.cuda.CUDAGraph()
                    # Threads that prepare pictures allocate pinned memory, which must not end the capture.
                    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                        self._step(n, width)
                    self._graphs[n, width] = graph
        except RuntimeError as error:
            self.clear()
            log.warning("CUDA graphs are off, so that decoding is slower: %s", str(error).partition("\n")[0])
            return False
        log.info("%d CUDA graphs captured", len(self._graphs))
        return True

    def replay(self, n: int, width: int) -> bool:
        """Runs the smallest graph for at least n rows and this width; returns False if there is none."""
        fitting = [shape for shape in self._graphs if shape[0] >= n and shape[1] >= width]
        if fitting:
            self._graphs[min(fitting)].replay()
        return bool(fitting)


def rows_up_to(limit: int) -> list[int]:
    return [n for n in ROWS if n < limit] + [limit]


def widths_up_to(tokens: int, multiple: int) -> list[int]:
    """Up to N_WIDTHS widths in equal steps; the last one is `tokens`, which is such a multiple."""
    n = tokens // multiple
    return sorted({-(-n * part // N_WIDTHS) * multiple for part in range(1, N_WIDTHS + 1)} if n else set())
