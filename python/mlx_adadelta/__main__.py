"""``python -m mlx_adadelta``: versions, backends, and a one-second self check."""

from __future__ import annotations

import math
import platform
import signal
import sys

import mlx.core as mx

from . import __version__, adadelta_update, backends
from .backend import MLX_VERSION, REMEDY, Backend, extension, why_not


def _self_check(backend: Backend) -> bool:
    """Ten steps of one parameter against the equations in Python's floats.

    They stand here once more to share no code with what they check.
    """
    g, rho, eps, lr = 0.3, 0.9, 1e-6, 1.0
    w, v, u = 1.0, 0.0, 0.0
    new_w, new_v, new_u = (mx.full((1000,), x) for x in (w, v, u))
    gradient = mx.full((1000,), g)
    for _ in range(10):
        v = rho * v + (1 - rho) * g * g
        d = math.sqrt(u + eps) / math.sqrt(v + eps) * g
        u = rho * u + (1 - rho) * d * d
        w -= lr * d
        new_w, new_v, new_u = adadelta_update(
            new_w, gradient, new_v, new_u, lr, rho, eps, backend=backend
        )
    return all(
        mx.allclose(x, mx.array(expected), rtol=1e-5, atol=0).item()
        for x, expected in ((new_w, w), (new_v, v), (new_u, u))
    )


def main() -> int:
    print(f"mlx-adadelta {__version__}, mlx {MLX_VERSION}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    healthy = True
    backend: Backend
    for backend in ("metal", "cpu", "mlx"):
        verdict = f"not usable: {why_not or 'MLX has no Metal device here'}"
        if backend in backends():
            right = _self_check(backend)
            healthy &= right
            verdict = "works" if right else "WRONG RESULTS"
        print(f"  {backend:5}  {verdict}")
    if extension is None:
        print(REMEDY)
    return 0 if healthy else 1


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head -1` ends it without a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
