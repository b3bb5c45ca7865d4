"""``python -m mlx_adadelta``: versions, backends, and a one-second self check."""

import platform
import signal
import sys

import mlx.core as mx
import mlx.optimizers

from . import __version__, adadelta_update, backends
from .backend import REMEDY, Backend, extension, has_native, missing
from .options import MLX_VERSION


def _self_check(backend: Backend) -> bool:
    """Ten steps of one parameter against stock, which shares no code with this."""
    stock = mlx.optimizers.AdaDelta(1.0)
    w, g = mx.ones((1000,)), mx.full((1000,), 0.3)
    state: dict[str, mx.array] = {}
    stock.init_single(w, state)
    ours = w, state["v"], state["u"]
    for _ in range(10):
        w = stock.apply_single(g, w, state)
        ours = adadelta_update(ours[0], g, *ours[1:], 1.0, backend=backend)
    right = w, state["v"], state["u"]
    return all(
        mx.allclose(x, y, rtol=1e-5, atol=0).item()
        for x, y in zip(ours, right, strict=True)
    )


def main() -> int:
    print(f"mlx-adadelta {__version__}, mlx {MLX_VERSION}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    healthy = True
    backend: Backend
    for backend in ("metal", "cpu", "mlx"):
        verdict = f"not usable: {missing(backend)}"
        if backend in backends():
            right = _self_check(backend)
            healthy &= right
            verdict = "works" if right else "WRONG RESULTS"
            if backend == "metal" and not has_native(backend):
                verdict += " through mx.fast.metal_kernel; results take new memory"
        print(f"  {backend:5}  {verdict}")
    if extension is None:
        print(REMEDY)
    return 0 if healthy else 1


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head -1` ends it without a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
