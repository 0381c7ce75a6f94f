"""Two processes on the CPU, which accelerate starts, train as one does."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from places import ROOT
from samples import register, write_shard
from steps import refused
from training_steps import RECIPE, adapter, train

from rococap.training.checkpoints import Checkpoints

COMMANDS = """
import json, signal, sys
from torch import distributed
from rococap.cli import cli
from rococap.training import trainer
from rococap.training.processes import is_main

def step(self, *args, original=trainer.Trainer.training_step):
    if self.state.global_step == 2 and not is_main():
        signal.raise_signal(signal.SIGTERM)
    return original(self, *args)

distributed.destroy_process_group = lambda: None  # the next command needs it

for command in json.loads(sys.argv[1]):
    trainer.Trainer.training_step = step
    try:
        cli.main(command)
    except SystemExit as ended:
        print(f"exit code {ended.code}\\n", end="")  # in one piece: the other process prints, too
"""
"""Runs commands in turn. The second process alone gets a signal, in the third step of a training."""


def launched(*command):
    """Runs a command in two processes."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu")
    fixed = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *fixed, "--main_process_port", "0", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def options(url, output, **changes):
    quick = {"rank": 4, "alpha": 8, "lr": 1e-3, "dropout": 0.0, "batch_size": 2, "max_steps": 5}
    chosen = {"split": "train", "output": output, "device": "cpu"} | quick | changes
    named = [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["--db", url, "finetune", "--json", *named]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_learn_what_one_does_from_batches_of_twice_the_size(engine, url, tmp_path):
    """With captions of many lengths, a picture that only one of them finds to be broken, and a signal to only one."""
    texts = {n: "Original caption" + " of a picture" * (n * n % 7) + f" {n}." for n in range(8)}
    write_shard(tmp_path, "train", range(8), captions=texts, pictures={1: b"no picture"})
    write_shard(tmp_path, "test", range(8), pictures=dict.fromkeys(range(1, 7), b"no picture"))
    register(engine, tmp_path, ["train", "test"], recipe=RECIPE)
    one, two, unreadable = tmp_path / "one", tmp_path / "two", tmp_path / "unreadable"
    script = tmp_path / "commands.py"
    script.write_text(COMMANDS)
    train(engine, one, batch_size=4, max_steps=5, dropout=0.0)

    commands = [
        options(url, two),
        options(url, two, rank=8),
        options(url, unreadable, split="test", batch_size=1, max_steps=2),
    ]
    done = launched(str(script), json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3_000:]
    assert sorted(re.findall(r"exit code (\d)", done.stdout)) == ["0"] * 4 + ["1"] * 2
    assert done.stderr.count("holds another training (rank: 4, not 8)") == 1
    assert Checkpoints(two, 2).latest() == 3, "both have stopped after the step in which one was asked to"
    assert [entry["image_id"] for entry in lines(two / "skipped.jsonl")] == ["train_00001"], "of the second process"
    assert [entry["step"] for entry in lines(unreadable / "log.jsonl")] == [1, 2]
    assert {entry["code"] for entry in lines(unreadable / "skipped.jsonl")} == {"not_an_image"}
    assert "(processes: 2, not 1)" in refused(*options(url, two))

    done = launched("-m", "rococap", *options(url, two))
    assert done.returncode == 0, done.stderr[-3_000:]
    outcome = json.loads(done.stdout)
    assert (outcome["is_finished"], outcome["steps"], outcome["skipped"]) == (True, 5, {"not_an_image": 1})
    for name, weight in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], weight, rtol=1e-2, atol=2e-5)
