"""The update in pure MLX operations: backend "mlx", and the reference."""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from threading import current_thread, main_thread
from typing import Any

import mlx.core as mx

from .options import (
    MLX_RELEASE,
    Options,
    Path,
    Updated,
    check_tensors,
)

# Outputs of 16 bits are rounded stochastically.
HALVES = (mx.float16, mx.bfloat16)


# ----------------------------- Stochastic rounding ----------------------------


def philox(counter: list[mx.array], key: tuple[int, int]) -> list[mx.array]:
    """Philox4x32-10 (Salmon et al., SC11) on four uint32 arrays."""
    c0, c1, c2, c3 = mx.broadcast_arrays(*counter)
    # Both halves of a round in one operation, and little for mx.compile to fuse:
    # word by word, compiling takes it a minute.
    even, odd = mx.stack([c0, c2], axis=-1), mx.stack([c1, c3], axis=-1)
    factors = mx.array([0xD2511F53, 0xCD9E8D57], mx.uint64)
    for i in range(10):
        steps = (key[0] + i * 0x9E3779B9, key[1] + i * 0xBB67AE85)
        keys = mx.array([k & 0xFFFFFFFF for k in steps], mx.uint32)
        product = even.astype(mx.uint64) * factors
        even = (product >> 32).astype(mx.uint32)[..., ::-1] ^ odd ^ keys
        odd = product.astype(mx.uint32)[..., ::-1]
    return [even[..., 0], odd[..., 0], even[..., 1], odd[..., 1]]


def random_keys(tensors: mx.array, seed: int, step: mx.array) -> list[mx.array]:
    """The keys for w, v, u and the place, of tensors by their indices (uint32)."""
    step = step.astype(mx.uint64)
    low, high = step.astype(mx.uint32), (step >> 32).astype(mx.uint32)
    counter = [low, high, tensors, mx.array(0, mx.uint32)]
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def places(shape: tuple[int, ...]) -> mx.array:
    """Each element's row-major index, in 32 bits where they hold it.

    Operations see no strides. The native kernels, which do, take the place in
    memory: the same wherever the parameter is row-contiguous or is copied to be so.
    """
    # Axis by axis: one arange ends at 2^31.
    place = mx.array(0, mx.uint64 if math.prod(shape) > 2**32 else mx.uint32)
    for length in shape:
        place = place[..., None] * length + mx.arange(length, dtype=place.dtype)
    return place


def random_bits(keys: list[mx.array], place: mx.array) -> list[mx.array]:
    """The random bits for each element's w, v and u.

    A function of what is given alone: metal/rounding.h says why these constants.
    """
    *keys, key = keys
    if place.dtype == mx.uint64:
        key = key + (place >> 32).astype(mx.uint32) * 0x85EBCA6B
        place = place.astype(mx.uint32)
    hashed = (place ^ key) * 0x9E3779B9
    hashed = hashed ^ (hashed >> 15)
    factors = (0xD1B54A33, 0xABC98389, 0x8CB92BA7)
    return [k + hashed * f for k, f in zip(keys, factors, strict=True)]


def round_stochastically(x: mx.array, dtype: mx.Dtype, random: mx.array) -> mx.array:
    """Rounds float32 to 16 bits, up with the probability of what is cut off."""
    bits = x.view(mx.uint32)
    magnitude = bits & 0x7FFFFFFF
    if dtype == mx.bfloat16:
        rounded = (bits + (random >> 16)) >> 16
        rounded = mx.where(magnitude > 0x7F800000, 0x7FC0, rounded)
    else:
        limit = 0x38800000  # 2^-14: below it, subnormal
        # In units of 2^-24, the spacing of float16's subnormal numbers.
        units = mx.where(magnitude < limit, mx.abs(x), 2.0**-14) * 2.0**24
        whole = units.astype(mx.uint32)
        odds = ((units - whole) * 2.0**31).astype(mx.uint32)
        above = (magnitude - mx.minimum(magnitude, limit) + (random >> 19)) >> 13
        rounded = mx.minimum(whole + ((random >> 1) < odds) + above, 0x7C00)
        quiet = mx.where(magnitude > 0x7F800000, 0x0200, 0)
        rounded = rounded | quiet | ((bits >> 16) & 0x8000)
    return rounded.astype(mx.uint16).view(dtype)


# --------------------------------- The update ---------------------------------


