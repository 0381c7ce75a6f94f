"""Estimates the speed of Qwen2-VL-2B on GPUs, which were not measured, from what is counted and from published limits.

Prints what bounds a picture: arithmetic of prefill, memory of decoding, launching kernels, and the sum of them. The
kernels and reads are those that tests/engines/test_launches.py counts, for a model of as many layers.
"""

import argparse
from dataclasses import dataclass

# Qwen2-VL-2B, in parameters that multiply: language model, its head, vision tower and merger.
LANGUAGE = 28 * (1536 * 1536 * 2 + 1536 * 256 * 2 + 3 * 1536 * 8960)
HEAD = 151_936 * 1536
VISION = 32 * (3 * 1280 * 1280 + 1280 * 1280 + 2 * 1280 * 5120)
MERGER = 5120 * 5120 + 5120 * 1536
KEY_BYTES = 28 * 2 * 2 * 128 * 2
"""Keys and values of one token: layers, keys and values, heads, size, bytes."""
PROMPT = 40
"""Tokens of the prompt beside the picture's."""


@dataclass(frozen=True, slots=True)
class Card:
    """`flops` in bfloat16, `bandwidth` in bytes, both a second; `rows` are decoded at a time."""

    name: str
    flops: float
    bandwidth: float
    rows: int


@dataclass(frozen=True, slots=True)
class Loop:
    """What the loop asks of a card: kernels in a step, milliseconds to launch one, and the host's for a picture."""

    name: str
    kernels: int
    launch_ms: float
    host_ms: float
    occupied: float
    """Share of the rows that are in use, on average."""


CARDS = (
    Card("H100, 256 rows", 798e12, 3.0e12, 256),  # measured elsewhere: matrix products, copies
    Card("H100, 64 rows", 798e12, 3.0e12, 64),
    Card("RTX 5080, 64 rows", 112e12, 0.96e12, 64),  # from the data sheet
)
# Launching takes 20 us in eager mode: 23 ms for a step of 1,156 kernels, as measured with the old script. A kernel in a
# graph takes about 2 us.
BEFORE = Loop("before: 1,156 kernels a step, 169 reads", 1_156, 0.020, 4.5, 0.875)
EAGER = Loop("now, --no-graphs: 667 kernels, 1 read", 667, 0.020, 0.7, 0.875)
GRAPHS = Loop("now, graphs", 667, 0.002, 0.7, 0.875)


def prefill_ms(card: Card, visual: int, *, fused: bool) -> float:
    """Milliseconds for a picture: products at 75 % of the limit, attention at 40 %, passes over memory at 85 %."""
    patches, tokens = 4 * visual, visual + PROMPT
    products = 2 * (VISION * patches + MERGER * visual) + 2 * LANGUAGE * tokens
    attention = 4 * patches**2 * 1280 * 32 + 4 * tokens**2 * 1536 * 28
    arithmetic = products / (0.75 * card.flops) + attention / (0.4 * card.flops)
    return 1e3 * (arithmetic + _passes(visual, fused=fused) / (0.85 * card.bandwidth))


def _passes(visual: int, *, fused: bool) -> float:
    """Bytes that operators between the products read and write: rotation and activation of the tower, norms, sums."""
    row, wide = 4 * visual * 1280 * 2, 4 * visual * 5120 * 2
    rotation, activation = (2 * row * 2, wide * 2) if fused else (2 * row * 25, wide * 7)
    tower = 32 * (rotation + activation + 14 * row)
    hidden, inner = (visual + PROMPT) * 1536 * 2, (visual + PROMPT) * 8960 * 2
    norms, gate = (4 * hidden, 3 * inner) if fused else (36 * hidden, 5 * inner)
    return tower + 28 * (norms + gate + 17.7 * hidden)


def step_ms(card: Card, loop: Loop, tokens: float) -> float:
    """Milliseconds of a step: what takes longer, the card's memory and arithmetic, or launching its kernels."""
    weights = max(
        (LANGUAGE + HEAD) * 2 / (0.8 * card.bandwidth), 2 * (LANGUAGE + HEAD) * card.rows / (0.6 * card.flops)
    )
    keys = card.rows * tokens * KEY_BYTES / (0.8 * card.bandwidth)
    on_card = 1e3 * (weights + keys) + loop.kernels * 0.002
    return max(on_card, loop.kernels * loop.launch_ms)


def rate(card: Card, loop: Loop, visual: int, length: int, *, fused: bool) -> float:
    """Pictures a second."""
    step = step_ms(card, loop, visual + PROMPT + length / 2)
    return 1e3 / (prefill_ms(card, visual, fused=fused) + loop.host_ms + length * step / (card.rows * loop.occupied))


def limit(card: Card, visual: int, length: int) -> float:
    """Pictures a second if all arithmetic and traffic ran at the limits of the card, and launches cost nothing."""
    patches, tokens = 4 * visual, visual + PROMPT
    prefill = 2 * (VISION * patches + MERGER * visual) + 4 * patches**2 * 1280 * 32
    prefill += 2 * LANGUAGE * tokens + 2 * tokens**2 * 1536 * 28
    traffic = (LANGUAGE + HEAD) * 2 + card.rows * tokens * KEY_BYTES
    step = max(traffic / card.bandwidth, 2 * (LANGUAGE + HEAD) * card.rows / card.flops)
    return 1 / (prefill / card.flops + length * step / card.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visual", type=int, default=700, help="visual tokens of a picture (default: 700)")
    parser.add_argument("--length", type=int, default=60, help="tokens of a caption (default: 60)")
    options = parser.parse_args()
    visual, length = options.visual, options.length
    loops = [(loop, False) for loop in (BEFORE, EAGER, GRAPHS)] + [(GRAPHS, True)]
    rates = {
        _name(loop, fused): [rate(card, loop, visual, length, fused=fused) for card in CARDS] for loop, fused in loops
    }
    best = rates[_name(GRAPHS, True)]
    print(f"Estimates, not measurements: {visual} visual tokens, {PROMPT} of the prompt, captions of {length} tokens\n")
    print("| | " + " | ".join(card.name for card in CARDS) + " |\n| --- |" + " ---: |" * len(CARDS))
    for name, values in rates.items():
        _row(f"pictures/s, {name}", values)
    _row("pictures/s, limit of the card", [limit(card, visual, length) for card in CARDS])
    for loop in (BEFORE, EAGER, GRAPHS):
        _row(f"step, ms, {loop.name}", [step_ms(card, loop, visual + PROMPT + length / 2) for card in CARDS])
    for fused in (False, True):
        _row("prefill of a picture, ms" + ", fused" * fused, [prefill_ms(card, visual, fused=fused) for card in CARDS])
    _row("59,962 pictures, minutes, now, graphs, fused", [59_962 / value / 60 for value in best])
    _row("the same on 40 cards, without loading the model", [59_962 / value / 60 / 40 for value in best])


def _name(loop: Loop, fused: bool) -> str:
    return loop.name + ", fused" * fused


def _row(name: str, values: list[float]) -> None:
    print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |")


if __name__ == "__main__":
    main()
