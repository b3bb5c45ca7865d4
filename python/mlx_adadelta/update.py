"""The update as a function: checks its arguments and hands them to a backend."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx

from .backend import Backend, choose
from .options import (
    Options,
    Path,
    StreamOrDevice,
    Tensors,
    Updated,
    check,
    check_lengths,
    check_scalar,
    to_optional_scalar,
    to_scalar,
)

# All arguments are arrays or all are lists, and so are the results.
Arrays = TypeVar("Arrays", mx.array, list[mx.array], Sequence[mx.array])


def adadelta_update(
    parameters: Arrays,
    gradients: Arrays,
    v: Arrays,
    u: Arrays,
    learning_rate: float | mx.array,
    rho: float = 0.9,
    eps: float = 1e-6,
    *,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    decay_filter: Callable[[str, mx.array], bool] | None = None,
    maximize: bool = False,
    state_dtype: mx.Dtype | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    step: int | mx.array = 0,
    gradient_scale: float | mx.array | None = None,
    skip: bool | mx.array | None = None,
    backend: Backend = "auto",
    stream: StreamOrDevice = None,
) -> tuple[Arrays, Arrays, Arrays]:
    """One AdaDelta step on arrays. :class:`AdaDelta` has the rule and the options.

    The arguments keep their values. ``mx.compile``, and without stochastic
    rounding ``mx.vmap`` and derivatives, see through it. Where no extension fits
    MLX, ``mx.vmap`` and shapeless ``mx.compile`` need backend ``"mlx"`` on a GPU.

    Args:
        parameters, gradients, v, u (array or list(array)): Of one shape. Each is
            float32, float16 or bfloat16, on the CPU with ``"mlx"`` also float64.
        decay_filter (callable, optional): Its path is the place in the list,
            ``"[0]"``; empty for a single array.
        step (int or array, optional): Seeds the random bits, with ``seed`` and the
            place in the list. Default: ``0``
        gradient_scale, skip (optional): As in :meth:`AdaDelta.update`.
        stream (Stream or Device, optional): Where to run.

    Returns:
        tuple: New parameters, v and u of the old shapes and types, laid out as w is.
    """
    single = isinstance(parameters, mx.array)
    tensors: Any = [[x] if single else list(x) for x in (parameters, gradients, v, u)]
    check_lengths(tensors)
    new: Any = update_tensors(
        tensors,
        to_scalar("learning_rate", learning_rate),
        Options(
            *(rho, eps, weight_decay, decoupled_weight_decay, decay_filter),
            *(maximize, state_dtype, stochastic_rounding, seed, backend),
        ),
        path=(lambda _: "") if single else "[{}]".format,
        step=check_scalar("step", step)
        if isinstance(step, mx.array)
        else check("step", step),
        gradient_scale=to_optional_scalar("gradient_scale", gradient_scale),
        skip=to_optional_scalar("skip", skip),
        stream=stream,
    )
    return tuple(x[0] for x in new) if single else new


def update_tensors(
    tensors: Tensors,
    learning_rate: mx.array,
    options: Options,
    *,
    path: Path,
    step: int | mx.array,
    gradient_scale: mx.array | None = None,
    skip: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> Updated:
    """:func:`adadelta_update` on lists; the scalars and options are checked."""
    parameters = tensors[0]
    module, stream = choose(options.backend, stream, parameters)
    decays: list[bool] = []
    if options.decay_filter is not None:
        decays = [
            # The backend refuses anything but an array.
            isinstance(w, mx.array) and bool(options.decay_filter(path(i), w))
            for i, w in enumerate(parameters)
        ]
    new: Updated = module.adadelta_update(
        *tensors,
        learning_rate,
        options,
        path=path,
        decays=decays,
        # Rounding alone needs an array; a step allocates nothing else.
        step=mx.array(step, mx.uint64) if options.stochastic_rounding else None,
        gradient_scale=gradient_scale,
        skip=skip,
        stream=stream,
    )
    return new
