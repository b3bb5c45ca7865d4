"""The update rule in float64 NumPy: what every result is held against."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def adadelta_step(
    w: ArrayLike,
    g: ArrayLike,
    v: ArrayLike,
    u: ArrayLike,
    lr: float,
    rho: float,
    eps: float,
) -> tuple[Float64, Float64, Float64]:
    """One step of Zeiler 2012, algorithm 1; returns the new w, v and u."""
    w, g, v, u = (np.asarray(x, np.float64) for x in (w, g, v, u))
    v = rho * v + (1 - rho) * g * g
    d = np.sqrt(u + eps) / np.sqrt(v + eps) * g
    u = rho * u + (1 - rho) * d * d
    return w - lr * d, v, u
