"""Two benches that take long or need what is not here, each in its smallest size.

That for GPUs is tried on a CPU: nobody gets a second chance on a borrowed card.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"

pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="the source distribution leaves the benches out")


@pytest.fixture(scope="module")
def findings() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_findings", BENCH / "gpu_findings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder: Path, parts: str, *options: str, **environment: str) -> tuple[list[dict[str, Any]], str]:
    """The lines that the bench writes, and what it prints."""
    output = folder / "lines.jsonl"
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py", "--tiny", "--device", "cpu", "--only", parts, "--output", output, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in output.read_text().splitlines()], done.stdout


@pytest.mark.slow
def test_the_bench_for_gpus_writes_a_line_for_each_figure_and_says_what_they_decide(tmp_path):
    lines, printed = run(tmp_path, "versions,steps,demo")
    assert not [line for line in lines if "error" in line]
    assert list(dict.fromkeys(line["part"] for line in lines)) == ["versions", "steps", "demo"]
    cases = {line["case"]: line for line in lines}
    assert cases["ceilings"]["matmul_tflop_per_sec"] > 0
    assert cases["attention, vision tower"]["ms"]["math"] > 0
    assert cases["loading"]["finite"]
    assert cases["eager, 4 at a time"]["ms"] > 0
    assert cases["float32, graphs"]["equal"] == cases["float32, graphs"]["of"] > 0
    assert "Captions, float32, graphs: 8 of 8 are equal" in printed
    assert "Not measured: whether CUDA graphs pay;" in printed


@pytest.mark.slow
def test_a_part_that_fails_costs_no_other_part(tmp_path):
    (tmp_path / "alembic.py").write_text("raise ImportError('not on this machine')")
    lines, printed = run(tmp_path, "worker,prefill", PYTHONPATH=str(tmp_path))
    (error,) = [line for line in lines if "error" in line]
    assert error["part"] == "worker"
    assert error["error"] == "ImportError: not on this machine"
    assert error["traceback"]
    split = next(line for line in lines if line.get("case") == "2 of 112 x 112")["split_ms"]
    assert set(split) == {"collate", "upload", "vision tower", "language model", "put", "other"}
    assert "Reading one picture alone takes" in printed


@pytest.mark.slow
def test_no_part_starts_that_would_end_too_late(tmp_path):
    lines, _ = run(tmp_path, "versions,steps", "--minutes", "0")
    assert [line["part"] for line in lines] == ["versions", "steps"]
    assert all(line["skipped"].endswith("and 0 s are left") for line in lines)


def step(mode: str, rows: int, ms: float) -> dict[str, Any]:
    case = f"{mode}, {rows} at a time"
    return {"part": "steps", "case": case, "mode": mode, "rows": rows, "first_ms": ms, "ms": ms, "read_gb": 3.0}


def test_graphs_pay_where_a_step_without_them_takes_more_than_twice_as_long(findings):
    lines = [step("eager", 16, 20.0), step("eager", 256, 22.0), step("replayed", 16, 4.0), step("replayed", 256, 15.0)]
    lines += [{"part": "steps", "case": "graphs", "n": 52, "seconds": 6.0, "buffers_and_graphs_gb": 12.5}]
    lines += [{"part": "versions", "case": "ceilings", "copy_gb_per_sec": 3000.0}]
    said = "\n".join(findings.decisions(lines))
    assert "eager ÷ replayed, by rows, is 5.0 with 16, 1.5 with 256: they pay with 16 (they do above 2)." in said
    assert "Capturing 52 graphs takes 6.0 s" in said
    assert "A step, 16 at a time, takes 4.00 ms, 4.0 times what reading its 3.0 GB takes" in said


def test_the_fewest_preparing_threads_that_keep_up_are_enough(findings):
    lines = [
        {"part": "worker", "case": "", "preparers": threads, "worker_over_engine": ratio}
        for threads, ratio in ((1, 0.62), (2, 0.96), (4, 0.97), (8, 0.9))
    ]
    assert "with 8: use 2, the fewest that are enough (from 0.95)." in findings.decisions(lines)[0]
    lines.pop(1), lines.pop(1)
    assert "with 8: use 8; something else is the limit (from 0.95)." in findings.decisions(lines)[0]


def test_cudnn_attention_stays_off_unless_it_makes_up_for_its_plans(findings):
    line = {
        "part": "versions",
        "case": "attention, vision tower",
        "ms": {"flash": 1.5, "efficient": None, "cudnn": 1.0, "math": 9.0},
        "new_shape_ms": {"flash": 0.1, "efficient": None, "cudnn": 160.0, "math": 0.0},
    }
    said = findings.decisions([line])[0]
    assert "on pays for shapes with more than 320 calls" in said
    line["ms"] |= {"cudnn": 1.6}
    assert findings.decisions([line])[0].endswith("off is right.")


def test_only_the_last_of_several_runs_in_a_file_is_shown(findings):
    first, second = [{"part": "demo", "at": at} for at in (1.0, 9.5)], [{"part": "demo", "at": at} for at in (0.9, 4.0)]
    assert findings.last_run(first) == first
    assert findings.last_run(first + second) == second


def test_lines_that_are_missing_leave_questions_open_and_nothing_else(findings):
    assert findings.decisions([]) == [
        "Not measured: "
        + "; ".join(
            [
                "whether captions are right",
                "whether CUDA graphs pay",
                "what first calls cost",
                "how close a step is to the memory's bound",
                "how much of the time the GPU works",
                "what reading pictures is bound by",
                "whether to read several pictures together",
                "whether cuDNN's attention should stay off",
                "whether patches should stay a matrix product",
                "how much faster than generate",
                "how many rows to decode at a time",
                "how many threads should prepare pictures",
                "whether the GPU is kept busy",
            ]
        )
        + "."
    ]


# --- Hundreds of workers ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bench_of_many_workers_stores_a_caption_for_every_picture(tmp_path):
    sizes = ("--rows", "1400", "--done", "400", "--connections", "4", "--batch", "8", "--seconds", "60")
    done = subprocess.run(
        [sys.executable, BENCH / "scale.py", *sizes], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "1,400 of 1,400 jobs done in the end, each with its caption; 0 leased" in done.stdout
    assert "| 1,000 GPUs with 50 captions/s: connections" in done.stdout
