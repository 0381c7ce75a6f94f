"""Continuous batching for pictures: a finished caption leaves at once, and the next picture takes its place.

The running rows are always the first n of every buffer: a row that finishes is replaced by the last one. Each row
writes its keys and values at its own length, so there is no padding to trim; a step reads as far as the longest row
reaches. The shapes in a step depend only on the number of rows and on that width, rounded up, so that it can be
compiled. Position ids come from the model itself and grow by one per step in every row: that holds for plain and for
multimodal rotary positions (M-RoPE), whose three parts agree once the text continues after a picture.

Iteration-level scheduling is Orca's (Yu et al., OSDI 2022). Knows no queue: pictures come from a Source.
"""

import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from rococap.engines import Completion, Prepared, Source, Streaming, gather
from rococap.engines.decoding import Loaded, Row, free_memory, out_of_memory, share, tell

log = logging.getLogger(__name__)

REFILL = 4
"""Rows are refilled once 1 in REFILL is free: prefilling one picture costs the device almost as much as a few."""
GROUP_TOKENS = 16_384
"""At most how many prompt tokens are prefilled together, which bounds the memory for it."""
WIDTH = 32
"""Steps read, and buffers grow, in multiples of this many tokens."""


def is_known(model: Any) -> bool:
    """Whether the decoder supports this model's cache: keys and values of all tokens in every layer, and no more."""
    layers = DynamicCache(config=model.config).layers
    return (
        bool(layers)
        and all(type(layer) is DynamicLayer for layer in layers)
        and hasattr(model, "_prepare_position_ids_for_generation")
        and "logits_to_keep" in inspect.signature(model.forward).parameters
    )


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types
    """One layer's keys and values of all rows, of shape [rows, heads, tokens, size]; a step reads a corner of them."""

    def __init__(self, slots: "Slots") -> None:
        super().__init__()
        self.slots = slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        n, width = key_states.shape[0], self.slots.width
        place = (self.slots.numbers[:n], slice(None), self.slots.lengths[:n])
        self.keys[place] = key_states[:, :, 0]
        self.values[place] = value_states[:, :, 0]
        return self.keys[:n, :, :width], self.values[:n, :, :width]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("allocated by Slots.reserve")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0

    def get_seq_length(self) -> int:
        return self.slots.width - 1

    def get_max_length(self) -> int:
        return -1


