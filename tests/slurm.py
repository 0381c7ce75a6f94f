"""A real Slurm on loopback, in a folder of its own. Install it with apt-get install slurm-wlm munge."""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
IS_AVAILABLE = os.geteuid() == 0 and all(shutil.which(program, path=PATH) for program in NEEDED)
"""munged runs as its own user, and slurmd starts jobs: both need root."""

SETTINGS = """\
ClusterName=rococap
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=600
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
GresTypes=gpu
"""


class Cluster:
    """munged, slurmctld and a slurmd for each of its nodes, `n1` and so on. Each node has two cores and two GPUs that
    Slurm counts, but that are no devices.
    """

    def __init__(self, folder: Path, n_nodes: int) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, n_nodes + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._processes: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        ports = _free_ports(1 + len(self.names))
        nodes = "".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 Gres=gpu:2\n"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        partition = f"PartitionName=main Nodes={','.join(self.names)} Default=YES MaxTime=INFINITE State=UP\n"
        settings = SETTINGS.format(folder=self.folder, port=ports[0]) + nodes + partition
        (self.folder / "slurm.conf").write_text(settings)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/zero\nName=gpu File=/dev/full\n")
        (self.folder / "state").mkdir()
        for name in self.names:
            (self.folder / f"spool-{name}").mkdir()
        self._start_munge()
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for name in self.names:
            self.start_node(name)
        self.until(lambda: self.nodes() == dict.fromkeys(self.names, "idle"), "idle nodes")

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """As if its power failed, but for the processes of its jobs, which Slurm no longer reaches."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def nodes(self) -> dict[str, str]:
        """The state of each node, without the marks that Slurm adds, such as `*` for one that does not answer."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").split("\n")
        return {name: state.rstrip("*~#!%$@^-") for name, state in (line.split() for line in lines if line)}

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job, such as JobState, Restarts and NodeList."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(path.read_text()[-2_000:] for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        for process in [*self._processes.values()][::-1]:
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for path in (self.folder, key):
            shutil.chown(path, "munge", "munge")
        files = {
            "--key-file": key,
            "--socket": self.folder / "munge.socket",
            "--pid-file": self.folder / "munge.pid",
            "--log-file": self.folder / "munge.log",
            "--seed-file": self.folder / "munge.seed",
        }
        options = [f"{name}={path}" for name, path in files.items()]
        self._start("munged", "munged", "--foreground", *options, user="munge")
        self.until((self.folder / "munge.socket").exists, "munged listens")

    def _start(self, name: str, *command: str, user: str | None = None) -> None:
        program = shutil.which(command[0], path=PATH)
        self._processes[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", str(program), *command[1:]],  # a test run may be killed
            env=os.environ | self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=user,
        )


def _free_ports(n: int) -> list[int]:
    """None of those that the system gives to whoever asks for any: such a one could be taken before Slurm listens."""
    free: list[int] = []
    with ExitStack() as sockets:
        for port in random.sample(range(10_000, 32_000), 1_000):
            with suppress(OSError):
                sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
                free.append(port)
            if len(free) == n:
                break
    return free


@contextmanager
def cluster(n_nodes: int) -> Iterator[Cluster]:
    # Not in pytest's folder, which only its owner may enter: munged runs as another user, and insists on its folder.
    with tempfile.TemporaryDirectory(prefix="rococap-slurm-") as folder:
        Path(folder).chmod(0o755)
        slurm = Cluster(Path(folder), n_nodes)
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()
            for process in psutil.process_iter(["environ"]):
                if (process.info["environ"] or {}).get("SLURM_CONF") == slurm.environment["SLURM_CONF"]:
                    with suppress(psutil.NoSuchProcess):  # it has just ended
                        process.send_signal(signal.SIGKILL)
