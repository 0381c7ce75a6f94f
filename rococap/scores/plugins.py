"""Scores that others wrote, as metrics beside our own: functions by their name, and commands with an environment of
their own.

A function takes a list of captions and a list of their references, and returns one value for each pair: a number, a
dict of numbers by name, or None where the score is undefined. Its attribute `version` is part of the digest of stored
scores; without one, the content of its file is. It is called with at most BATCH pairs at a time, and a value may
depend on nothing but its own pair.

A command reads JSON Lines {"id", "caption", "reference"} from standard input and writes a line {"id", "score"} for
each, in any order; "score" is a value as above, and "id" the picture's. It is started for every BATCH pairs.

Whatever goes wrong in either is a NotComputed that says why.
"""

import json
import math
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Final

from rococap.errors import RococapError
from rococap.files import sha256_of
from rococap.results.formats import fold
from rococap.scores import imageclef
from rococap.scores.disagreement import DISAGREEMENT
from rococap.scores.evaluate import COUNTED, COUNTS, FACTS, METRICS, TEXTS, Metric, NotComputed, Pair, Scores

GROUP: Final = "rococap.scores"
"""The entry points of installed packages that are scores."""
BATCH: Final = 1_000
TIME_LIMIT_SEC: Final = 3_600.0
"""What a command may take for a batch."""
_NAME: Final = re.compile(r"[A-Za-z]\w*", re.ASCII)
_KEY: Final = re.compile(r"[\w-]+")
_TAIL: Final = 4_096  # bytes of standard error that are kept
_LONGEST_LINE: Final = 1_000_000  # bytes
_CHUNK: Final = 65_536
_OUTPUT, _ERRORS = "stdout", "stderr"

Score = Callable[[list[str], list[str]], Sequence[Any]]


def extras() -> list[str]:
    """The names of our own scores that are computed only on request."""
    return [metric.name for metric in METRICS if metric.extra]


def requested(
    also: Sequence[str], commands: Sequence[str] = (), time_limit_sec: float = TIME_LIMIT_SEC
) -> tuple[list[str], list[Metric]]:
    """Our own extra scores among `also`, and a metric for every other: an entry point's name or
    `[NAME=]package.module:function`; and for every command, as `NAME=COMMAND`.

    Raises RococapError for what names no score, for a name that is taken, and for a command that cannot be parsed.
    """
    ours = [name for name in also if name in extras()]
    plugins = [_function(*_named(one)) for one in also if one not in ours]
    plugins += [_command(one, time_limit_sec) for one in commands]
    taken = {"flagged", DISAGREEMENT, *TEXTS, *COUNTED, *imageclef.PARTS}
    taken |= {name for metric in METRICS for name in (metric.name, *metric.scores)}
    taken |= {f"{name}_{what}" for name in FACTS for what in COUNTS}
    for plugin in plugins:
        if not _NAME.fullmatch(plugin.name):
            raise RococapError(
                f"{plugin.name!r} cannot name a score: begin with a letter, and use letters, digits and _ only."
            )
        if plugin.name in taken:
            raise RococapError(f"There is a score {plugin.name} already: give another name, as in NAME=….")
        taken.add(plugin.name)
    return ours, plugins


def _metric(name: str, edition: str, score: Callable[[Sequence[Pair]], Sequence[Any]]) -> Metric:
    """A metric whose `score` takes a batch of pairs and returns their values, which are checked here."""

    def scores(pairs: Sequence[Pair], wanted: Sequence[int]) -> Iterator[Scores]:
        for start in range(0, len(wanted), BATCH):
            batch = [pairs[at] for at in wanted[start : start + BATCH]]
            values = score(batch)
            if len(values) != len(batch):
                raise NotComputed(f"It returned {len(values)} values for {len(batch)} captions.")
            yield from (_scores_of(name, value) for value in values)

    return Metric(name, (name,), scores, edition=edition)


