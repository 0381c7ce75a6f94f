"""Continuous batching for pictures: a finished caption leaves at once, and the next picture takes its place.

Every row keeps one slot of every buffer until it finishes. It writes its keys and values at its own length, so there is
no padding to trim; a step reads as far as the longest row reaches. A step works on the same storages every time, and
its shapes depend only on the number of slots and on that width, rounded up, so that it can be captured as a CUDA graph;
its only result is read once. Position ids come from the model itself and grow by one per step in every row: that holds
for plain and for multimodal rotary positions (M-RoPE), whose three parts agree once the text continues after a picture.

Iteration-level scheduling is Orca's (Yu et al., OSDI 2022). Knows no queue: pictures come from a Source.
"""

import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from rococap.engines import Completion, Prepared, Source, Streaming, decoding, gather
from rococap.engines.decoding import Loaded, Row, free_memory, is_out_of_memory, out_of_memory, share, tell
from rococap.engines.graphs import Graphs
from rococap.engines.precompute import GRID, join, keeps_grid

log = logging.getLogger(__name__)

REFILL = 4
"""Rows are refilled once 1 in REFILL is free: prefilling one picture costs the device almost as much as a few."""
GROUP_TOKENS = 16_384
"""At most how many prompt tokens are prefilled together, which bounds the memory for it."""
WIDTH = 32
"""Steps read, and buffers grow, in multiples of this many tokens."""
SPARSE = 0.9
"""If fewer than this share of the first slots are in use, a step copies the keys and values of just these: at the end,
when no more pictures come."""
NOT_FINITE = -1
"""In place of a token, if the logits were not finite."""


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
    """One layer's keys and values of all slots, of shape [slots, heads, tokens, size]; a step reads a part of them."""

    def __init__(self, slots: "Slots") -> None:
        super().__init__()
        self.slots = slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        slots = self.slots
        place = (slots.chosen, slice(None), slots.ends)
        self.keys[place] = key_states[:, :, 0]
        self.values[place] = value_states[:, :, 0]
        return slots.part_of(self.keys[:, :, : slots.width]), slots.part_of(self.values[:, :, : slots.width])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("allocated by Slots.reserve")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0

    def get_seq_length(self) -> int:
        return self.slots.width - 1

    def get_max_length(self) -> int:
        return -1


