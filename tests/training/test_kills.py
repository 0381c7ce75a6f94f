"""A training that is killed continues, and ends with the weights of one that was left alone, bit for bit."""

import json
import subprocess
import sys

import pytest
from places import TESTS
from training_steps import QUICK, adapter, are_equal, ready, train

from rococap.training.checkpoints import Checkpoints

KILLED = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import training_steps
from rococap.training import checkpoints, trainer

def die():
    os.kill(os.getpid(), signal.SIGKILL)

moment, url, output, changes = *sys.argv[2:5], json.loads(sys.argv[5])
if moment == "step":
    original = trainer.Trainer.training_step
    def step(self, *args):
        if self.state.global_step == 4:
            die()
        return original(self, *args)
    trainer.Trainer.training_step = step
elif moment == "save":
    original = trainer.save_file
    def save_file(tensors, path):
        original(tensors, path)
        if "checkpoint-4" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    trainer.save_file = save_file
elif moment == "staged":
    original = checkpoints._sync
    def sync(folder):
        original(folder)
        if checkpoints._SYNCED == 1:
            die()
        checkpoints._SYNCED += 1
    checkpoints._SYNCED = 0
    checkpoints._sync = sync
training_steps.train_at(url, output, changes)
"""


def killed(moment, url, output, **changes):
    """Trains in a process that kills itself at a moment; 9 is SIGKILL."""
    parts = (str(TESTS), moment, url, str(output), json.dumps(changes))
    done = subprocess.run([sys.executable, "-c", KILLED, *parts], capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr[-2_000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "changes"),
    [
        ("step", {"save_every": 3}),  # in the middle of an epoch of four steps
        ("save", {}),
        ("staged", {"accumulate": 2}),
    ],
)
def test_after_a_kill_the_weights_are_those_of_an_undisturbed_training(engine, url, tmp_path, moment, changes):
    ready(engine, tmp_path)
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "killed"
    train(engine, undisturbed, **changes)
    killed(moment, url, output, **changes)
    before = Checkpoints(output, 2).latest()
    assert before == (3 if moment == "step" else 2)
    seen = []
    train(engine, output, seen.append, **changes)
    assert seen[0].step == before + 1
    assert are_equal(adapter(output), adapter(undisturbed))
    logged = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged] == list(range(1, QUICK["max_steps"] + 1))
