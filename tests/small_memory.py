"""`rococap` with the real engine, on a device that has memory for two requests: `python small_memory.py serve …`."""

from engine_steps import memory_for

from rococap import cli
from rococap.engines import Options
from rococap.engines.hf import TransformersEngine
from rococap.recipe import Recipe
from rococap.web import captioner


class SmallMemory(TransformersEngine):
    """The model runs out of memory with more than two rows."""

    def load(self) -> None:
        super().load()
        self._memory = memory_for(self, rows=2)
        self._memory.__enter__()


def load_engine(recipe: Recipe, options: Options) -> SmallMemory:
    return SmallMemory(recipe, options)


if __name__ == "__main__":
    captioner.load_engine = load_engine
    cli.main()
