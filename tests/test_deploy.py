"""The files in deploy/, each checked by a validator of its format, and the parts of them that run without a cluster."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from places import ROOT, TESTS
from steps import running, until
from worlds import World, made

from rococap import __version__
from rococap.cli.options import cli

DEPLOY = ROOT / "deploy"
KUBERNETES = "1.33"  # the oldest version that the comments name
BIN = Path(sys.executable).parent


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


# --- Validators ------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile():
    hadolint = shutil.which("hadolint", path=f"{BIN}:{os.environ['PATH']}")
    done = subprocess.run([str(hadolint), str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def compose(file: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Docker Compose itself, which the package brings: its own command hides the exit code."""
    program = Path(str(find_spec("compose").origin)).with_name("docker-compose")
    command = [str(program), "--file", str(DEPLOY / file), *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_docker_compose_accepts_the_compose_file():
    done = compose("compose.yaml", "--profile", "gpu", "config", "--format", "json", POSTGRES_PASSWORD="secret")
    assert (done.returncode, done.stderr) == (0, "")
    services = json.loads(done.stdout)["services"]
    assert services.keys() == {"database", "worker", "gpus"}
    assert {services[name]["stop_grace_period"] for name in ("worker", "gpus")} == {"1m0s"}
    assert services["worker"]["environment"]["ROCOCAP_DB"] == ("postgresql+psycopg://rococap:secret@database/rococap")
    assert "set the password of the database" in compose("compose.yaml", "config", "--quiet").stderr


def test_docker_compose_accepts_the_file_of_the_server_which_asks_for_a_token():
    done = compose("serve.yaml", "config", "--format", "json", ROCOCAP_TOKEN="a-token-of-some-length")
    assert (done.returncode, done.stderr) == (0, "")
    (server,) = json.loads(done.stdout)["services"].values()
    assert understands(server["command"])
    assert "set a token" in compose("serve.yaml", "config", "--quiet").stderr


def understands(arguments: list[str]) -> bool:
    """Whether `rococap` has this command with these options. Nothing is run."""
    name, *options = arguments
    command = cli.commands[name]
    # With its parent: without, click would keep a --help that lacks -h.
    command.make_context(name, options, parent=cli.make_context("rococap", [], resilient_parsing=True))
    return True


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_accepts_the_unit_of_the_server(tmp_path):
    unit = (DEPLOY / "rococap-serve.service").read_text()
    program, *arguments = shlex.split(re.search(r"^ExecStart=(.*)", unit, re.MULTILINE)[1])
    assert Path(program).name == "rococap"
    assert understands(arguments)
    path = tmp_path / "rococap-serve.service"
    path.write_text(unit.replace(program, "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_kubernetes_accepts_the_job_and_its_budget():
    found = documents("kubernetes.yaml")
    assert [one["kind"] for one in found] == ["Job", "PodDisruptionBudget", "PersistentVolumeClaim"]
    for one in found:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_kubernetes_accepts_the_pods_of_the_ray_job():
    """KubeRay's own part is not among Kubernetes' schemas."""
    [job] = documents("ray-job.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) == 2
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


# --- What they say of rococap ----------------------------------------------------------------------------------


def test_the_ray_job_asks_for_as_many_gpus_as_it_has():
    [job] = documents("ray-job.yaml")
    program, group, name, *options = shlex.split(job["spec"]["entrypoint"])
    assert (program, group, name) == ("rococap", "launch", "ray")
    parent = cli.make_context("rococap", [group])  # without it, click would remember other names of --help
    params = cli.commands[group].commands[name].make_context(name, options, parent).params
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert params["gpus"] == workers["replicas"] == workers["maxReplicas"] == 8
    assert params["address"] == "auto"


def test_versions_are_those_of_the_package():
    texts = [(DEPLOY / name).read_text() for name in ("kubernetes.yaml", "ray-job.yaml")]
    assert set(re.findall(r"/rococap(?:-ray)?:(\S+)", "\n".join(texts))) == {__version__}
    [pinned] = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert documents("ray-job.yaml")[0]["spec"]["rayClusterSpec"]["rayVersion"] == pinned


def test_the_image_gets_all_that_is_copied_and_extras_that_exist():
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert set(copied) == kept
    assert all((ROOT / name).exists() for name in copied)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [named] = re.findall(r"'\.\[(\S+)\]'", text)
    assert {"postgres", "ray", "web"} == set(named.split(",")) <= extras.keys()  # web is for serve.yaml


# --- What runs in a container ----------------------------------------------------------------------------------


@pytest.fixture
def world(url, tmp_path) -> Iterator[World]:
    with made(url, tmp_path) as world:
        yield world


@pytest.fixture
def pod(world, tmp_path) -> list[str]:
    """The command of the Job's pod, with workers that have the small engine."""
    program = tmp_path / "rococap"
    parts = [world.url, ["cpu"], {"step_sec": 0.2}, {"batch_size": 4}]
    crew = shlex.join([sys.executable, str(TESTS / "small_crew.py"), "crew", *map(json.dumps, parts)])
    program.write_text(f"#!/bin/sh\nexec {crew}\n")
    program.chmod(0o755)
    [container] = documents("kubernetes.yaml")[0]["spec"]["template"]["spec"]["containers"]
    return ["env", f"PATH={tmp_path}:{os.environ['PATH']}", *container["command"], *container["args"]]


def is_healthy(world: World) -> bool:
    environment = {"ROCOCAP_DB": world.url, "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
    check = [sys.executable, str(DEPLOY / "health.py")]
    return subprocess.run(check, env=os.environ | environment, timeout=60).returncode == 0


@pytest.mark.slow
def test_a_pod_is_healthy_until_it_is_evicted_and_then_drains_and_does_not_count_as_finished(pod, world):
    world.fill(1_200)
    with running(*pod) as process:
        until(lambda: world.n_done() > 0, "it works")
        assert is_healthy(world)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert not is_healthy(world)
    assert process.returncode == 143, err
    assert json.loads(out)["outcome"]["drained"]
    assert world.statuses().keys() == {"done", "pending"}


@pytest.mark.slow
def test_a_pod_that_has_nothing_left_to_do_is_finished(pod, world):
    world.fill(8)
    with running(*pod) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert world.statuses() == {"done": 8}


@pytest.mark.slow
def test_a_pod_whose_worker_fails_ends_with_its_code(pod):
    with running(*pod) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Nothing is registered here yet" in err