def update_one(
    tensors: tuple[mx.array, ...],
    scalars: tuple[mx.array, mx.array | None, mx.array | None],
    numbers: tuple[mx.array, ...],
    random: tuple[list[mx.array], mx.array] | None,
    decays: str | None,
    maximize: bool,
) -> list[mx.array]:
    """The new w, v and u of one parameter: Zeiler 2012 (arXiv:1212.5701), algorithm 1.

    Args:
        tensors (tuple): w, g, v and u.
        scalars (tuple): The learning rate, the gradient's scale and whether to
            skip; the latter two may be None.
        numbers (tuple): rho, 1 - rho, eps and the weight decay.
        random (tuple): The keys and places to round 16 bits with, or None.
        decays (str): ``"coupled"``, ``"decoupled"`` or None.
        maximize (bool): Whether to ascend.
    """
    rho, one_minus_rho, eps, decay = numbers
    w, g, v, u = (x.astype(rho.dtype) for x in tensors)
    lr, scale, skip = scalars
    lr = lr.astype(rho.dtype)
    if scale is not None:
        g = scale.astype(rho.dtype) * g
    if maximize:
        g = -g
    if decays == "decoupled":
        w = w - lr * decay * w
    elif decays == "coupled":
        g = g + decay * w
    v = rho * v + one_minus_rho * mx.square(g)
    d = mx.sqrt(u + eps) / mx.sqrt(v + eps) * g
    u = rho * u + one_minus_rho * mx.square(d)
    news = [w - lr * d, v, u]
    words = [None] * 3 if random is None else random_bits(*random)
    olds = tensors[0], *tensors[2:]
    for i, (old, new, word) in enumerate(zip(olds, news, words, strict=True)):
        if word is not None and old.dtype in HALVES:
            news[i] = round_stochastically(new, old.dtype, word)
        else:
            news[i] = new.astype(old.dtype)
        if skip is not None:
            news[i] = mx.where(skip, old, news[i])
    return news


# MLX builds kernels once a set of types and choices, and traces once a shape:
# shapeless it needs a kernel more. Within another trace it inlines all of it.
compiled = mx.compile(update_one)


@lru_cache(maxsize=64)
def arrays(numbers: tuple[float, ...], dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """Arrays, so that another rho, eps or decay compiles nothing anew."""
    return tuple(mx.array(x, dtype) for x in numbers)


@cache
def compiles_exactly(device: mx.DeviceType) -> bool:
    """Whether compiled operations give the bits of plain ones, tried once.

    MLX before 0.32.3 compiles some 16-bit updates to wrong results. On a CPU MLX
    calls g++, which may be missing, and which contracts a*b+c on ARM. On a GPU
    they are compiled in any case: results there have a tolerance.
    """
    if MLX_RELEASE < (0, 32, 3):
        return False
    if device == mx.gpu:
        return True
    x = mx.array(1 + 2**-12)
    try:
        return bool(mx.compile(lambda x, y: x * x - y)(x, x * x).item() == 0)
    except RuntimeError:
        return False


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
    stream: Any,
    kernel: Callable[..., list[mx.array] | None] | None = None,
) -> Updated:
    """The update of a list of parameters, with the signature of the extension.

    The arithmetic is float32 (float64 for a float64 parameter); each result is
    rounded once, to the type of its input or to ``options.state_dtype``. ``kernel``
    may compute it in place of these operations, or return None.
    """
    lists = parameters, gradients, v, u
    check_tensors(path, lists, options)
    numbers = options.rho, 1 - options.rho, options.eps, options.weight_decay
    scalars = learning_rate, gradient_scale, skip
    maximize = options.maximize
    kind = "decoupled" if options.decoupled_weight_decay else "coupled"
    new = []
    with mx.stream(stream):
        if step is not None:  # where it rounds stochastically
            indices = mx.arange(len(parameters), dtype=mx.uint32)
            keys = random_keys(indices, options.seed, step)
        # MLX may end the process where another thread has called a compiled function.
        in_main = current_thread() is main_thread()
        exact = in_main and compiles_exactly(mx.default_device().type)
        plain = compiled if exact else update_one
        for i, (w, g, *state) in enumerate(zip(*lists, strict=True)):
            tensors = w, g, *(x.astype(options.state_dtype or x.dtype) for x in state)
            decay = options.weight_decay > 0 and (not decays or decays[i])
            own = kind if decay else None
            results = None
            if kernel is not None:
                seeds = None if step is None else (options.seed, step, i)
                results = kernel(tensors, scalars, numbers, seeds, own, maximize)
            if results is None:
                random = None
                if step is not None:
                    random = [key[i] for key in keys], places(w.shape)
                dtype = mx.float64 if w.dtype == mx.float64 else mx.float32
                given = arrays(numbers, dtype)
                results = plain(tensors, scalars, given, random, own, maximize)
            new.append(results)
    new_w, new_v, new_u = ([results[i] for results in new] for i in range(3))
    return new_w, new_v, new_u


# --------------------------------- Gradients ----------------------------------


def norm(gradients: list[mx.array], *, stream: Any) -> mx.array:
    """The global norm, in float32."""
    with mx.stream(stream):
        squares = [mx.square(g.astype(mx.float32)).sum() for g in gradients]
        return mx.sqrt(sum(squares, start=mx.array(0.0)))


def nonfinite(gradients: list[mx.array], *, stream: Any) -> mx.array:
    """Whether any gradient holds an infinity or a NaN."""
    # The largest magnitude is a NaN where there is any.
    with mx.stream(stream):
        finite = [mx.isfinite(mx.abs(g).max()) for g in gradients if g.size > 0]
        return mx.logical_not(mx.stack(finite).all()) if finite else mx.array(False)
