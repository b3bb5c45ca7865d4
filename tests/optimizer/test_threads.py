"""Threads, processes, and copies of an optimizer."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from arrays import bits
from checks import assert_same_bits, assert_same_trees
from mlx.utils import tree_flatten
from models import decay
from numpy.typing import NDArray
from processes import run_python

from mlx_adadelta import AdaDelta, adadelta_update
from mlx_adadelta.backend import Backend
from mlx_adadelta.options import Options

Result = dict[str, NDArray[Any]]


def train(seed: int, backend: Backend = "auto", steps: int = 8) -> Result:
    """Everything made here, in the thread or process that calls; the final bits."""
    rng = np.random.default_rng(seed)

    # Large enough for two threads of the CPU kernel, turned and not.
    def matrix() -> mx.array:
        return mx.array(rng.normal(size=(520, 300)).astype(np.float32))

    optimizer = AdaDelta(lambda step: 1 / (1 + step), backend=backend)
    parameters = {"layers": [{"w": matrix()}, {"w": matrix()}]}
    for _ in range(steps):
        turned = mx.contiguous(matrix().T).T
        gradients = {"layers": [{"w": turned}, {"w": matrix()}]}
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    leaves: Any = tree_flatten([parameters, optimizer.state])
    return {path: bits(x) for path, x in leaves}


def assert_same(actual: Result, expected: Result) -> None:
    assert actual.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(actual[path], x, path)


def test_two_threads_with_two_models(backend: Backend) -> None:
    expected = [train(seed, backend, 3) for seed in range(2)]
    start = threading.Barrier(2)

    def work(seed: int) -> Result:
        start.wait()
        return train(seed, backend, 3)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    for got, want in zip(results, expected, strict=True):
        assert_same(got, want)


def test_state_of_another_thread_is_an_error_until_it_is_evaluated(
    native: Backend,
) -> None:
    """MLX's rule; afterwards all is as if the thread had never tried."""
    optimizer, alone = (AdaDelta(1.0, backend=native) for _ in range(2))
    one = {"w": mx.ones((300,))}
    parameters, expected = (o.apply_gradients(one, one) for o in (optimizer, alone))

    def work() -> None:
        gradients = {"w": mx.ones((300,))}
        mx.eval(optimizer.apply_gradients(gradients, parameters))

    state = dict(tree_flatten(optimizer.state))
    with ThreadPoolExecutor() as pool, pytest.raises(RuntimeError, match="Stream"):
        pool.submit(work).result()
    assert_same_trees(native, parameters, expected)
    for path, x in tree_flatten(alone.state):
        assert_same_trees(native, {path: state[path]}, {path: x})


SHARED = """
import sys, threading
import mlx.core as mx
from mlx_adadelta import AdaDelta
optimizer, lock = AdaDelta(1.0, backend=sys.argv[1]), threading.Lock()
model = {"w": mx.zeros((600, 500))}
optimizer.init(model)
mx.eval(model, optimizer.state)
def work():
    g = mx.ones((600, 500))
    mx.eval(g)
    for _ in range(100):
        with lock:
            new = optimizer.apply_gradients({"w": g}, model)
            mx.eval(new, optimizer.state)
            model.update(new)
threads = [threading.Thread(target=work) for _ in range(2)]
for t in threads: t.start()
for t in threads: t.join()
print(optimizer.step.item())
"""


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_a_model_shared_under_a_lock(backend: str) -> None:
    done = run_python("-c", SHARED, backend)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "200\n"


@pytest.mark.parametrize("when", ["evaluated", "scheduled", "lazy", "compiled"])
def test_helpers_wait_for_gradients(when: str) -> None:
    """Helper threads run ahead of the stream only where the inputs are computed."""
    rng = np.random.default_rng(0)
    draw = [mx.array(rng.normal(size=(64, 256)), mx.float32) for _ in range(41)]
    slow = mx.random.normal((700, 700)) * 1e-3
    w, zeros, bases = draw[0], mx.zeros((64, 256)), draw[1:]
    mx.eval(slow, zeros, draw)
    many, state = [w] * len(bases), [zeros] * len(bases)

    def update(gradients: list[mx.array]) -> list[mx.array]:
        new = adadelta_update(many, gradients, state, state, 1.0, backend="cpu")
        return [*new[0], *new[1], *new[2]]

    run = mx.compile(update) if when == "compiled" else update
    for _ in range(2):
        zero = mx.round((slow @ slow)[0, 0])
        gradients = [x + zero for x in bases]
        if when == "evaluated":
            mx.eval(gradients)
        elif when == "scheduled":
            mx.async_eval(gradients)
        actual = run(gradients)
        mx.eval(actual)
        for i, g in enumerate(bases):
            expected = adadelta_update(w, g, zeros, zeros, 1.0, backend="mlx")
            for x, y in zip(actual[i :: len(bases)], expected, strict=True):
                assert_same_bits(x, y)


