"""Measures captioning on a GPU in one call: what the card can do, what a step and a prefill take, pictures a second by
method and in a whole worker; and says what the figures decide.

The model has the architecture of Qwen2-VL-2B and random weights, which are made up on the card: nothing is downloaded.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this rococap, installed or not
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1"}

import gpu_findings
import gpu_output
import torch
from gpu_setting import Bench, Figures, without_distribution
from transformers.utils import logging as transformers_logging


@dataclass(frozen=True, slots=True)
class Part:
    """The function of the same name in a module, and about how many seconds it takes on a GPU."""

    module: str
    seconds: float


PARTS = {
    "versions": Part("gpu_device", 25),
    "demo": Part("gpu_engine", 45),
    "steps": Part("gpu_engine", 60),
    "prefill": Part("gpu_engine", 40),
    "throughput": Part("gpu_rates", 60),
    "worker": Part("gpu_rates", 60),
    "profile": Part("gpu_engine", 30),
    "sizes": Part("gpu_rates", 40),
}
"""In the order of how much they decide."""
TRACE_LINES = 12


def main() -> None:
    options = _options()
    if options.show is not None:
        lines = [json.loads(line) for line in options.show.read_text().splitlines()]
        gpu_findings.show(gpu_findings.last_run(lines))
        return
    ends_at = gpu_output.STARTED + 60 * options.minutes
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with (
        without_distribution(),
        tempfile.TemporaryDirectory(prefix="bench_gpu_") as folder,
        options.output.open("a") as file,
    ):
        output = gpu_output.Lines(file)
        logging.getLogger("rococap").addHandler(output)
        bench = Bench(options.device, options.tiny, ends_at, Path(folder), output.write)
        try:
            for name in options.only:
                output.part = name
                for figures in _measured(bench, name):
                    output.write(figures)
        finally:  # also after an interruption: the results so far are worth having
            gpu_findings.show(output.written)


def _measured(bench: Bench, name: str) -> Iterator[Figures]:
    """The lines of a part; if it fails, the last of them says why, and the bench is fit for the next part."""
    part = PARTS[name]
    if reason := bench.too_late_for(part.seconds):
        yield {"skipped": reason}
        return
    try:
        # Imported only now: what one part needs, and this machine lacks, must not cost the other parts.
        yield from getattr(import_module(part.module), name)(bench)
    except Exception as error:
        trace = traceback.format_exc().splitlines()[-TRACE_LINES:]
        yield {"error": f"{type(error).__name__}: {error}"[:500], "traceback": trace}
    else:
        return
    try:
        bench.tidy()  # after the except clause: the error keeps the allocated memory alive
    except Exception as error:  # once the device has failed, so does everything on it
        yield {"error": f"tidying up: {error}"[:500]}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("bench_gpu.jsonl"), help="file to which JSON lines are appended")
    add("--minutes", type=float, default=8.0, help="no part starts that would end later")
    add(
        "--only",
        type=lambda text: text.split(","),
        default=",".join(PARTS),
        help="parts to measure, separated by commas, in this order",
    )
    add("--device", type=torch.device, default="cuda:0", help="cuda:0, or cpu with --tiny")
    add("--tiny", action="store_true", help="a tiny model and few pictures: tries all parts on a CPU in minutes")
    add("--show", type=Path, metavar="FILE", help="measure nothing: print what the last call wrote to FILE")
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if options.show is None and options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; to try the bench on a CPU: --device cpu --tiny")
    return options


if __name__ == "__main__":
    main()
