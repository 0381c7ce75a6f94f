"""What `gpu.py` prints at the end: a table of all lines, and which figure decides what. Needs nothing but the lines."""

from collections.abc import Iterator, Sequence
from typing import Any

Line = dict[str, Any]

GRAPHS_PAY = 2.0
"""A step must take this many times as long without graphs as with them."""
COLD_MS = 1000.0
"""First calls that take longer than this altogether are worth a warm-up before the first picture."""
NEAR_BOUND = 2.0
"""A step that takes less than this many times what reading its data takes has little left to gain."""
EFFICIENT = 0.5
"""Below this share of the ceiling for matrix products, there is more to gain between them than in them."""
HOST_SHARE = 0.15
"""What a prefill may spend on anything but the model."""
CLOSE = 0.95
"""As good as the best."""
GROUPS_PAY = 1.1
BUSY = 0.9


def last_run(lines: Sequence[Line]) -> Sequence[Line]:
    """The lines of the last run in a file: each starts anew to count the time."""
    starts = [n for n in range(1, len(lines)) if lines[n]["at"] < lines[n - 1]["at"]]
    return lines[starts[-1] :] if starts else lines


def show(lines: Sequence[Line]) -> None:
    """Prints all lines as Markdown, and then what they decide."""
    print("\n| part | case | figures |\n| --- | --- | --- |")
    for line in lines:
        figures = {key: value for key, value in line.items() if key not in ("part", "case", "top", "traceback")}
        print(f"| {line['part']} | {line.get('case', '')} | {_figures(figures)} |")
    for line in lines:
        if "top" in line:
            _show_kernels(line)
    print("\n## What this decides\n")
    for sentence in decisions(lines):
        print(f"- {sentence}")


def _figures(figures: Line) -> str:
    return "; ".join(f"{key} {_figure(value)}" for key, value in figures.items()).replace("|", "\\|").replace("\n", " ")


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_figure(part)}" for key, part in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(_figure(part) for part in value) + "]"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "none" if value is None else str(value)


def _show_kernels(line: Line) -> None:
    print(f"\n{line['case']}: {line['ms']:.2f} ms, the device busy for {line['busy_ms']:.2f} ms under the profiler\n")
    print("| kernel | calls | ms | share |\n| --- | ---: | ---: | ---: |")
    for kernel in line["top"]:
        name = kernel["name"].replace("|", "\\|")
        print(f"| `{name}` | {kernel['calls']} | {kernel['ms']:.2f} | {100 * kernel['share']:.0f} % |")


# --- Decisions -------------------------------------------------------------------------------------------------


def decisions(lines: Sequence[Line]) -> list[str]:
    """A sentence for each question that the lines answer, with the figures and the rule; and which stay open."""
    found = Found(lines)
    sentences: list[str] = []
    open_questions = []
    for question in QUESTIONS:
        try:
            for sentence in question(found):
                sentences.append(sentence)  # noqa: PERF402  # one by one: a later one may lack its figures
        except (LookupError, TypeError, ValueError, ZeroDivisionError):  # a line, or a figure in it, is missing
            name = (question.__doc__ or "").partition(".")[0]
            open_questions.append(name[:1].lower() + name[1:])
    return sentences + ([f"Not measured: {'; '.join(open_questions)}."] if open_questions else [])


class Found:
    """The lines, by part."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = [line for line in lines if "error" not in line and "skipped" not in line]

    def having(self, key: str, part: str | None = None) -> list[Line]:
        """The lines, of one part or of all, that have this figure. Raises KeyError if there are none."""
        lines = [line for line in self._lines if part in (None, line["part"]) and line.get(key) is not None]
        if not lines:
            raise KeyError(part, key)
        return lines

    def case(self, part: str, case: str) -> Line:
        """The part's line for a case. Raises KeyError if there is none."""
        return {line["case"]: line for line in self.having("case", part)}[case]

    def steps(self, mode: str) -> dict[int, Line]:
        """By number of rows."""
        return {line["rows"]: line for line in self.having("mode", "steps") if line["mode"] == mode}


def _captions(found: Found) -> Iterator[str]:
    """Whether captions are right."""
    for line in found.having("equal", "demo"):
        verdict = "as on the CPU" if line["equal"] == line["of"] else f"differing, such as {line['others'][0]}"
        if line["case"].startswith("bfloat16") and line["equal"] < line["of"]:
            verdict = "others differ, as rounding allows"
        yield f"Captions, {line['case']}: {line['equal']} of {line['of']} are equal; {verdict}."