class Slots(Cache):  # type: ignore[misc]
    """The rows on the device, by slot: keys and values, lengths, positions and latest tokens.

    `lengths` counts the tokens whose keys are stored, which do not yet include the latest token of a row. A free slot
    has length 0 and `active` 0, so that a step writes into its first place and never beyond. `said` is what the last
    step returned for each slot: a token, or NOT_FINITE.
    """

    def __init__(self, n_layers: int, device: torch.device) -> None:
        super().__init__(layers=[_Layer(self) for _ in range(n_layers)])
        self.device = device
        self.width = 0
        self.prefix: int | None = 0
        self.clear()

    def clear(self) -> None:
        """Frees the buffers; the next rows allocate them anew."""
        empty = torch.empty(0, dtype=torch.long, device=self.device)
        self.numbers = self.columns = self.lengths = self.active = self.tokens = self.said = self.positions = empty
        self.chosen = self.ends = empty
        for layer in self.layers:
            layer.keys = layer.values = None

    @property
    def size(self) -> tuple[int, int]:
        """Slots, and tokens in each, for which all buffers have room."""
        last = self.layers[-1].values  # grown last
        return (0, 0) if last is None else (last.shape[0], last.shape[2])

    def reserve(self, like: Cache, positions: Tensor, rows: int, tokens: int) -> bool:
        """Makes room for this many rows and tokens, keeping the content; `like` and `positions` give other sizes.

        Returns whether that took other storages. If it runs out of memory, it may be called again.
        """
        have = self.size
        if rows <= have[0] and tokens <= have[1]:
            return False
        rows, tokens = max(rows, have[0]), max(-(-tokens // WIDTH) * WIDTH, have[1])
        self.numbers = torch.arange(rows, device=self.device)
        self.columns = torch.arange(tokens, device=self.device)
        for name in ("lengths", "active", "tokens", "said"):
            setattr(self, name, _grown(getattr(self, name), (rows,)))
        self.positions = _grown(
            self.positions if have[0] else self.positions.new_zeros((*positions.shape[:-2], 0)),
            (*positions.shape[:-2], rows),
        )
        for layer, source in zip(self.layers, like.layers, strict=True):
            for name in ("keys", "values"):
                model: Tensor = getattr(source, name)
                buffer = getattr(layer, name)
                shape = (rows, model.shape[1], tokens, model.shape[3])
                # One at a time, so that growing needs memory for only one more buffer. In zeros, since NaN stays NaN
                # when it is masked.
                setattr(layer, name, _grown(model[:0] if buffer is None else buffer, shape))
        return True

    @torch.inference_mode()
    def put(self, slots: Sequence[int], source: Cache, lengths: Sequence[int], positions: Tensor) -> None:
        """Copies prompts, which are at the right end of a left-padded batch, into free slots.

        `positions` are those of the next token, of shape [..., rows].
        """
        for layer, prefilled in zip(self.layers, source.layers, strict=True):
            for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
                layer.keys[slot, :, :length] = prefilled.keys[row, :, -length:]
                layer.values[slot, :, :length] = prefilled.values[row, :, -length:]
        at = self.upload(slots)
        self.lengths[at] = self.upload(lengths)
        self.positions[..., at] = positions
        self.active[at] = 1

    @torch.inference_mode()
    def free(self, slots: Iterable[int]) -> None:
        """Marks slots as free."""
        at = self.upload(list(slots))
        self.lengths[at] = 0
        self.active[at] = 0

    def choose(self, slots: int | Tensor, width: int) -> None:
        """Says which slots the next step includes, the first ones or those with these numbers, and how far it reads."""
        self.width = width
        self.prefix = slots if isinstance(slots, int) else None
        self.chosen = self.numbers[:slots] if isinstance(slots, int) else slots
        self.ends = self.part_of(self.lengths)

    def part_of(self, buffer: Tensor, dim: int = 0) -> Tensor:
        """The chosen slots of a buffer: a view of the first ones, or a copy of others."""
        if self.prefix is None:
            return buffer.index_select(dim, self.chosen)
        return buffer.narrow(dim, 0, self.prefix)

    def upload(self, values: Sequence[int]) -> Tensor:
        return decoding.upload(torch.tensor(values), self.device)


def _grown(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Copies a tensor into the corner of a larger one of zeros."""
    if tensor.shape == shape:
        return tensor
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
        self._graphs = Graphs(self._decode, loaded.device)
        self._uses_graphs = False
        self._longest = 0
        """For how many prompt tokens the buffers have room at least."""
        self._reserving = False
        self._on_host = {"attention_mask"} | ({GRID} if keeps_grid(loaded.model) else set())
        self._rows: dict[int, Row] = {}
        self._waiting: deque[Row] = deque()
        self._group_limit = GROUP_TOKENS
        """How many pictures are read together at most; lowered when the device runs out of memory."""
        self._listener: Streaming | None = None
        self._yields_to_launches = loaded.device.type == "cuda"
        self.may_prepare = threading.Event()
        """Cleared while a GPU is given a prompt to read. Threads that prepare pictures meanwhile would compete for
        Python's lock at each of its 6,700 operators, and the GPU would wait."""
        self.may_prepare.set()

    def run(self, source: Source) -> Iterator[Completion]:
        """Captions the source's pictures, as specified by Engine.run."""
        self._listener = source if isinstance(source, Streaming) else None
        while self._take(source):
            group = self._next_group()
            started = time.perf_counter()
            try:
                advanced = self._prefill(group) if group else self._step()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                advanced = None  # handled after the except clause: the error keeps the allocated memory alive
            if advanced is None:
                yield from self._retreat(group)
            else:
                yield from self._charge(advanced, started)
            lost = source.step(0 if group else len(self._rows))
            self._remove([slot for slot, row in self._rows.items() if row.picture.job_id in lost])

    @torch.inference_mode()
    def probe(self, picture: Prepared, n: int, n_read: int) -> tuple[float, int]:
        """Measures the seconds of a step with n rows, and the bytes of a row's cache.

        First prefills `n_read` copies of the picture together. Raises torch.OutOfMemoryError. Leaves no rows behind.
        """
        limit, self.limit = self.limit, n
        try:
            self._prefill([Row(picture, 0.0, []) for _ in range(n_read)])
            self._rows = {slot: Row(picture, 0.0, [0]) for slot in range(n)}
            self._slots.lengths.fill_(picture.n_tokens)
            seconds = min(self._timed_step() for _ in range(3))
            return seconds, sum(layer.keys.nbytes + layer.values.nbytes for layer in self._slots.layers) // n
        finally:
            self.limit = limit
            self._clear()

    def _timed_step(self) -> float:
        started = time.perf_counter()
        self._step()
        self._slots.said.tolist()  # waits for the device
        return time.perf_counter() - started

    def use_graphs(self, picture: Prepared) -> None:
        """Replays steps from CUDA graphs from now on, with buffers for rows as long as this picture's.

        If there is no memory for so many rows, graphs are captured once fewer of them run.
        """
        self._uses_graphs, self._longest = True, picture.n_tokens
        try:
            self._prefill([Row(picture, 0.0, [])])
            self._remove([0])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._clear()

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
        most = min(self._group_limit, self.limit - len(self._rows))
        while self._waiting and len(group) < most:
            longest = max(longest, self._waiting[0].picture.n_tokens)
            if group and (len(group) + 1) * longest > GROUP_TOKENS:
                break
            group.append(self._waiting.popleft())
        return group

    def _prefill(self, group: Sequence[Row]) -> list[int]:
        """Reads pictures and prompts, and gives each row a slot and its first token. Returns the slots."""
        if self._yields_to_launches:
            self.may_prepare.clear()
        try:
            return self._place(group)
        finally:
            self.may_prepare.set()

    @torch.inference_mode()
    def _place(self, group: Sequence[Row]) -> list[int]:
        cache, logits, positions = self._read([row.picture for row in group])
        lengths = [row.picture.n_tokens for row in group]
        slots = self._slots
        self._reserving = True
        tokens = max(self._longest, *lengths) + self.loaded.max_new_tokens
        if slots.reserve(cache, positions, self.limit, tokens):
            self._graphs.clear()
        self._reserving = False
        if self._uses_graphs and not self._graphs and not self._rows:
            self._uses_graphs = self._graphs.capture(*slots.size, WIDTH)
        free = [slot for slot in range(slots.size[0]) if slot not in self._rows][: len(group)]
        slots.put(free, cache, lengths, self.loaded.upload(positions[..., -1] + 1))
        self._say(slots.upload(free), logits)
        self._rows |= dict(zip(free, group, strict=True))
        return free

    def _read(self, pictures: Sequence[Prepared]) -> tuple[Cache, Tensor, Tensor]:
        """Returns the keys and values of a batch of prompts, the logits of the first tokens, and the position ids."""
        model = self.loaded.model
        precomputed = join([picture.inputs.precomputed for picture in pictures])
        cache = DynamicCache(config=model.config)
        inputs = self.loaded.batch(pictures, self._on_host)
        del inputs["attention_mask"]
        output = model(
            **inputs,
            attention_mask=self._causal_mask([picture.n_tokens for picture in pictures]),
            **{name: self.loaded.upload(tensor) for name, tensor in precomputed.tower.items()},
            position_ids=self.loaded.upload(precomputed.positions),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache, output.logits[:, -1], precomputed.positions

    def _causal_mask(self, lengths: Sequence[int]) -> Tensor | None:
        """Which tokens of a left-padded batch see which, of shape [rows, 1, tokens, tokens]; None without padding.

        Given the lengths alone, the model would read from the device whether there is any padding.
        """
        longest = max(lengths)
        if min(lengths) == longest:
            return None
        places = torch.arange(longest, device=self.loaded.device)
        starts = self._slots.upload([longest - length for length in lengths])
        return (places <= places[:, None]) & (places >= starts[:, None, None, None])

    # --- rows continue ---

    def _step(self) -> list[int]:
        """Decodes the next token of every row. Returns their slots."""
        slots = sorted(self._rows)
        n = slots[-1] + 1
        width = -(-max(_length(row) + 1 for row in self._rows.values()) // WIDTH) * WIDTH
        if not self._graphs.replay(n, width):
            self._decode(n if len(slots) >= SPARSE * n else self._slots.upload(slots), width)
        return slots

    @torch.inference_mode()
    def _decode(self, which: int | Tensor, width: int) -> None:
        """Decodes the next token of the first n slots, or of those with these numbers.

        Reads nothing from the device. `width` is at least the length of the longest row with its new token.
        """
        slots, model = self._slots, self.loaded.model
        slots.choose(which, width)
        beyond = slots.columns[:width] > slots.ends[:, None]
        mask = torch.zeros(beyond.shape, dtype=model.dtype, device=slots.device).masked_fill_(beyond, -torch.inf)
        logits = model(
            input_ids=slots.part_of(slots.tokens)[:, None],
            position_ids=slots.part_of(slots.positions, -1)[..., None],
            attention_mask=mask[:, None, None, :],
            past_key_values=slots,
            use_cache=True,
        ).logits[:, -1]
        grown = slots.part_of(slots.active)
        slots.lengths.index_add_(0, slots.chosen, grown)
        slots.positions.index_add_(-1, slots.chosen, grown.expand(*slots.positions.shape[:-1], -1))
        self._say(slots.chosen, logits)

    def _say(self, at: Tensor, logits: Tensor) -> None:
        """Chooses the next tokens of the slots with these numbers."""
        values, tokens = logits.max(-1)  # NaN and infinity are the maximum of any row that contains them
        self._slots.tokens.index_copy_(0, at, tokens)
        self._slots.said.index_copy_(0, at, tokens.where(torch.isfinite(values), NOT_FINITE))

    def _charge(self, slots: Sequence[int], started: float) -> Iterator[Completion]:
        """Charges a step to the rows that took part in it, by slot, and yields those that it finished."""
        said = self._slots.said[: max(slots) + 1].tolist()  # waits for the device
        now = time.perf_counter()
        share([self._rows[slot] for slot in slots], now - started)
        finished = []
        for slot in slots:
            row = self._rows[slot]
            row.prefill_ms = row.prefill_ms or row.share_ms
            row.tokens.append(said[slot])
            row.is_finite = said[slot] != NOT_FINITE
            if self.loaded.is_over(row):
                finished.append(slot)
        if self._listener is not None:
            tell(self._listener, [self._rows[slot] for slot in slots], self.loaded.ends)
        done = [self._rows[slot] for slot in finished]
        self._remove(finished)
        for row in done:
            yield row.completion(self.loaded, now)

    # --- rows leave ---

    def _remove(self, slots: Sequence[int]) -> None:
        if slots:
            for slot in slots:
                del self._rows[slot]
            self._slots.free(slots)

    def _clear(self) -> None:
        """Forgets all rows, and frees the buffers."""
        self._rows = {}
        self._reserving = False
        self._graphs.clear()
        self._slots.clear()

    def _retreat(self, group: Sequence[Row]) -> Iterator[Completion]:
        """Continues with less after running out of memory: first it reads half as many pictures at a time.

        When it cannot even read one beside the rows in progress, or has no memory for the buffers of so many rows, it
        restarts all of them, half as many at a time. A single one shrinks, or fails.
        """
        if len(group) > 1 and not self._reserving:
            self._waiting.extendleft(reversed(group))
            self._group_limit = len(group) // 2
            free_memory(self.loaded.device)
            log.warning("out of memory reading %d pictures at a time: continuing with %d", len(group), len(group) // 2)
            return
        rows = [*(self._rows[slot] for slot in sorted(self._rows)), *group]
        n = self.limit if self._reserving else len(rows)
        for row in rows:
            row.tokens.clear()
        self._waiting.extendleft(reversed(rows))
        self._clear()
        free_memory(self.loaded.device)
        if n > 1:
            self.limit = n // 2
            log.warning("out of memory with %d pictures at a time: continuing with %d", n, self.limit)
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
