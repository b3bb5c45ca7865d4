"""Many steps on changing shapes: no memory is lost, neither MLX's nor the process's."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import psutil
import pytest
from arrays import Tensors, make_tensors
from tables import DTYPES, LAYOUTS

from mlx_adadelta import AdaDelta, adadelta_update
from mlx_adadelta.backend import Backend

SHAPES = ((), (1,), (7,), (1023,), (3, 5), (65, 33), (129, 257), (3, 31, 33), (2, 0, 5))


def make_bases() -> list[Tensors]:
    """Tensors of every shape, with types and layouts in turn."""
    layouts = list(LAYOUTS)
    return [
        make_tensors(
            shape,
            DTYPES[i % len(DTYPES)],
            ("same", layouts[i % len(layouts)], "same", layouts[i // 2 % len(layouts)]),
            seed=i,
        )
        for i, shape in enumerate(SHAPES * 4)
    ]


def take_steps(
    backend: Backend, bases: list[Tensors], rng: np.random.Generator, count: int
) -> None:
    """Steps over one to five tensors with all sorts of options, now and then held."""
    held = None
    for i in range(count):
        chosen = [bases[j] for j in rng.integers(len(bases), size=rng.integers(1, 6))]
        g = [t.g for t in chosen]
        w, v, u = ([mx.array(getattr(t, k)) for t in chosen] for k in "wvu")
        options = {
            "weight_decay": 0.01 * (i % 2),
            "gradient_scale": 0.5 if i % 3 == 0 else None,
            "skip": mx.array(i % 7 == 0) if i % 5 == 0 else None,
        }
        if i % 4 == 0:
            parameters = {"w": w, "more": [{"b": w[0]}]}
            optimizer = AdaDelta(lambda step: 1 / (1 + step), backend=backend)
            for _ in range(2):
                parameters = optimizer.apply_gradients(
                    {"w": g, "more": [{"b": g[0]}]}, parameters
                )
                mx.eval(parameters, optimizer.state)
        else:
            held = (w, v, u) if i % 4 == 1 else None
            new = adadelta_update(w, g, v, u, 0.5, **options, backend=backend)
            mx.eval(new)
    del held


def check_flat(backend: Backend, steps: int, most_growth: int) -> None:
    bases, rng = make_bases(), np.random.default_rng(0)
    limit = mx.set_cache_limit(0)
    try:
        # The allocator and the threads' own memory have found their size by then.
        take_steps(backend, bases, rng, max(200, steps // 5))
        gc.collect()
        mx.synchronize()
        resident, active = psutil.Process().memory_info().rss, mx.get_active_memory()
        take_steps(backend, bases, rng, steps)
        gc.collect()
        mx.synchronize()
        assert mx.get_active_memory() == active
        growth = psutil.Process().memory_info().rss - resident
        print(f"{backend}: {steps} steps, resident memory {growth / 1024:+.0f} KiB")
        assert growth <= most_growth
    finally:
        mx.set_cache_limit(limit)


def test_memory_is_flat(backend: Backend) -> None:
    check_flat(backend, 300, 8 << 20)


@pytest.mark.long
def test_memory_is_flat_over_10_000_steps(backend: Backend) -> None:
    check_flat(backend, 10_000, 2 << 20)
