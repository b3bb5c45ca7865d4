"""Ctrl-C at any line: nothing is half done, and the process goes on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checks import assert_same_bits
from mlx.utils import tree_flatten

import mlx_adadelta
from mlx_adadelta import AdaDelta
from mlx_adadelta.backend import Backend

PACKAGE = str(Path(mlx_adadelta.__file__).parent)


@contextmanager
def interrupt_at(line: int) -> Iterator[None]:
    """Ctrl-C before the n-th line that the package executes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        count += event == "line"
        if count == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(tracer)


def tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    w, b = (mx.array(rng.normal(size=n).astype(np.float32)) for n in (3, 4))
    return {"layers": [{"w": w}], "b": b}


@pytest.mark.parametrize("done", [0, 1], ids=["first step", "second step"])
@pytest.mark.parametrize("backend", ["auto", "mlx"])
def test_interrupted_anywhere(backend: Backend, done: int) -> None:
    """While the step counts as not taken nothing has changed; it can be repeated."""

    def train(steps: int) -> tuple[AdaDelta, dict[str, Any]]:
        optimizer, parameters = AdaDelta(lambda step: 1 / (1 + step)), tree(0)
        optimizer.backend = backend
        for i in range(steps):
            parameters = optimizer.apply_gradients(tree(i + 1), parameters)
        mx.eval(parameters, optimizer.state)
        return optimizer, parameters

    expected = train(done + 1)
    repeated = 0
    line = 0
    interrupted = True
    while interrupted:
        line += 1
        optimizer, parameters = train(done)
        interrupted = False
        try:
            with interrupt_at(line):
                new = optimizer.apply_gradients(tree(done + 1), parameters)
        except KeyboardInterrupt:
            interrupted = True
            if optimizer.step.item() == done:
                repeated += 1
                new = optimizer.apply_gradients(tree(done + 1), parameters)
            else:  # in the midst of taking over the new state
                optimizer.apply_gradients(tree(done + 2), parameters)
                mx.eval(optimizer.state)
                continue
        for (path, x), (_, y) in zip(
            tree_flatten([new, optimizer.state]),
            tree_flatten([expected[1], expected[0].state]),
            strict=True,
        ):
            assert_same_bits(x, y, f"{path}, line {line}")
    assert repeated > 50  # of some 100 lines
