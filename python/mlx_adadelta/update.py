"""The update as a function: checks its arguments and hands them to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx

from .backend import Backend, StreamOrDevice, choose
from .options import (
    Options,
    Path,
    check_gradient_scale,
    check_learning_rate,
    check_skip,
    check_step,
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
    r"""One AdaDelta step on arrays: the rule and the options of :class:`AdaDelta`.

    The arithmetic is float32, rounded once to the type of each output. The
    arguments keep their values. ``mx.compile`` (also shapeless), ``mx.vmap``
    and derivatives see through it; without stochastic rounding, in the latter
    two.

    Args:
        parameters (array or list(array)): The parameters :math:`w`, of any
            shape, float32, float16 or bfloat16 (float64 on the CPU with the
            ``"mlx"`` backend, which computes it in float64).
        gradients (array or list(array)): Their gradients :math:`g`, of the
            same shapes, of any real floating point type.
        v (array or list(array)): The averages of squared gradients, likewise.
        u (array or list(array)): The averages of squared updates, likewise.
        learning_rate (float or array): The learning rate :math:`\lambda`, a
            scalar.
        rho (float, optional): As in :class:`AdaDelta`. Default: ``0.9``.
        eps (float, optional): Likewise. Default: ``1e-6``.
        weight_decay (float, optional): Likewise. Default: ``0.0``.
        decoupled_weight_decay (bool, optional): Likewise. Default: ``False``.
        decay_filter (callable, optional): Likewise; the path is the place in
            the list, ``"[0]"``, and empty for a single array. Default: all
            decay.
        maximize (bool, optional): Likewise. Default: ``False``.
        state_dtype (Dtype, optional): The type of the new v and u. Default:
            the types of the old ones.
        stochastic_rounding (bool, optional): As in :class:`AdaDelta`; an
            element's bits come from a key, Philox4x32-10 (Salmon et al., SC11)
            of the seed, the step and the parameter's index, and from its place
            in memory. Default: ``False``.
        seed (int, optional): The seed of the random bits. Default: ``0``.
        step (int or array, optional): The step they are of. Default: ``0``.
        gradient_scale (float or array, optional): A scalar every gradient is
            multiplied by first, see :func:`clip_scale`. Default: none.
        skip (bool or array, optional): A scalar; where it is true nothing
            changes. Default: none.
        backend (str, optional): As in :class:`AdaDelta`. Default: ``"auto"``.
        stream (Stream or Device, optional): Where to run. Default: the default
            stream of the backend's device.

    Returns:
        tuple: The new parameters, v and u, each an array, or a list of arrays
        where lists were given. Shapes, types and memory layout are those of
        the old ones (v and u lie as the parameter does).

    Raises:
        ValueError: A shape, a number or a length does not fit.
        TypeError: An argument is of an unsuitable type.
        RuntimeError: The backend was asked for by name and cannot run here.
    """
    single = isinstance(parameters, mx.array)
    given: tuple[Any, ...] = (parameters, gradients, v, u)
    lists = [[x] if single else list(x) for x in given]
    lengths = [len(xs) for xs in lists]
    if len(set(lengths)) > 1:
        raise ValueError(
            "parameters, gradients, v and u must be equally long but have "
            f"{', '.join(map(str, lengths))} elements"
        )
    options = Options(
        rho=rho,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        decay_filter=decay_filter,
        maximize=maximize,
        state_dtype=state_dtype,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
    )
    new: Any = update_tensors(
        lists[0],
        lists[1],
        lists[2],
        lists[3],
        check_learning_rate(learning_rate),
        options,
        path=(lambda _: "") if single else "[{}]".format,
        step=check_step(step),
        gradient_scale=check_gradient_scale(gradient_scale),
        skip=check_skip(skip),
        backend=backend,
        stream=stream,
    )
    new_w, new_v, new_u = (x[0] for x in new) if single else new
    return new_w, new_v, new_u


def update_tensors(
    parameters: list[mx.array],
    gradients: list[mx.array],
    v: list[mx.array],
    u: list[mx.array],
    learning_rate: mx.array,
    options: Options,
    *,
    path: Path,
    step: int | mx.array,
    backend: str,
    gradient_scale: mx.array | None = None,
    skip: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
    """:func:`adadelta_update` on lists; the scalars and options are checked."""
    run, stream = choose(backend, stream, parameters)
    decays: list[bool] = []
    if options.decay_filter is not None:
        decays = [
            # The backend refuses what is no array.
            isinstance(w, mx.array) and bool(options.decay_filter(path(i), w))
            for i, w in enumerate(parameters)
        ]
    return run(
        parameters,
        gradients,
        v,
        u,
        learning_rate,
        options,
        path=path,
        decays=decays,
        # An array only where it is used: a step allocates nothing else.
        step=mx.array(step, mx.uint64) if options.stochastic_rounding else None,
        gradient_scale=gradient_scale,
        skip=skip,
        stream=stream,
    )
