"""Captions static batches with the model's own `generate`: for models and recipes without continuous decoding.

Knows no queue: pictures come from a Source.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from rococap.engines import Completion, Prepared, Source, Streaming, gather
from rococap.engines.decoding import Loaded, Row, free_memory, is_out_of_memory, out_of_memory, share, tell

log = logging.getLogger(__name__)


class StaticDecoder:
    """Decoding in batches of up to `limit` pictures.

    `shrink` returns a smaller version of a picture that alone exceeds the memory, or None if there is none.
    """

    def __init__(self, loaded: Loaded, limit: int, shrink: Callable[[Prepared], Prepared | None]) -> None:
        self.loaded = loaded
        self.limit = limit
        self._shrink = shrink

    def run(self, source: Source) -> Iterator[Completion]:
        """Captions the source's pictures, as specified by Engine.run."""
        while batch := gather(source, self.limit):
            now = time.perf_counter()
            yield from self._caption([Row(picture, now, []) for picture in batch], source)

    def _caption(self, rows: list[Row], source: Source) -> Iterator[Completion]:
        try:
            done = self._generate(rows, source)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            done = None  # handled after the except clause: the error keeps the allocated memory alive
        if done is None:
            yield from self._caption_smaller(rows, source)
        else:
            now = time.perf_counter()
            yield from (row.completion(self.loaded, now) for row in done)

    def _caption_smaller(self, rows: list[Row], source: Source) -> Iterator[Completion]:
        free_memory(self.loaded.device)
        if len(rows) == 1:
            if (smaller := self._shrink(rows[0].picture)) is None:
                yield out_of_memory(rows[0].picture)
            else:
                rows[0].picture = smaller
                yield from self._caption(rows, source)
            return
        half = len(rows) // 2
        if half < self.limit:
            self.limit = half
            log.warning("out of memory with %d pictures at a time: continuing with %d", len(rows), half)
        for part in (rows[:half], rows[half:]):
            yield from self._caption(part, source)

    @torch.inference_mode()
    def _generate(self, rows: Sequence[Row], source: Source) -> list[Row]:
        """Captions the rows, and returns those that were not abandoned."""
        for row in rows:
            row.tokens.clear()
        meter, finite = _Meter(source, rows, self.loaded), _Finite()
        self.loaded.model.generate(
            **self.loaded.batch([row.picture for row in rows]),
            stopping_criteria=StoppingCriteriaList([meter]),
            logits_processor=LogitsProcessorList([finite]),
        )
        for row, is_bad in zip(rows, finite.bad(), strict=True):
            row.is_finite = not is_bad
        return [row for slot, row in enumerate(rows) if slot not in meter.abandoned]


class _Meter(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
    """Called by `generate` after every step: divides its time among the active rows, gives each its token, and stops
    rows that are over or abandoned.
    """

    def __init__(self, source: Source, rows: Sequence[Row], loaded: Loaded) -> None:
        self.source = source
        self.listener = source if isinstance(source, Streaming) else None
        self.rows = rows
        self.loaded = loaded
        self.abandoned: set[int] = set()
        self.active = set(range(len(rows)))
        self.first = True
        self.since = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        newest = input_ids[:, -1].tolist()  # waits for the step to finish on the device
        self._share(time.perf_counter())
        for slot in self.active:
            self.rows[slot].tokens.append(newest[slot])
        if self.listener is not None:
            tell(self.listener, (self.rows[slot] for slot in self.active), self.loaded.ends)
        lost = self.source.step(len(self.active))
        self.abandoned |= {slot for slot in self.active if self.rows[slot].picture.job_id in lost}
        self.active -= self.abandoned | {slot for slot in self.active if self.loaded.is_over(self.rows[slot])}
        done = [slot not in self.active for slot in range(len(self.rows))]
        return torch.tensor(done, device=input_ids.device)

    def _share(self, now: float) -> None:
        share([self.rows[slot] for slot in self.active], now - self.since)
        self.since = now
        if self.first:
            for row in self.rows:
                row.prefill_ms = row.share_ms
            self.first = False


class _Finite(LogitsProcessor):  # type: ignore[misc]  # transformers ships no types
    """Records the rows whose logits overflowed: in half precision they become a row of exclamation marks."""

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~torch.isfinite(scores).all(dim=-1)
        self._bad = bad if self._bad is None else self._bad | bad
        return scores

    def bad(self) -> list[bool]:
        assert self._bad is not None, "generate has not run"
        return [bool(bad) for bad in self._bad.tolist()]