def _scores_of(name: str, value: Any) -> Scores:
    """{name: number}, or {name.key: number} for a dict. Raises NotComputed for anything else."""
    if not isinstance(value, dict):
        return {name: _number(value)}
    if not value or not all(isinstance(key, str) and _KEY.fullmatch(key) for key in value):
        raise NotComputed(f"It returned a dict whose keys are not letters, digits, - and _: {_short(value)}.")
    return {f"{name}.{key}": _number(one) for key, one in value.items()}


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise NotComputed(f"It returned {_short(value)}, which is not a number.")
    if not math.isfinite(value):
        raise NotComputed(f"It returned {float(value)}; None is for a caption without a score.")
    return float(value)


def _short(value: object) -> str:
    return fold(repr(value))[:80]


# --- Functions -------------------------------------------------------------------------------------------------


def _named(also: str) -> tuple[str, EntryPoint]:
    """The name of a score, and where its function is."""
    name, is_named, place = also.rpartition("=")
    if ":" not in place:
        installed = entry_points(group=GROUP)
        if place in extras():
            raise RococapError(f"{place} is a score of rococap and keeps its name: --also {place}")
        if place not in installed.names:
            known = ", ".join([*extras(), *sorted(installed.names)])
            raise RococapError(f"There is no score {place!r}: name one of {known}, or package.module:function.")
        return (name if is_named else place), installed[place]
    found = EntryPoint(name, place, GROUP)
    if not EntryPoint.pattern.fullmatch(place) or not found.attr:
        raise RococapError(f"{place!r} does not name a function: package.module:function.")
    return (name if is_named else found.attr.rpartition(".")[2]), found


def _function(name: str, place: EntryPoint) -> Metric:
    try:
        function = _load(place)
        edition = f"{place.value} {_version(function, place)}"
    except NotComputed as reason:
        why = str(reason)

        def absent(batch: Sequence[Pair]) -> Sequence[Any]:
            raise NotComputed(why)

        return _metric(name, place.value, absent)
    return _metric(name, edition, lambda batch: _called(function, batch))


