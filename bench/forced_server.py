"""`rococap` whose captions have forced lengths, for `serve`: that of the nth request is the nth of uneven_lengths."""

import sys

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's

import ways

from rococap import cli
from rococap.engines import Options
from rococap.engines.hf import TransformersEngine
from rococap.recipe import Recipe
from rococap.web import captioner

MEAN, LONGEST = 33, 128
"""Length of the captions in tokens."""
N = 256
LENGTHS = ways.uneven_lengths(N, MEAN, LONGEST)


def load_engine(recipe: Recipe, options: Options) -> TransformersEngine:
    engine = ways.load(recipe, options, LENGTHS)
    engine.load = lambda: None  # type: ignore[method-assign]  # it is loaded
    return engine


if __name__ == "__main__":
    captioner.load_engine = load_engine
    cli.main()
