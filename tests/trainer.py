"""A trainer to be killed: python trainer.py FOLDER STEPS

Resumes from FOLDER/checkpoint.safetensors and saves it after every step, so that
there is a whole one at any time. Says on standard output what it has just done, and
goes on when it is told a line.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adadelta import AdaDelta


def say(event: str) -> None:
    print(event, flush=True)
    sys.stdin.readline()


def save(path: Path, tree: object) -> None:
    memory = io.BytesIO()
    mx.save_safetensors(memory, dict(tree_flatten(tree)))
    content = memory.getvalue()
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        say("half")
        file.write(content[len(content) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    say("written")
    os.replace(partial, path)
    say("replaced")


def train(folder: Path, steps: int) -> None:
    mx.set_default_device(mx.cpu)
    path = folder / "checkpoint.safetensors"
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.tanh, nn.Linear(16, 1))
    model.set_dtype(mx.bfloat16)
    # What is lost on the way would show: a schedule, and bits that depend on the step.
    optimizer = AdaDelta(lambda step: 1 / (1 + 0.1 * step), stochastic_rounding=True)
    if path.exists():
        tree = tree_unflatten(list(mx.load(str(path)).items()))
        model.update(tree["model"])
        optimizer.state = tree["optimizer"]
    loss = nn.value_and_grad(model, lambda x: (model(x) - x.sum(-1)).square().mean())
    while (step := optimizer.step.item()) < steps:
        mx.random.seed(step)
        _, gradients = loss(mx.random.normal((32, 8), mx.bfloat16))
        optimizer.update(model, gradients)
        mx.eval(model, optimizer.state)
        say("stepped")
        save(path, {"model": model.parameters(), "optimizer": optimizer.state})


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