def _graphs(found: Found) -> Iterator[str]:
    """Whether CUDA graphs pay."""
    eager, replayed = found.steps("eager"), found.steps("replayed")
    ratios = {rows: eager[rows]["ms"] / line["ms"] for rows, line in replayed.items()}
    if not ratios:
        raise KeyError("replayed")
    paying = [rows for rows, ratio in ratios.items() if ratio > GRAPHS_PAY]
    listed = ", ".join(f"{ratio:.1f} with {rows}" for rows, ratio in ratios.items())
    verdict = f"they pay with {', '.join(map(str, paying))}" if paying else "they do not pay"
    yield f"CUDA graphs: eager ÷ replayed, by rows, is {listed}: {verdict} (they do above {GRAPHS_PAY:g})."
    cost = found.case("steps", "graphs")
    yield (
        f"Capturing {cost['n']} graphs takes {cost['seconds']:.1f} s at every start, and "
        f"{cost['buffers_and_graphs_gb']:.1f} GB with the buffers: fewer shapes if that is too much."
    )


def _cold(found: Found) -> Iterator[str]:
    """What first calls cost."""
    lines = found.having("first_ms")
    cold = sum(max(0.0, line["first_ms"] - line["ms"]) for line in lines)
    worst = max(lines, key=lambda line: line["first_ms"] - line["ms"])
    verdict = "a warm-up at the start pays" if cold > COLD_MS else "no warm-up is needed"
    yield (
        f"First calls take {cold:.0f} ms more than later ones altogether, most of all {worst['case']} with "
        f"{worst['first_ms'] - worst['ms']:.0f} ms: {verdict} (it does above {COLD_MS:.0f} ms)."
    )


def _kernels(found: Found) -> Iterator[str]:
    """How much of the time the GPU works."""
    for line in found.having("busy_ms", "profile"):
        share = line["busy_ms"] / line["ms"]
        verdict = "these are the limit" if share >= BUSY else "launching them is the limit"
        attention = ", ".join(line["attention"]) or "no kernel made for it"
        yield (
            f"{line['case'].capitalize()}: {line['kernels']} kernels keep the device busy for {100 * share:.0f} % of "
            f"{line['ms']:.2f} ms: {verdict} (from {100 * BUSY:.0f} %); attention runs in {attention}."
        )


def _bound(found: Found) -> Iterator[str]:
    """How close a step is to the memory's bound."""
    best = {line["rows"]: line for line in sorted(found.having("read_gb", "steps"), key=lambda line: -line["ms"])}
    bandwidth = found.case("versions", "ceilings")["copy_gb_per_sec"]
    for rows, line in sorted(best.items()):
        floor = 1000 * line["read_gb"] / bandwidth
        verdict = "little is left to gain" if line["ms"] < NEAR_BOUND * floor else "fewer or better kernels pay"
        yield (
            f"A step, {rows} at a time, takes {line['ms']:.2f} ms, {line['ms'] / floor:.1f} times what reading its "
            f"{line['read_gb']:.1f} GB takes at the speed of a copy: {verdict} (they do above {NEAR_BOUND:g})."
        )


def _reading(found: Found) -> Iterator[str]:
    """What reading pictures is bound by."""
    line = _largest(found)
    split = line["split_ms"]
    whole = sum(split.values())
    others = 1 - (split["vision tower"] + split["language model"]) / whole
    longest = max(split, key=lambda name: split[name])
    verdict = f"bound by the {longest}" if others <= HOST_SHARE else "moving the rest off this thread pays"
    yield (
        f"Reading {line['case']}: vision tower {100 * split['vision tower'] / whole:.0f} %, language model "
        f"{100 * split['language model'] / whole:.0f} %, the rest {100 * others:.0f} %: {verdict} (the rest may take "
        f"{100 * HOST_SHARE:.0f} %)."
    )
    ceiling = found.case("versions", "ceilings")["matmul_tflop_per_sec"]
    for part, tflop in (("vision tower", line["vision_tflop"]), ("language model", line["text_tflop"])):
        share = 1000 * tflop / split[part] / ceiling
        advice = "matrix products bound it" if share >= EFFICIENT else "fusing what lies between the products pays"
        yield f"Reading, {part}: {100 * share:.0f} % of the ceiling: {advice} (below {100 * EFFICIENT:.0f} %)."


def _together(found: Found) -> Iterator[str]:
    """Whether to read several pictures together."""
    line = _largest(found)
    alone = found.case("prefill", f"1 of {line['side']} x {line['side']}")
    gain = alone["ms"] * line["pictures"] / line["ms"]
    verdict = "reading several together pays" if gain > GROUPS_PAY else "one at a time would do, with less memory"
    yield (
        f"Reading one picture alone takes {gain:.2f} times as long as one of {line['pictures']}: {verdict} (above "
        f"{GROUPS_PAY:g})."
    )


