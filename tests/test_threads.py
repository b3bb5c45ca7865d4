"""Threads, processes and copies of an optimizer."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_adadelta import AdaDelta

LARGE = 1 << 18  # elements: enough for a second thread of the native kernel


def train(seed: int) -> list[np.ndarray]:
    """Some steps on arrays made by the calling thread."""
    random = np.random.default_rng(seed)
    shapes = [(65, 33)] * 10 + [(LARGE,)]
    w = {str(i): mx.array(random.normal(size=x)) for i, x in enumerate(shapes)}
    gradients = {name: mx.array(random.normal(size=x.shape)) for name, x in w.items()}
    optimizer = AdaDelta(1.0)
    for _ in range(5):
        w = optimizer.apply_gradients(gradients, w)
        mx.eval(w, optimizer.state)
    flat = [*w.values(), *(optimizer.state[name]["u"] for name in w)]
    return [np.array(x) for x in flat]


def assert_equal(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_two_optimizers_in_two_threads() -> None:
    found: dict[int, list[np.ndarray]] = {}
    together = threading.Barrier(2)

    def run(seed: int) -> None:
        together.wait()
        found[seed] = train(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        assert_equal(found[seed], train(seed))


SHARED = """
import threading
import mlx.core as mx
import numpy as np
from mlx_adadelta import AdaDelta

mx.set_default_device(mx.cpu)
w = {str(i): mx.ones((65, 33)) for i in range(20)}
optimizer = AdaDelta(1.0)
optimizer.init(w)
mx.eval(w, optimizer.state)

def step():
    try:
        for _ in range(30):
            new = optimizer.apply_gradients(w, w)
            mx.eval(new, optimizer.state)
    except RuntimeError as error:
        # MLX's word on arrays of another thread.
        assert "in current thread" in str(error), error

threads = [threading.Thread(target=step) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()

# What is left can be used again from one thread.
optimizer = AdaDelta(1.0)
new = optimizer.apply_gradients(w, w)
g = np.float32(1)
v = np.float32(1 - 0.9) * g * g
d = np.sqrt(np.float32(1e-6)) / np.sqrt(v + np.float32(1e-6)) * g
assert np.allclose(np.array(new["0"]), 1 - d, rtol=1e-6)
"""


def test_one_optimizer_in_two_threads_is_an_error_not_a_crash() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_spawned_workers() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(train, (0, 1))
    for seed in (0, 1):
        assert_equal(found[seed], train(seed))


# A child of a process that has evaluated anything hangs in its own first
# evaluation, in MLX: what can be asked for is that we add nothing to that.
FORKED = """
import os, sys
import mlx.core as mx
from mlx_adadelta import AdaDelta

mx.set_default_device(mx.cpu)
w = {"w": mx.ones((1 << 18,))}
if sys.argv[1] == "evaluated":
    mx.eval(AdaDelta(1.0).apply_gradients(w, w))
child = os.fork()
if child == 0:
    w = {"w": mx.ones((1 << 18,))}
    optimizer = AdaDelta(1.0)
    new = optimizer.apply_gradients(w, w)
    if sys.argv[1] == "not evaluated":
        mx.eval(new, optimizer.state)
        assert abs(new["w"][-1].item() - (1 - 1e-3 / 0.1**0.5)) < 1e-5
    os._exit(0)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork is not for macOS")
@pytest.mark.parametrize("before", ["not evaluated", "evaluated"])
def test_after_fork(before: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, before],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("kind", [optim.AdaDelta, AdaDelta], ids=["stock", "ours"])
@pytest.mark.parametrize("how", [copy.deepcopy, pickled], ids=["copied", "pickled"])
def test_copies_are_independent_and_whole(
    kind: type, how: Callable[[Any], Any]
) -> None:
    w = {"a": mx.arange(1.0, 5.0)}
    first = kind(0.5, 0.8, 1e-4)
    new = first.apply_gradients(w, w)
    mx.eval(new, first.state)
    second = how(first)
    assert type(second) is kind
    for optimizer in (first, second):
        mx.eval(optimizer.apply_gradients(w, new), optimizer.state)
    assert second.step.item() == 2
    for name in ("v", "u"):
        got, want = (np.array(x.state["a"][name]) for x in (second, first))
        np.testing.assert_array_equal(got, want)
        second.state["a"][name] = mx.zeros((4,))
        assert np.array(first.state["a"][name]).all()


def test_our_options_are_copied() -> None:
    optimizer = AdaDelta(
        1.0, weight_decay=0.1, state_dtype=mx.float32, stochastic_rounding=True, seed=7
    )
    for other in (copy.deepcopy(optimizer), pickled(optimizer)):
        assert other.weight_decay == 0.1
        assert other.state_dtype == mx.float32
        assert other.stochastic_rounding
        assert other.seed == 7
