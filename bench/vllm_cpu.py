"""Measures rococap's transformers engine against vLLM on the CPU, with the same weights, pictures and caption lengths.

Each runs in a process and virtual environment of its own, loads its model once, prepares its pictures beforehand, and
is idle during the turns of the other:

    make test-vllm                                                   creates .venv-vllm
    .venv-vllm/bin/python bench/vllm_cpu.py --python .venv/bin/python
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import small_models
import ways
from report import Line, alternate, ratio_line, show

from rococap.demo import MODEL
from rococap.demo.phantoms import write_dataset
from rococap.engines import Engine, Options, Request
from rococap.engines.vllm import VLLMEngine
from rococap.recipe import Recipe
from rococap.worker.dry_run import from_memory

MEAN, LONGEST = 33, 128
"""Length of the forced captions in tokens, distributed as in ROCOv2."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    model: str
    dtype: str
    n: int
    is_forced: bool


def main() -> None:
    options = _options()
    if options.write_105m:
        small_models.write_105m(options.write_105m)
    elif options.engine:
        _take_turns(options)
    else:
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    lines: list[Line] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench_vllm_") as folder:
        large = Path(folder) / "model_105m"
        # Written with the newer transformers: the older version can read its models, but not the other way round.
        subprocess.run([options.python, __file__, "--write-105m", large], check=True)
        small, more = options.pictures, options.large_pictures
        cases = [
            Case("demo, its own captions", str(MODEL), "float32", small, False),
            Case("demo, uneven lengths", str(MODEL), "float32", small, True),
            Case("105 M float32, uneven lengths", str(large), "float32", more, True),
            Case("105 M bfloat16, uneven lengths", str(large), "bfloat16", more, True),
        ]
        for case in (case for case in cases if options.only in case.name):
            root = Path(folder) / f"phantoms_{case.n}"
            if not root.exists():
                write_dataset(root, {"train": case.n})
            lines.append(_compared(case, root, options))
            show(lines, f"load {load:.1f} before; {options.rounds} rounds")
    print("Missed: " + ("; ".join(line.what for line in lines if line.missed) or "none"))


def _compared(case: Case, root: Path, options: argparse.Namespace) -> Line:
    with (
        _player(sys.executable, "vllm", case, root, options) as vllm,
        _player(options.python, "transformers", case, root, options) as ours,
    ):
        vllm(), ours()  # a first turn that does not count, since it includes one-time costs
        seconds = alternate(options.rounds, vllm, ours)
    peers, mine = zip(*[(case.n / its, case.n / our) for its, our in seconds], strict=True)
    return ratio_line(f"{case.name}: against vLLM", list(peers), list(mine), "pictures/s", ">= 1.0")


@contextmanager
def _player(
    python: str, engine: str, case: Case, root: Path, options: argparse.Namespace
) -> Iterator[Callable[[], float]]:
    """Starts a process that loads its model; yields a function that makes it take a turn and returns the seconds."""
    command = [python, __file__, "--engine", engine, "--model", case.model, "--dtype", case.dtype, "--root", str(root)]
    command += ["--forced"] if case.is_forced else []
    command += ["--batch-size", str(options.batch_size)] if options.batch_size else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        print(f"{case.name}: {engine} takes {_answer(process.stdout, 'ready')} pictures at a time", file=sys.stderr)
        yield partial(_turn, process.stdin, process.stdout)
        process.stdin.close()


def _turn(stdin: IO[str], stdout: IO[str]) -> float:
    stdin.write("go\n")
    stdin.flush()
    return float(_answer(stdout, "took"))


def _answer(stdout: IO[str], keyword: str) -> str:
    for line in stdout:  # vLLM prints to stdout too
        if line.startswith(f"{keyword} "):
            return line.split()[1]
    raise SystemExit("a process ended before its turn: see its output above")


# --- the process of one engine ---------------------------------------------------------------------------------


def _take_turns(options: argparse.Namespace) -> None:
    recipe = Recipe(model=options.model, dtype=options.dtype, max_new_tokens=LONGEST if options.forced else 64)
    pictures = list(ways.pictures_of(options.root))
    lengths = ways.uneven_lengths(len(pictures), MEAN, LONGEST) if options.forced else None
    engine = LOAD[options.engine](recipe, Options(options.engine, batch_size=options.batch_size, device="cpu"), lengths)
    prepared = [engine.prepare(number, Request([picture])) for number, picture in enumerate(pictures, 1)]
    print("ready", engine.batch_size, flush=True)
    for _ in sys.stdin:
        seconds, completions = from_memory(engine, prepared)
        assert all(completion.failure is None for completion in completions)
        print("took", seconds, flush=True)


def _load_vllm(recipe: Recipe, options: Options, lengths: Sequence[int] | None) -> Engine:
    engine = VLLMEngine(recipe, options)
    engine.load()
    if lengths is not None:
        add = engine._llm.add_request
        engine._llm.add_request = lambda name, inputs, sampling: add(
            name, inputs, _of_length(sampling, lengths[int(name) - 1])
        )
    return engine


def _of_length(sampling: Any, length: int) -> Any:
    """Sampling parameters that make the caption exactly this long: no token ends it earlier."""
    forced = sampling.clone()
    forced.max_tokens, forced.stop_token_ids = length, []
    return forced


LOAD: dict[str, Callable[[Recipe, Options, Sequence[int] | None], Engine]] = {
    "transformers": ways.load,
    "vllm": _load_vllm,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--python", default=".venv/bin/python", help="Python of the environment without vLLM")
    add("--only", default="", help="measure only cases whose names contain this text")
    add("--rounds", type=int, default=5, help="rounds, in each of which both take a turn")
    add("--pictures", type=int, default=256, help="pictures for the demo model")
    add("--large-pictures", type=int, default=64, help="pictures for the model of 105 million parameters")
    add("--batch-size", type=int, help="batch size of both; without it, each uses that of a worker without options")
    for internal in ("--engine", "--model", "--dtype"):
        add(internal, help=argparse.SUPPRESS)
    for internal in ("--root", "--write-105m"):
        add(internal, type=Path, help=argparse.SUPPRESS)
    add("--forced", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
