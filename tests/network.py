"""Two machines as network namespaces with a cable between them, which needs root, `ip` and `nft`."""

import ctypes
import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_numbers = itertools.count(1)


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60, env=os.environ | {"PATH": _PATH})


@cache
def why_not() -> str:
    """Why this machine has no namespaces with a link and a firewall; empty if it has them."""
    if missing := [program for program in ("ip", "nft") if shutil.which(program, path=_PATH) is None]:
        return f"{' and '.join(missing)} are not installed: apt-get install iproute2 nftables"
    try:
        with two_machines() as link:
            link.drop([1])
    except subprocess.CalledProcessError as error:
        return f"network namespaces need root, CAP_NET_ADMIN and CAP_SYS_ADMIN: {error.stderr.decode().strip()}"
    return ""


def enter(namespace: str) -> None:
    """From now on, sockets of this thread and the processes that it starts are in the namespace."""
    with open(namespace) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """The same while the block runs."""
    before = f"/proc/self/task/{threading.get_native_id()}/ns/net"
    with open(before) as file:
        enter(namespace)
        try:
            yield
        finally:
            enter(f"/proc/self/fd/{file.fileno()}")


class Link:
    """A cable between the machine of the workers and that of the database."""

    address = "10.99.0.2"
    """Of the database's machine; its workers' has .1."""

    def __init__(self, workers: str, database: str) -> None:
        self._workers, self._database = workers, database

    @property
    def workers(self) -> str:
        """The path of the workers' namespace."""
        return f"/run/netns/{self._workers}"

    @property
    def database(self) -> str:
        return f"/run/netns/{self._database}"

    def cut(self) -> None:
        run("ip", "-n", self._database, "link", "set", "cable", "down")

    def mend(self) -> None:
        run("ip", "-n", self._database, "link", "set", "cable", "up")

    def drop(self, ports: list[int]) -> None:
        """From now on, packets from and to these ports of the workers' machine vanish."""
        listed = ", ".join(map(str, ports))
        rules = (
            "table inet lost { "
            f"chain from_them {{ type filter hook input priority 0; tcp sport {{ {listed} }} drop; }}; "
            f"chain to_them {{ type filter hook output priority 0; tcp dport {{ {listed} }} drop; }}; }}"
        )
        run("ip", "netns", "exec", self._database, "nft", rules)


@contextmanager
def two_machines() -> Iterator[Link]:
    name = f"rococap-{os.getpid()}-{next(_numbers)}"
    workers, database = f"{name}-workers", f"{name}-database"
    link = Link(workers, database)
    try:
        for namespace in (workers, database):
            run("ip", "netns", "add", namespace)
            run("ip", "-n", namespace, "link", "set", "lo", "up")
        run("ip", "link", "add", "cable", "netns", workers, "type", "veth", "peer", "cable", "netns", database)
        for namespace, address in ((workers, "10.99.0.1"), (database, link.address)):
            run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "cable")
            run("ip", "-n", namespace, "link", "set", "cable", "up")
        yield link
    finally:
        for namespace in (workers, database):
            if Path(f"/run/netns/{namespace}").exists():
                run("ip", "netns", "delete", namespace)