def _largest(found: Found) -> Line:
    """The largest group of pictures of the usual size."""
    lines = found.having("split_ms", "prefill")
    return max((line for line in lines if line["side"] == lines[0]["side"]), key=lambda line: int(line["pictures"]))


def _cudnn(found: Found) -> Iterator[str]:
    """Whether cuDNN's attention should stay off."""
    lines = [line for line in found.having("new_shape_ms", "versions") if line["ms"].get("cudnn") is not None]
    if not lines:
        raise KeyError("cudnn")
    for line in lines:
        name, ms = line["case"].removeprefix("attention, "), line["ms"]
        others = {backend: ms[backend] for backend in ("flash", "efficient") if ms[backend] is not None}
        best = min(others, key=lambda backend: others[backend])
        plan, gain = line["new_shape_ms"]["cudnn"], others[best] - ms["cudnn"]
        verdict = "off is right"
        if gain > 0:
            calls = max(0.0, plan / gain)
            verdict = f"on pays for shapes with more than {calls:.0f} calls, of which each layer makes one"
        yield (
            f"cuDNN attention, {name}: {ms['cudnn']:.3f} ms, {best} {others[best]:.3f} ms, and {plan:.1f} ms more for "
            f"a new shape: {verdict}."
        )


def _patches(found: Found) -> Iterator[str]:
    """Whether patches should stay a matrix product."""
    line = found.case("prefill", "patches")
    product, convolution = line["product"]["ms"], line["convolution"]["ms"]
    verdict = "the product stays" if product <= convolution else "the convolution would do"
    yield f"Patches: {product:.2f} ms as a product, {convolution:.2f} ms as a convolution: {verdict}."


def _methods(found: Found) -> Iterator[str]:
    """How much faster than generate."""
    ours = {line["rows"]: line for line in found.having("method", "throughput") if line["method"] == "ours"}
    theirs = {line["rows"]: line for line in found.having("method", "throughput") if line["method"] == "generate"}
    for rows in sorted(ours.keys() & theirs.keys()):
        ratio = ours[rows]["tokens_per_sec"] / theirs[rows]["tokens_per_sec"]
        yield f"Ours is {ratio:.2f} times as fast as generate with {rows} at a time, in tokens a second."
    best, peer = (max(lines.values(), key=lambda line: line["tokens_per_sec"]) for lines in (ours, theirs))
    ratio = best["tokens_per_sec"] / peer["tokens_per_sec"]
    yield (
        f"The best of ours, {best['rows']} rows with {best['pictures_per_sec']:.1f} pictures/s, is {ratio:.2f} times "
        f"as fast as the best of generate, {peer['rows']} at a time with {peer['pictures_per_sec']:.1f}."
    )


def _rows(found: Found) -> Iterator[str]:
    """How many rows to decode at a time."""
    ours = [line for line in found.having("middle_per_sec", "throughput") if line["method"] == "ours"]
    best = max(line["middle_per_sec"] for line in ours)
    close = min(line["rows"] for line in ours if line["middle_per_sec"] >= CLOSE * best)
    yield (
        f"Rows: in the middle of a run, {close} are the fewest with {100 * CLOSE:.0f} % of the best rate, "
        f"{best:.1f} pictures/s; a worker without --batch-size chooses "
        f"{found.case('steps', 'automatic batch size')['rows']}."
    )


def _preparers(found: Found) -> Iterator[str]:
    """How many threads should prepare pictures."""
    lines = found.having("worker_over_engine", "worker")
    listed = ", ".join(f"{line['worker_over_engine']:.2f} with {line['preparers']}" for line in lines)
    enough = [line["preparers"] for line in lines if line["worker_over_engine"] >= CLOSE]
    best = max(lines, key=lambda line: line["worker_over_engine"])["preparers"]
    verdict = f"use {min(enough)}, the fewest that are enough" if enough else f"use {best}; something else is the limit"
    yield f"Preparing threads: worker ÷ engine is {listed}: {verdict} (from {CLOSE:g})."


def _busy(found: Found) -> Iterator[str]:
    """Whether the GPU is kept busy."""
    for line in found.having("gpu_busy"):
        verdict = "the GPU is the limit" if line["gpu_busy"] >= BUSY else "the CPU keeps it waiting"
        busy = f"{100 * line['gpu_busy']:.0f} % of {line['part']}, {line['case']}"
        yield f"The GPU is busy for {busy}: {verdict} (from {100 * BUSY:.0f} %)."


QUESTIONS = (
    _captions,
    _graphs,
    _cold,
    _bound,
    _kernels,
    _reading,
    _together,
    _cudnn,
    _patches,
    _methods,
    _rows,
    _preparers,
    _busy,
)
