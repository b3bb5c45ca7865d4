"""The update rule in float64 NumPy: what every result is held against."""

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
    *,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    gradient_scale: float = 1.0,
) -> tuple[Float64, Float64, Float64]:
    """One step of Zeiler 2012, algorithm 1; returns the new w, v and u."""
    w, g, v, u = (np.asarray(x, np.float64) for x in (w, g, v, u))
    g = gradient_scale * (-g if maximize else g)
    if weight_decay and decoupled_weight_decay:
        w = w - lr * weight_decay * w
    elif weight_decay:
        g = g + weight_decay * w
    v = rho * v + (1 - rho) * g * g
    d = np.sqrt(u + eps) / np.sqrt(v + eps) * g
    u = rho * u + (1 - rho) * d * d
    return w - lr * d, v, u
