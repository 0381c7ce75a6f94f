"""Workers as a Slurm job: writes an sbatch script and submits it. Slurm runs, ends and requeues the job."""

import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from rococap.launch import LaunchError
from rococap.worker.children import program

WARNING_SEC = 120
"""How long before the time limit Slurm signals the script, unless workers need longer to drain."""
SLACK_SEC = 60
"""What the script gets beyond the drain timeout of its workers."""
MIN_WORK_SEC = 3 * 60
"""What a job has at least before it is signalled, which Slurm may do a minute early. With less, it would be drained and
requeued before it had captioned anything, again and again.
"""
SUBMIT_TIMEOUT_SEC = 60.0

_DURATION = re.compile(r"(?:(?P<days>[0-9]+)-)?(?P<first>[0-9]+)(?::(?P<second>[0-9]+))?(?::(?P<third>[0-9]+))?")

_INSTEAD = {
    "--nodes": "use --nodes instead",
    "-N": "use --nodes instead",
    "--array": "use --array instead",
    "-a": "use --array instead",
    "--gpus-per-node": "use --gpus-per-node instead",
    "-G": "use --gpus-per-node instead",
    "--ntasks-per-node": "use --nodes or --gpus-per-node instead",
    "-n": "use --nodes or --gpus-per-node instead",
    "--cpus-per-task": "use --cpus-per-task instead",
    "-c": "use --cpus-per-task instead",
    "--time": "use --time instead",
    "-t": "use --time instead",
    "--partition": "use --partition instead",
    "-p": "use --partition instead",
    "--signal": "use --drain-timeout instead",
    "--no-requeue": "leave it out",
}
"""Options of sbatch that the script must set itself, because of what is checked or because it relies on them."""
_SWITCHES = "HOQWksv"
"""Options of sbatch of one letter without a value, which others may follow in one word."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What Slurm is asked for. `array` None means one job; otherwise so many of them, each with these nodes.

    `more` are further options of sbatch, such as `--account=radiology`; they override the script's own.
    """

    nodes: int = 1
    gpus_per_node: int = 1
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    array: int | None = None
    more: Sequence[str] = ()

    @property
    def n_nodes(self) -> int:
        """How many nodes all jobs have together."""
        return self.nodes * (self.array or 1)

    @property
    def log(self) -> str:
        """The name of a job's log in Slurm's notation; those of its tasks have `-` and the number of the task too."""
        return "rococap-%j" if self.array is None else "rococap-%A_%a"

    def options(self) -> list[str]:
        """The options of sbatch. There is one task for each node, which runs a worker for each GPU."""
        wanted = {
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_task,
            "time": self.time,
            "partition": self.partition,
            "array": None if self.array is None else f"1-{self.array}",
            "output": f"{self.log}.log",
        }
        return [f"--{name}={shlex.quote(str(value))}" for name, value in wanted.items() if value is not None]


def seconds(duration: str) -> int:
    """The seconds of a time limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises ValueError for any other text.
    """
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"{duration!r} is not a time limit. Write minutes, hours:minutes:seconds or days-hours.")
    parts = [int(part) for part in match.group("first", "second", "third") if part is not None]
    if match["days"] is not None:
        parts = [int(match["days"]) * 24 + parts[0], *parts[1:]]
    elif len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, rest = (*parts, 0, 0)[:3]
    return 3600 * hours + 60 * minutes + rest


def instead_of(word: str) -> str | None:
    """What to do instead of giving sbatch this option, if the script must set it itself."""
    if word.startswith("--"):
        name = word.partition("=")[0]  # or only its beginning, which is enough for sbatch
        return next((instead for own, instead in _INSTEAD.items() if own.startswith(name)), None)
    return _INSTEAD.get("-" + word[1:].lstrip(_SWITCHES)[:1]) if word.startswith("-") else None


def warning_sec(drain_timeout: float) -> int:
    """How long before the time limit Slurm signals the script."""
    return max(WARNING_SEC, math.ceil(drain_timeout) + SLACK_SEC)


def script(
    allocation: Allocation, run: str, options: Sequence[str], *, drain_timeout: float = 25.0, flags: Sequence[str] = ()
) -> str:
    """The sbatch script that captions the run; `options` are those of `rococap worker`, `flags` those before it.

    The URL of the queue is not in it, because it may hold a password: sbatch passes on ROCOCAP_DB.
    """
    gpus = ",".join(map(str, range(allocation.gpus_per_node)))
    rococap = shlex.join([*program(), *flags])
    worker = shlex.join(["worker", "--devices", gpus or "cpu:1", "--run", run, *options])
    cpus = f" --cpus-per-task={allocation.cpus_per_task}" if allocation.cpus_per_task else ""
    lines = "\n".join(f"#SBATCH {option}" for option in [*allocation.options(), *allocation.more])
    return _SCRIPT.format(
        lines=lines,
        warning=warning_sec(drain_timeout),
        rococap=rococap,
        worker=worker,
        run=shlex.quote(run),
        cpus=cpus,
        log=allocation.log,
    )


_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=rococap
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{warning}
{lines}

: "${{ROCOCAP_DB:?names no queue: submit this script with ROCOCAP_DB set and with --export=ALL}}"
rococap=({rococap})

is_finished() {{  # no, too, if the database does not answer
  "${{rococap[@]}}" status --json | "${{rococap[0]}}" -c '
import json, sys
runs = [run for run in json.load(sys.stdin)["runs"] if run["run"] == sys.argv[1]]
sys.exit(any(run["pending"] + run["leased"] + run["waiting"] for run in runs))
' {run}
}}

# Slurm sends USR1 before the time limit: the workers finish what they are captioning and give the rest back.
trap 'is_ending=yes; kill -USR1 "$step"' USR1

# One task a node. A task that fails or has no work left does not end the others.
srun --kill-on-bad-exit=0 --wait=0 --open-mode=append{cpus} --output={log}-%t.log "${{rococap[@]}}" {worker} &
step=$!
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  code=$?
done
if [ -z "${{is_ending:-}}" ]; then exit "$code"; fi
is_finished || scontrol requeue "$SLURM_JOB_ID"
"""


def submit(script: str, url: str) -> str:
    """Submits the script, which finds the queue at `url`; returns the number of the job.

    Raises LaunchError with Slurm's reason if it refuses the job, and if there is no Slurm or it does not answer.
    """
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on PATH: run this on a login node of the cluster, or print the script with --dry-run."
        )
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *_options_in(script)],
            input=script,
            capture_output=True,
            text=True,
            env=os.environ | {"ROCOCAP_DB": url},
            timeout=SUBMIT_TIMEOUT_SEC,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"sbatch did not answer within {SUBMIT_TIMEOUT_SEC:.0f} s. See whether the job was submitted (squeue --me) "
            "and whether Slurm's controller answers (scontrol ping), then try again."
        ) from error
    if done.returncode != 0:
        reason = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines())
        raise LaunchError(f"Slurm refused the job: {reason}. {_step(reason)}")
    return done.stdout.strip().partition(";")[0]


def _options_in(script: str) -> list[str]:
    """The options of the script, for the command line: there they come before variables such as SBATCH_PARTITION."""
    lines = (line.partition("#SBATCH ") for line in script.splitlines())
    return [word for before, found, option in lines if found and not before for word in shlex.split(option)]


def _step(reason: str) -> str:
    if "configuration source" in reason:
        return "Run this on a login node of the cluster, or set SLURM_CONF."
    if "node configuration" in reason:
        return "See what the machines have, and set --nodes and --gpus-per-node: sinfo -o '%P %D %G'"
    return "See which partitions there are: sinfo"
