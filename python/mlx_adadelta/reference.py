"""The update in pure MLX operations: backend "mlx", and the reference."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx


def adadelta_step(
    w: mx.array,
    g: mx.array,
    v: mx.array,
    u: mx.array,
    lr: mx.array,
    rho: float,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """One step of Zeiler 2012 (arXiv:1212.5701), algorithm 1.

    The arithmetic is float32 (float64 for a float64 parameter); each result is
    rounded once, to the type of its input.

    Args:
        w (array): The parameter, of any shape.
        g (array): Its gradient, of the same shape.
        v (array): The running average of squared gradients.
        u (array): The running average of squared updates.
        lr (array): The learning rate, a scalar.
        rho (float): The decay of both averages.
        eps (float): Added to both averages under the root.

    Returns:
        tuple: The new w, v and u.
    """
    dtype = mx.float64 if w.dtype == mx.float64 else mx.float32
    types = w.dtype, v.dtype, u.dtype
    w, g, v, u, lr = (x.astype(dtype) for x in (w, g, v, u, lr))
    v = rho * v + (1 - rho) * mx.square(g)
    d = mx.sqrt(u + eps) / mx.sqrt(v + eps) * g
    u = rho * u + (1 - rho) * mx.square(d)
    w = w - lr * d
    return w.astype(types[0]), v.astype(types[1]), u.astype(types[2])


def adadelta_update(
    parameters: list[mx.array],
    gradients: list[mx.array],
    v: list[mx.array],
    u: list[mx.array],
    lr: mx.array,
    rho: float,
    eps: float,
    *,
    stream: mx.Stream | mx.Device | mx.DeviceType | None = None,
) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
    """:func:`adadelta_step` over lists, with the signature of the extension."""
    new: tuple[list[mx.array], ...] = ([], [], [])
    with nullcontext() if stream is None else mx.stream(stream):
        for tensors in zip(parameters, gradients, v, u, strict=True):
            for results, result in zip(
                new, adadelta_step(*tensors, lr, rho, eps), strict=True
            ):
                results.append(result)
    return new[0], new[1], new[2]