def _load(place: EntryPoint) -> Score:
    """Imports the function, also from the current folder.

    Raises RococapError if it does not exist, NotComputed if importing it fails.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        with redirect_stdout(sys.stderr):
            function: Score = place.load()
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{place.module}.".startswith(f"{error.name}."):
            raise RococapError(
                f"There is no module {error.name!r}: install it, or go to the folder that holds it."
            ) from error
        if isinstance(error, AttributeError) and place.module in sys.modules:
            raise RococapError(
                f"{place.module} has no {place.attr!r}: name its function, as in {place.value}."
            ) from error
        raise NotComputed(f"{place.module} cannot be imported ({_said(error)}).") from error
    if not callable(function):
        raise RococapError(f"{place.value} is not a function: name one of {place.module}.")
    return function


def _version(function: Score, place: EntryPoint) -> str:
    version = getattr(function, "version", None)
    file = getattr(sys.modules[place.module], "__file__", None)
    if version is None and file is None:
        raise RococapError(f"{place.value} has no version: set its attribute `version`.")
    return str(version) if version is not None else sha256_of(Path(file or ""))[:12]


def _called(function: Score, batch: Sequence[Pair]) -> Sequence[Any]:
    try:
        with redirect_stdout(sys.stderr):  # what it prints would stand before our --json
            return list(function([fold(pair.text) for pair in batch], [fold(pair.reference) for pair in batch]))
    except (Exception, SystemExit) as error:
        raise NotComputed(f"It failed: {_said(error)}.") from error


def _said(error: BaseException) -> str:
    """The kind of error, and the first line of its message."""
    lines = [line for line in map(fold, str(error).splitlines()) if line]
    return ": ".join([type(error).__name__, *lines[:1]]).rstrip(".")


# --- Commands --------------------------------------------------------------------------------------------------


def _command(given: str, limit_sec: float) -> Metric:
    name, _, line = given.partition("=")
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise RococapError(f"--also-command {given!r} cannot be read ({error}): quote it as for a shell.") from error
    if not words:
        raise RococapError(f"--also-command {given!r} has no command: NAME=COMMAND.")
    return _metric(name, line, lambda batch: _answered(words, batch, limit_sec))


def _answered(words: Sequence[str], batch: Sequence[Pair], limit_sec: float) -> list[Any]:
    """The command's answers, in the order of the batch. What is left of it and its children at the end is killed."""
    # A file and not a pipe: the command may write as much as it likes before it reads.
    with TemporaryFile("w+", encoding="utf-8") as questions:
        for pair in batch:
            question = {"id": pair.image_id, "caption": fold(pair.text), "reference": fold(pair.reference)}
            questions.write(json.dumps(question) + "\n")
        questions.seek(0)
        try:
            process = subprocess.Popen(
                words, stdin=questions, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise NotComputed(f"Its command cannot be started ({error.strerror}: {words[0]}).") from error
    complaints = bytearray()
    try:
        answers = _read_answers(process, {pair.image_id for pair in batch}, complaints, limit_sec)
    except NotComputed as reason:
        raise NotComputed(f"{reason}{_last_line(complaints)}") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
    return [answers[pair.image_id] for pair in batch]


def _read_answers(
    process: "subprocess.Popen[bytes]", ids: set[str], complaints: bytearray, limit_sec: float
) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for line in _lines(process, complaints, time.monotonic() + limit_sec):
        id, score = _answer(line)
        if not isinstance(id, str) or id not in ids:
            raise NotComputed(f"Its command answered for {_short(id)}, which it was not asked for.")
        if id in answers:
            raise NotComputed(f"Its command answered twice for {id}.")
        answers[id] = score
    if process.returncode is None:
        raise NotComputed(f"Its command took more than {limit_sec:g} s for {len(ids)} captions.")
    if process.returncode:
        raise NotComputed(f"Its command {_ended(process.returncode)}.")
    if len(answers) < len(ids):
        raise NotComputed(f"Its command answered for {len(answers)} of {len(ids)} captions.")
    return answers


def _answer(line: bytes) -> tuple[Any, Any]:
    try:
        answer = json.loads(line)
        return answer["id"], answer["score"]
    except (ValueError, KeyError, TypeError, RecursionError):
        shown = _short(line.decode(errors="replace"))
        raise NotComputed(f'Its command wrote a line that is not {{"id": …, "score": …}}: {shown}.') from None


def _lines(process: "subprocess.Popen[bytes]", complaints: bytearray, deadline: float) -> Iterator[bytes]:
    """The lines of standard output, while the end of standard error is kept in `complaints`. They end with the process,
    or at the deadline, when `process.returncode` is still None.
    """
    partial = b""
    with selectors.DefaultSelector() as selector:
        for pipe, name in ((process.stdout, _OUTPUT), (process.stderr, _ERRORS)):
            assert pipe is not None
            selector.register(pipe, selectors.EVENT_READ, name)
        while (left := deadline - time.monotonic()) > 0:
            # A child of the command may hold the pipes open after its end.
            has_ended = process.poll() is not None
            ready = selector.select(0 if has_ended else min(left, 0.1)) if selector.get_map() else []
            for key, _ in ready:
                chunk = os.read(key.fd, _CHUNK)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.data == _ERRORS:
                    complaints[:] = (complaints + chunk)[-_TAIL:]
                else:
                    *lines, partial = (partial + chunk).split(b"\n")
                    yield from filter(bytes.strip, lines)
            if len(partial) > _LONGEST_LINE:
                raise NotComputed(f"Its command wrote a line of more than {_LONGEST_LINE:,} bytes.")
            if has_ended and not ready:
                break
            if not ready and not selector.get_map():
                time.sleep(min(left, 0.05))  # it has closed its pipes and not ended
    if partial.strip() and process.returncode is not None:
        yield partial


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last_line(complaints: bytearray) -> str:
    lines = [line for line in map(fold, complaints.decode(errors="replace").splitlines()) if line]
    return f" It said: {lines[-1][:300]}" if lines else ""