def test_helpers_wait_where_compile_replays_an_update() -> None:
    """Under mx.grad evaluated gradients keep their graph, which mx.compile replays."""
    w, zeros = mx.ones((64, 256)), mx.zeros((64, 256))
    slow = mx.random.normal((700, 700)) * 1e-3
    mx.eval(slow, w, zeros)
    results: list[mx.array] = []

    def work(x: mx.array) -> mx.array:
        zero = mx.round((slow @ slow)[0, 0])
        gradients = [i * w + zero + 0 * x for i in range(40)]
        mx.eval(x, gradients)
        lists = [x] * 40, gradients, [zeros] * 40, [zeros] * 40
        _, v, _ = adadelta_update(*lists, 1.0, backend="cpu")
        replay = mx.compile(lambda y: [x + y for x in v])
        results.extend(replay(mx.zeros((64, 256))))
        mx.eval(results)
        return x.sum()

    mx.grad(work)(w)
    for i, x in enumerate(results):
        np.testing.assert_allclose(np.array(x), 0.1 * i**2, 1e-6)


# --------------------------------- Processes ----------------------------------


def test_spawned_workers() -> None:
    expected = [train(seed) for seed in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(train, range(2))
    for got, want in zip(results, expected, strict=True):
        assert_same(got, want)


FORK = """
import os, sys
import mlx.core as mx
from mlx_adadelta import AdaDelta, adadelta_update
x = [mx.ones((1 << 18,))]
if sys.argv[1] == "after work":  # streams and helper threads exist
    mx.eval(adadelta_update(x, x, x, x, 1.0, backend="cpu"))
child = os.fork()
if child == 0:
    optimizer = AdaDelta(1.0, backend="cpu")
    w = {"w": mx.zeros((1 << 18,))}
    optimizer.init(w)
    w = optimizer.apply_gradients({"w": mx.ones((1 << 18,))}, w)
    if sys.argv[1] == "at first":
        mx.eval(w, optimizer.state)
        assert optimizer.step.item() == 1 and mx.all(w["w"] < 0).item()
    sys.exit(0)
_, status = os.waitpid(child, 0)
new = adadelta_update(x, x, x, x, 1.0, backend="cpu")  # the parent goes on
mx.eval(new)
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("when", ["at first", "after work"])
def test_after_fork(when: str) -> None:
    """A child imports, constructs, builds and ends. Where nothing was evaluated
    before it also trains; else MLX hangs in it, as it does without us."""
    done = run_python("-c", FORK, when)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"


# ----------------------------------- Copies -----------------------------------


def unpickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("learning_rate", [0.5, decay], ids=["number", "schedule"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, unpickled])
def test_copies_are_what_stocks_are(
    backend: Backend, duplicate: Callable[[Any], Any], learning_rate: Any
) -> None:
    """Equal, complete and apart from the original."""
    results = []
    gradients = {"w": mx.ones((3, 2)), "more": [{"b": mx.ones((4,))}]}
    for kind in (AdaDelta, optim.AdaDelta):
        optimizer = kind(learning_rate, 0.8, 1e-5)
        if kind is AdaDelta:
            optimizer.backend = backend
        parameters = optimizer.apply_gradients(gradients, gradients)
        before = {path: mx.array(x) for path, x in tree_flatten(optimizer.state)}
        mx.eval(before)
        twin = duplicate(optimizer)
        assert type(twin) is kind
        mine = twin.apply_gradients(gradients, parameters)
        assert_same_trees("cpu", optimizer.state, dict(before))
        assert_same_trees("cpu", mine, optimizer.apply_gradients(gradients, parameters))
        assert_same_trees("cpu", twin.state, optimizer.state)
        results.append([mine, twin.state])
    assert_same_trees(backend, *results)


def test_copies_keep_the_options() -> None:
    optimizer = AdaDelta(
        *(1.0, 0.5, 1e-3),
        **{"weight_decay": 0.1, "maximize": True, "stochastic_rounding": True},
        **{"state_dtype": mx.float32, "seed": 7, "backend": "mlx"},
    )
    for twin in (copy.deepcopy(optimizer), unpickled(optimizer)):
        for option in dataclasses.fields(Options):
            kept, given = (getattr(x, option.name) for x in (twin, optimizer))
            assert kept == given, option.name
        assert twin.backend == "mlx"
