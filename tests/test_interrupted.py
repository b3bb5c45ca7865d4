"""A trainer that is killed while it saves, or interrupted in the middle of a step.

Both run in processes of their own, which say on stdout how far they are.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

STEPS = 60

TRAINER = """
import os, sys
from pathlib import Path
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_adadelta import AdaDelta

mx.set_default_device(mx.cpu)
checkpoint, steps = Path(sys.argv[1]), int(sys.argv[2])
mx.random.seed(0)
model = nn.Sequential(nn.Linear(40, 300), nn.relu, nn.Linear(300, 1))
optimizer = AdaDelta(lambda step: 1.0 / (1.0 + 0.1 * step))
optimizer.init(model.trainable_parameters())
inputs = mx.random.normal((STEPS_MAX, 8, 40), key=mx.random.key(1))
loss = nn.value_and_grad(model, lambda x: mx.square(model(x) - 1).mean())

if checkpoint.exists():
    tree = tree_unflatten(list(mx.load(str(checkpoint)).items()))
    model.update(tree["model"])
    optimizer.state = tree["optimizer"]

def save():
    part = checkpoint.with_name("part.safetensors")
    tree = {"model": model.trainable_parameters(), "optimizer": optimizer.state}
    mx.save_safetensors(str(part), dict(tree_flatten(tree)))
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, checkpoint)

print("loaded", flush=True)
while int(optimizer.step) < steps:
    _, gradients = loss(inputs[int(optimizer.step)])
    optimizer.update(model, gradients)
    mx.eval(model.state, optimizer.state)
    print("saving", flush=True)
    save()
    print("saved", flush=True)
""".replace("STEPS_MAX", str(STEPS))


@contextmanager
def trainer(checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", TRAINER, str(checkpoint), str(STEPS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.mark.parametrize(
    "kills", [3, pytest.param(20, marks=pytest.mark.long)], ids=str
)
def test_killed_while_saving_it_ends_as_if_it_never_was(
    tmp_path: Path, kills: int
) -> None:
    never, often = tmp_path / "never.safetensors", tmp_path / "often.safetensors"
    with trainer(never) as process:
        process.communicate()
    assert process.returncode == 0

    choose = random.Random(kills)
    for _ in range(kills):
        with trainer(often) as process:
            assert process.stdout is not None
            # 1 line when loaded, 2 a step: an even count ends at "saving".
            for _ in range(2 * choose.randint(1, STEPS // kills)):
                line = process.stdout.readline()
            assert line in ("saving\n", "")  # the last run may have come to its end
            for _ in range(choose.randint(0, 20_000)):
                pass  # somewhere between the first byte and the next step
            process.kill()
        assert process.returncode in (-signal.SIGKILL, 0)

    with trainer(often) as process:
        process.communicate()
    assert process.returncode == 0
    expected, got = mx.load(str(never)), mx.load(str(often))
    assert got.keys() == expected.keys()
    assert got["optimizer.step"].item() == STEPS
    for name, x in expected.items():
        np.testing.assert_array_equal(np.array(got[name]), np.array(x), err_msg=name)


INTERRUPTED = """
import mlx.core as mx
import numpy as np
from mlx_adadelta import AdaDelta

mx.set_default_device(mx.cpu)

def train(steps):
    mx.random.seed(0)
    w = {f"w{i}": mx.random.normal((64, 65)) for i in range(50)}
    optimizer = AdaDelta(1.0)
    for _ in range(steps):
        w = optimizer.apply_gradients(w, w)
        mx.eval(w, optimizer.state)
        print("step", flush=True)
    return [np.array(x) for x in w.values()]

expected = train(3)
try:
    train(10**9)
except KeyboardInterrupt:
    print("interrupted", flush=True)
for got, want in zip(train(3), expected, strict=True):
    np.testing.assert_array_equal(got, want)
print("usable", flush=True)
"""


def test_ctrl_c_in_the_middle_of_a_step() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(10):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    lines = said.splitlines()
    assert process.returncode == 0
    assert lines.count("interrupted") == 1
    assert lines[-1] == "usable"
