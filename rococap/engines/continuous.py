"""Continuous batching for pictures: a finished caption leaves at once, and the next picture takes its place.

The running rows are always the first n of every buffer: whoever finishes is replaced by the last. Each row writes its
keys and values at its own length, so there is no padding to trim; a step reads as far as the longest row reaches. Its
shapes depend on the number of rows and on that width in buckets alone, so that a compiler can take it. Position ids
come from the model itself and grow by one a step in every row: that holds for plain and for multimodal rotary
positions (M-RoPE), whose three parts agree once the text goes on after a picture.

Scheduling by iteration is Orca's (Yu et al., OSDI 2022).
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

from rococap.engines import Completion, Prepared, Source, gather
from rococap.engines.decoding import Loaded, Row, free_memory, out_of_memory, share

log = logging.getLogger(__name__)

REFILL = 4
"""Rows are filled up once one in so many is free: a picture alone costs the device almost as much as a few."""
GROUP_TOKENS = 16_384
"""Most prompt tokens that are read in together: what bounds the memory of it."""
WIDTH = 32
"""Steps read and buffers grow in multiples of this many tokens."""


def is_known(model: Any) -> bool:
    """Whether the loop knows this model's cache: keys and values of all tokens in every layer, and nothing else."""
    layers = DynamicCache(config=model.config).layers
    return (
        bool(layers)
        and all(type(layer) is DynamicLayer for layer in layers)
        and hasattr(model, "_prepare_position_ids_for_generation")
        and "logits_to_keep" in inspect.signature(model.forward).parameters
    )


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types
    """One layer's keys and values of all rows: [rows, heads, tokens, size], of which a step reads a corner."""

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
    """The running rows on the device: keys and values, lengths, positions and latest tokens, each in its slot.

    `lengths` counts the tokens whose keys are stored; the latest token of a row is not among them yet.
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
        """Makes room for so many rows of so many tokens, keeping what is there."""
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
                # One at a time, so that growing needs room for one more buffer only. Zeros: a masked NaN is still one.
                setattr(layer, name, _grown(model[:0] if buffer is None else buffer, shape))

    def put(self, slot: int, source: Cache, row: int, length: int) -> None:
        """Copies a prompt's keys and values, which end at the right of a padded batch."""
        for layer, prefilled in zip(self.layers, source.layers, strict=True):
            layer.keys[slot, :, :length] = prefilled.keys[row, :, -length:]
            layer.values[slot, :, :length] = prefilled.values[row, :, -length:]

    @torch.inference_mode()
    def move(self, source: Sequence[int], target: Sequence[int], tokens: int) -> None:
        """Rows of up to so many tokens change their slots; what was there is lost."""
        if not source:
            return
        old, new = (torch.tensor(slots, device=self.device) for slots in (source, target))
        for layer in self.layers:
            layer.keys[new, :, :tokens] = layer.keys[old, :, :tokens]
            layer.values[new, :, :tokens] = layer.values[old, :, :tokens]
        self.lengths[new], self.tokens[new] = self.lengths[old], self.tokens[old]
        self.positions[..., new] = self.positions[..., old]


def _grown(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A larger tensor of zeros with this one in its corner."""
    larger = tensor.new_zeros(shape)
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger


class ContinuousDecoder:
    """Greedy decoding of up to `limit` rows. `shrink` makes a picture smaller that is too large alone, or cannot."""

    def __init__(self, loaded: Loaded, limit: int, shrink: Callable[[Prepared], Prepared | None]) -> None:
        self.loaded = loaded
        self.limit = limit
        self._shrink = shrink
        self._slots = Slots(len(DynamicCache(config=loaded.model.config).layers), loaded.device)
        self._rows: list[Row] = []
        self._waiting: deque[Row] = deque()

    def run(self, source: Source) -> Iterator[Completion]:
        while self._take(source):
            group = self._next_group()
            started = time.perf_counter()
            try:
                bad = self._prefill(group) if group else self._step()
            except torch.OutOfMemoryError:
                bad = None  # handled below: the error holds on to what was allocated
            if bad is None:
                yield from self._retreat(group)
            else:
                yield from self._book(len(group) or len(self._rows), bad, started)
            lost = source.step(0 if group else len(self._rows))
            self._remove({slot for slot, row in enumerate(self._rows) if row.picture.job_id in lost})

    def probe(self, picture: Prepared, n: int, n_read: int) -> tuple[float, int]:
        """Seconds of a step with n rows, after reading `n_read` copies of a picture, and bytes of a row's cache.

        Raises torch.OutOfMemoryError. Leaves the decoder as it was.
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
        """Whether there is something to do: waits for it only if nothing runs."""
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
        """Waiting rows that are read in together."""
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
        """Reads pictures and prompts, and gives each row a slot and its first token."""
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
        for row, one in enumerate(group):
            slots.put(n + row, cache, row, one.picture.n_tokens)
        slots.lengths[n : n + more] = torch.tensor([row.picture.n_tokens for row in group], device=slots.device)
        slots.positions[..., n : n + more] = positions[..., -1] + 1
        slots.tokens[n : n + more] = logits.argmax(-1)
        self._rows += group
        return ~torch.isfinite(logits).all(-1)

    # --- rows go on ---

    @torch.inference_mode()
    def _step(self) -> Tensor:
        """The next token of every row."""
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

    def _book(self, n_active: int, bad: Tensor, started: float) -> Iterator[Completion]:
        """Books the step on the last `n_active` rows, which were in it, and yields those that it finished."""
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
        done = [self._rows[slot] for slot in sorted(finished)]
        self._remove(finished)
        for row in done:
            yield row.completion(self.loaded, now)

    # --- rows go ---

    def _remove(self, slots: Set[int]) -> None:
        """The last rows take the places of those that leave."""
        n_left = len(self._rows) - len(slots)
        holes = [slot for slot in range(n_left) if slot in slots]
        last = [slot for slot in range(n_left, len(self._rows)) if slot not in slots]
        self._slots.move(last, holes, tokens=max((_length(self._rows[slot]) for slot in last), default=0))
        for source, target in zip(last, holes, strict=True):
            self._rows[target] = self._rows[source]
        del self._rows[n_left:]

    def _retreat(self, group: Sequence[Row]) -> Iterator[Completion]:
        """Out of memory: all begin again, half as many at a time. A picture alone becomes smaller, or fails."""
        rows = [*self._rows, *group]
        for row in rows:
            row.tokens.clear()
        self._waiting.extendleft(reversed(rows))
        self._rows = []
        self._slots.clear()
        free_memory(self.loaded.device)
        if len(rows) > 1:
            self.limit = len(rows) // 2
            log.warning("out of memory with %d pictures at a time: going on with %d", len(rows), self.limit)
            return
        row = self._waiting.popleft()
        smaller = self._shrink(row.picture)
        if smaller is None:
            yield out_of_memory(row.picture)
        else:
            row.picture = smaller
            self._waiting.appendleft(row)


def _length(row: Row) -> int:
    """How many of a row's tokens have keys: all but the latest."""
    return row.picture.n_tokens + len(row.tokens) - 1