class Slots(Cache):  # type: ignore[misc]
    """The running rows on the device: keys and values, lengths, positions and latest tokens, by slot.

    `lengths` counts the tokens whose keys are stored, which do not yet include the latest token of a row.
    """

    def __init__(self, n_layers: int, device: torch.device) -> None:
        super().__init__(layers=[_Layer(self) for _ in range(n_layers)])
        self.device = device
        self.width = 0
        self.clear()

    def clear(self) -> None:
        """Frees the buffers; the next rows allocate them anew."""
        empty = torch.empty(0, dtype=torch.long, device=self.device)
        self.numbers = self.lengths = self.tokens = self.positions = empty
        for layer in self.layers:
            layer.keys = layer.values = None

    def reserve(self, like: Cache, positions: Tensor, rows: int, tokens: int) -> None:
        """Makes room for this many rows and tokens, keeping the content; `like` and `positions` give other sizes."""
        old = self.layers[0].keys
        have = (0, 0) if old is None else (old.shape[0], old.shape[2])
        if rows <= have[0] and tokens <= have[1]:
            return
        rows, tokens = max(rows, have[0]), max(-(-tokens // WIDTH) * WIDTH, have[1])
        self.numbers = torch.arange(rows, device=self.device)
        self.lengths = _grown(self.lengths, (rows,))
        self.tokens = _grown(self.tokens, (rows,))
        self.positions = _grown(self.positions if have[0] else positions[..., :0, 0], (*positions.shape[:-2], rows))
        for layer, source in zip(self.layers, like.layers, strict=True):
            for name in ("keys", "values"):
                model: Tensor = getattr(source, name)
                buffer = getattr(layer, name)
                shape = (rows, model.shape[1], tokens, model.shape[3])
                # One at a time, so that growing needs memory for only one more buffer. In zeros, since NaN stays NaN
                # when it is masked.
                setattr(layer, name, _grown(model[:0] if buffer is None else buffer, shape))

    def put(self, slot: int, source: Cache, row: int, length: int) -> None:
        """Copies a prompt's keys and values, which are at the right end of a left-padded batch."""
        for layer, prefilled in zip(self.layers, source.layers, strict=True):
            layer.keys[slot, :, :length] = prefilled.keys[row, :, -length:]
            layer.values[slot, :, :length] = prefilled.values[row, :, -length:]

    @torch.inference_mode()
    def move(self, source: Sequence[int], target: Sequence[int], tokens: int) -> None:
        """Moves rows of up to `tokens` tokens to other slots, whose content is lost."""
        if not source:
            return
        old, new = (torch.tensor(slots, device=self.device) for slots in (source, target))
        for layer in self.layers:
            layer.keys[new, :, :tokens] = layer.keys[old, :, :tokens]
            layer.values[new, :, :tokens] = layer.values[old, :, :tokens]
        self.lengths[new], self.tokens[new] = self.lengths[old], self.tokens[old]
        self.positions[..., new] = self.positions[..., old]


def _grown(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Copies a tensor into the corner of a larger one of zeros."""
    larger = tensor.new_zeros(shape)
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger


class ContinuousDecoder:
    """Greedy decoding of up to `limit` rows at a time.

    `shrink` returns a smaller version of a picture that alone exceeds the memory, or None if there is none.
    """

    def __init__(self, loaded: Loaded, limit: int, shrink: Callable[[Prepared], Prepared | None]) -> None:
        self.loaded = loaded
        self.limit = limit
        self._shrink = shrink
        self._slots = Slots(len(DynamicCache(config=loaded.model.config).layers), loaded.device)
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()
        self._listener: Streaming | None = None

    def run(self, source: Source) -> Iterator[Completion]:
        """Captions the source's pictures, as specified by Engine.run."""
        self._listener = source if isinstance(source, Streaming) else None
        while self._take(source):
            group = self._next_group()
            started = time.perf_counter()
            try:
                bad = self._prefill(group) if group else self._step()
            except torch.OutOfMemoryError:
                bad = None  # handled after the except clause: the error keeps the allocated memory alive
            if bad is None:
                yield from self._retreat(group)
            else:
                yield from self._charge(len(group) or len(self._rows), bad, started)
            lost = source.step(0 if group else len(self._rows))
            self._remove({slot for slot, row in enumerate(self._rows) if row.picture.job_id in lost})

    def probe(self, picture: Prepared, n: int, n_read: int) -> tuple[float, int]:
        """Measures the seconds of a step with n rows, and the bytes of a row's cache.

        First prefills `n_read` copies of the picture together. Raises torch.OutOfMemoryError. Leaves no rows behind.
        """
        limit, self.limit = self.limit, n
        try:
            self._prefill([Row(picture, 0.0, []) for _ in range(n_read)])
            self._slots.move([0] * (n - 1), range(1, n), tokens=picture.n_tokens)
            self._rows = [Row(picture, 0.0, [0]) for _ in range(n)]
            seconds = min(self._timed_step() for _ in range(3))
            return seconds, sum(layer.keys.nbytes + layer.values.nbytes for layer in self._slots.layers) // n
        finally:
            self.limit, self._rows = limit, []
            self._slots.clear()

    def _timed_step(self) -> float:
        started = time.perf_counter()
        self._step().tolist()  # waits for the device
        return time.perf_counter() - started

    # --- rows come ---

    def _take(self, source: Source) -> bool:
        """Takes pictures from the source, waiting only if none are in progress. Returns whether there is any work."""
        held = len(self._rows) + len(self._waiting)
        free = self.limit - held
        taken: list[Prepared] = []
        if not held:
            taken = gather(source, max(1, self.limit // REFILL))
        elif free >= max(1, self.limit // REFILL):
            taken = source.take(free, 0)
        now = time.perf_counter()
        self._waiting.extend(Row(picture, now, []) for picture in taken)
        return bool(held or taken)

    def _next_group(self) -> list[Row]:
        """The waiting rows that are prefilled together next."""
        group: list[Row] = []
        longest = 0
        while self._waiting:
            row = self._waiting[0]
            longest = max(longest, row.picture.n_tokens)
            if len(self._rows) + len(group) == self.limit or (group and (len(group) + 1) * longest > GROUP_TOKENS):
                break
            group.append(self._waiting.popleft())
        return group

    @torch.inference_mode()
    def _prefill(self, group: Sequence[Row]) -> Tensor:
        """Reads pictures and prompts, and gives each row a slot and its first token. Returns which are not finite."""
        model, slots = self.loaded.model, self._slots
        inputs = self.loaded.batch([row.picture for row in group])
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
        cache = DynamicCache(config=model.config)
        logits = model(
            **inputs, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        n, more = len(self._rows), len(group)
        longest = max(row.picture.n_tokens for row in group)
        slots.reserve(cache, positions, self.limit, longest + self.loaded.max_new_tokens)
        for index, row in enumerate(group):
            slots.put(n + index, cache, index, row.picture.n_tokens)
        slots.lengths[n : n + more] = torch.tensor([row.picture.n_tokens for row in group], device=slots.device)
        slots.positions[..., n : n + more] = positions[..., -1] + 1
        slots.tokens[n : n + more] = logits.argmax(-1)
        self._rows += group
        return ~torch.isfinite(logits).all(-1)

    # --- rows continue ---

    @torch.inference_mode()
    def _step(self) -> Tensor:
        """Decodes the next token of every row. Returns which rows' logits are not finite."""
        slots, n = self._slots, len(self._rows)
        slots.width = -(-max(_length(row) + 1 for row in self._rows) // WIDTH) * WIDTH
        lengths, tokens, positions = slots.lengths[:n], slots.tokens[:n], slots.positions[..., :n]
        model = self.loaded.model
        beyond = torch.arange(slots.width, device=slots.device) > lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=model.dtype, device=slots.device).masked_fill_(beyond, -torch.inf)
        logits = model(
            input_ids=tokens[:, None],
            position_ids=positions[..., None],
            attention_mask=mask[:, None, None, :],
            past_key_values=slots,
            use_cache=True,
        ).logits[:, -1]
        lengths += 1
        positions += 1
        tokens.copy_(logits.argmax(-1))
        return ~torch.isfinite(logits).all(-1)

    def _charge(self, n_active: int, bad: Tensor, started: float) -> Iterator[Completion]:
        """Charges a step to the last `n_active` rows, which took part in it, and yields those that it finished."""
        first = len(self._rows) - n_active
        active = self._rows[first:]
        tokens = self._slots.tokens[first : len(self._rows)].tolist()  # waits for the device
        now = time.perf_counter()
        share(active, now - started)
        finished = set()
        for slot, (row, token, is_bad) in enumerate(zip(active, tokens, bad.tolist(), strict=True), first):
            row.prefill_ms = row.prefill_ms or row.share_ms
            row.tokens.append(token)
            row.is_finite = not is_bad
            if self.loaded.is_over(row):
                finished.add(slot)
        if self._listener is not None:
            tell(self._listener, active, self.loaded.ends)
        done = [self._rows[slot] for slot in sorted(finished)]
        self._remove(finished)
        for row in done:
            yield row.completion(self.loaded, now)

    # --- rows leave ---

    def _remove(self, slots: Set[int]) -> None:
        """Removes rows, and moves the last ones into their slots."""
        n_left = len(self._rows) - len(slots)
        holes = [slot for slot in range(n_left) if slot in slots]
        last = [slot for slot in range(n_left, len(self._rows)) if slot not in slots]
        self._slots.move(last, holes, tokens=max((_length(self._rows[slot]) for slot in last), default=0))
        for source, target in zip(last, holes, strict=True):
            self._rows[target] = self._rows[source]
        del self._rows[n_left:]

    def _retreat(self, group: Sequence[Row]) -> Iterator[Completion]:
        """Restarts all rows, half as many at a time, after running out of memory. A single one shrinks, or fails."""
        rows = [*self._rows, *group]
        for row in rows:
            row.tokens.clear()
        self._waiting.extendleft(reversed(rows))
        self._rows = []
        self._slots.clear()
        free_memory(self.loaded.device)
        if len(rows) > 1:
            self.limit = len(rows) // 2
            log.warning("out of memory with %d pictures at a time: continuing with %d", len(rows), self.limit)
            return
        row = self._waiting.popleft()
        smaller = self._shrink(row.picture)
        if smaller is None:
            yield out_of_memory(row.picture)
        else:
            row.picture = smaller
            self._waiting.appendleft(row)


def _length(row: Row) -> int:
    """The number of a row's tokens whose keys are stored: all but the latest."""
    return row.picture.n_tokens + len(row.tokens) - 1
