"""The update in pure MLX operations: backend "mlx", and the reference."""

from __future__ import annotations

import math
from contextlib import nullcontext

import mlx.core as mx

from .options import Options, Path, check_tensors


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
    v = rho * v + (1 - rho) * mx.square(g)
    d = mx.sqrt(u + eps) / mx.sqrt(v + eps) * g
    u = rho * u + (1 - rho) * mx.square(d)
    return w - lr * d, v, u


def philox(counter: list[mx.array], key: tuple[int, int]) -> list[mx.array]:
    """Philox4x32-10 (Salmon et al., SC11) on four uint32 arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a = c0.astype(mx.uint64) * mx.array(0xD2511F53, mx.uint64)
        b = c2.astype(mx.uint64) * mx.array(0xCD9E8D57, mx.uint64)
        c0 = (b >> 32).astype(mx.uint32) ^ c1 ^ mx.array(k0, mx.uint32)
        c2 = (a >> 32).astype(mx.uint32) ^ c3 ^ mx.array(k1, mx.uint32)
        c1 = b.astype(mx.uint32)
        c3 = a.astype(mx.uint32)
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def random_bits(
    shape: tuple[int, ...], tensor: int, seed: int, step: mx.array
) -> list[mx.array]:
    """The random bits for each element's w, v and u.

    A function of what is given alone: metal/rounding.h says why these
    constants. An element's place is its row-major index here, since operations
    see no strides. The native kernels, which do, take its place in memory: the
    same bits wherever the parameter is row-contiguous or is copied to be so.
    """
    step = step.astype(mx.uint64)
    *keys, key = philox(
        [
            step.astype(mx.uint32),
            (step >> 32).astype(mx.uint32),
            mx.array(tensor, mx.uint32),
            mx.array(0, mx.uint32),
        ],
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    # Axis by axis: one arange of them all ends at 2^31.
    large = math.prod(shape) > 2**32
    place = mx.array(0, mx.uint64 if large else mx.uint32)
    for length in shape:
        place = place[..., None] * length + mx.arange(length, dtype=place.dtype)
    if large:
        key = key + (place >> 32).astype(mx.uint32) * 0x85EBCA6B
    hashed = (place.astype(mx.uint32) ^ key) * 0x9E3779B9
    hashed = hashed ^ (hashed >> 15)
    factors = (0xD1B54A33, 0xABC98389, 0x8CB92BA7)
    return [k + hashed * f for k, f in zip(keys, factors, strict=True)]


def round_stochastically(x: mx.array, dtype: mx.Dtype, random: mx.array) -> mx.array:
    """Rounds float32 to 16 bits, up with the probability of what is cut off."""
    bits = x.view(mx.uint32)
    if dtype == mx.bfloat16:
        rounded = (bits + (random >> 16)) >> 16
    else:
        magnitude = bits & 0x7FFFFFFF
        normal = mx.minimum((magnitude + (random >> 19) - 0x38000000) >> 13, 0x7C00)
        # In units of 2^-24, the spacing of float16's subnormal numbers.
        units = mx.minimum(mx.abs(x), 2.0**-14) * 2.0**24
        whole = units.astype(mx.uint32)
        odds = ((units - whole) * 2.0**31).astype(mx.uint32)
        subnormal = whole + ((random >> 1) < odds)
        rounded = mx.where(magnitude < 0x38800000, subnormal, normal)
        rounded = rounded | ((bits >> 16) & 0x8000)
    stochastic = rounded.astype(mx.uint16).view(dtype)
    return mx.where(mx.isnan(x), x.astype(dtype), stochastic)


def adadelta_update(
    parameters: list[mx.array],
    gradients: list[mx.array],
    v: list[mx.array],
    u: list[mx.array],
    learning_rate: mx.array,
    options: Options,
    *,
    path: Path,
    decays: list[bool],
    step: mx.array | None,
    gradient_scale: mx.array | None,
    skip: mx.array | None,
    stream: mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None,
) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
    """The update of a list of parameters, with the signature of the extension.

    The arithmetic is float32 (float64 for a float64 parameter); each result is
    rounded once, to the type of its input or to ``options.state_dtype``.
    """
    check_tensors(path, parameters, gradients, v, u, options)
    new: tuple[list[mx.array], ...] = ([], [], [])
    with nullcontext() if stream is None else mx.stream(stream):
        for i, (old_w, old_g, *state) in enumerate(
            zip(parameters, gradients, v, u, strict=True)
        ):
            old_v, old_u = (x.astype(options.state_dtype or x.dtype) for x in state)
            compute = mx.float64 if old_w.dtype == mx.float64 else mx.float32
            w, g, v_i, u_i, lr = (
                x.astype(compute) for x in (old_w, old_g, old_v, old_u, learning_rate)
            )
            if gradient_scale is not None:
                g = gradient_scale.astype(compute) * g
            if options.maximize:
                g = -g
            decay = options.weight_decay if not decays or decays[i] else 0.0
            if decay and options.decoupled_weight_decay:
                w = w - lr * decay * w
            elif decay:
                g = g + decay * w
            results = adadelta_step(w, g, v_i, u_i, lr, options.rho, options.eps)

            if options.stochastic_rounding:
                now = mx.array(0) if step is None else step
                words = random_bits(w.shape, i, options.seed, now)
            for j, (old, result) in enumerate(
                zip((old_w, old_v, old_u), results, strict=True)
            ):
                if options.stochastic_rounding and old.dtype.size == 2:
                    rounded = round_stochastically(result, old.dtype, words[j])
                else:
                    rounded = result.astype(old.dtype)
                if skip is not None:
                    rounded = mx.where(skip, old, rounded)
                new[j].append(rounded)
    return new[0], new[1], new[2]
