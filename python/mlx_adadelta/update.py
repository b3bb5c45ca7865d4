"""The update as a function: checks its arguments and dispatches to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import mlx.core as mx

from . import backend as backend_module
from . import reference
from .backend import Backend, StreamOrDevice, resolve_backend
from .options import (
    Options,
    check_companion,
    check_gradient_scale,
    check_learning_rate,
    check_one_type,
    check_parameter,
    check_skip,
    check_step,
)


@overload
def adadelta_update(
    parameters: mx.array,
    gradients: mx.array,
    v: mx.array,
    u: mx.array,
    learning_rate: float | mx.array,
    rho: float = ...,
    eps: float = ...,
    *,
    weight_decay: float = ...,
    decoupled_weight_decay: bool = ...,
    decay_filter: Callable[[str, mx.array], bool] | None = ...,
    maximize: bool = ...,
    state_dtype: mx.Dtype | None = ...,
    stochastic_rounding: bool = ...,
    seed: int = ...,
    step: int | mx.array = ...,
    gradient_scale: float | mx.array | None = ...,
    skip: bool | mx.array | None = ...,
    backend: Backend = ...,
    stream: StreamOrDevice = ...,
) -> tuple[mx.array, mx.array, mx.array]: ...


@overload
def adadelta_update(
    parameters: Sequence[mx.array],
    gradients: Sequence[mx.array],
    v: Sequence[mx.array],
    u: Sequence[mx.array],
    learning_rate: float | mx.array,
    rho: float = ...,
    eps: float = ...,
    *,
    weight_decay: float = ...,
    decoupled_weight_decay: bool = ...,
    decay_filter: Callable[[str, mx.array], bool] | None = ...,
    maximize: bool = ...,
    state_dtype: mx.Dtype | None = ...,
    stochastic_rounding: bool = ...,
    seed: int = ...,
    step: int | mx.array = ...,
    gradient_scale: float | mx.array | None = ...,
    skip: bool | mx.array | None = ...,
    backend: Backend = ...,
    stream: StreamOrDevice = ...,
) -> tuple[list[mx.array], list[mx.array], list[mx.array]]: ...


def adadelta_update(
    parameters: Any,
    gradients: Any,
    v: Any,
    u: Any,
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
) -> Any:
    r"""One AdaDelta step [1] on arrays.

    [1]: Zeiler, M.D., 2012. ADADELTA: an adaptive learning rate method. arXiv
    preprint arXiv:1212.5701 (algorithm 1, with a learning rate).

    .. math::

        v_{t+1} &= \rho v_t + (1 - \rho) g_t^2 \\
        d_{t+1} &= \frac{\sqrt{u_t + \epsilon}}{\sqrt{v_{t+1} + \epsilon}} g_t \\
        u_{t+1} &= \rho u_t + (1 - \rho) d_{t+1}^2 \\
        w_{t+1} &= w_t - \lambda d_{t+1}

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
        rho (float, optional): The decay :math:`\rho` of both averages, in
            [0, 1]. Default: ``0.9``.
        eps (float, optional): The term :math:`\epsilon` added under the roots.
            Default: ``1e-6``.
        weight_decay (float, optional): The weight decay :math:`\mu`, added to
            the gradient before everything else, :math:`g_t + \mu w_t`, as in
            PyTorch. Default: ``0.0``.
        decoupled_weight_decay (bool, optional): Take the decay from the
            parameter instead, :math:`w_t - \lambda \mu w_t`, as AdamW does.
            Default: ``False``.
        decay_filter (callable, optional): Called with a parameter's place in
            the list (``"[0]"``) and the parameter, says whether it decays.
            Default: all decay.
        maximize (bool, optional): Ascend: the gradient is negated first.
            Default: ``False``.
        state_dtype (Dtype, optional): The type v and u are kept in: float32 or
            the parameter's own. Default: the types they come in.
        stochastic_rounding (bool, optional): Round 16-bit results up or down at
            random, so that the mean is exact, instead of to the nearest. The
            bits are Philox4x32-10 (Salmon et al., SC11) of the seed, the step,
            the parameter's index and the element's. Default: ``False``.
        seed (int, optional): The seed of the random bits. Default: ``0``.
        step (int or array, optional): The step they are of. Default: ``0``.
        gradient_scale (float or array, optional): A scalar every gradient is
            multiplied by first, see :func:`clip_scale`. Default: none.
        skip (bool or array, optional): A scalar; where it is true nothing
            changes. Default: none.
        backend (str, optional): ``"metal"``, ``"cpu"``, ``"mlx"`` or
            ``"auto"``, as in :class:`AdaDelta`. Default: ``"auto"``.
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
    if isinstance(parameters, mx.array):
        tensors = ([parameters], [gradients], [v], [u])
    else:
        tensors = (list(parameters), list(gradients), list(v), list(u))
    lengths = [len(xs) for xs in tensors]
    if len(set(lengths)) > 1:
        raise ValueError(
            "parameters, gradients, v and u must be equally long but have "
            f"{', '.join(map(str, lengths))} elements"
        )
    new = update_tensors(
        "[{}]".format,
        *tensors,
        check_learning_rate(learning_rate),
        Options(
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            decay_filter=decay_filter,
            maximize=maximize,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        ),
        step=step,
        gradient_scale=gradient_scale,
        skip=skip,
        backend=backend,
        stream=stream,
    )
    return tuple(x[0] for x in new) if isinstance(parameters, mx.array) else new


def update_tensors(
    name: Callable[[int], str],
    parameters: list[mx.array],
    gradients: list[mx.array],
    v: list[mx.array],
    u: list[mx.array],
    learning_rate: mx.array,
    options: Options,
    *,
    step: int | mx.array,
    gradient_scale: float | mx.array | None,
    skip: bool | mx.array | None,
    backend: str,
    stream: StreamOrDevice = None,
) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
    """:func:`adadelta_update` on lists, with the numbers checked already.

    ``name`` gives the name of the tensors at an index, for errors.
    """

    def check_tensors() -> None:
        for i, (w, g, v_i, u_i) in enumerate(
            zip(parameters, gradients, v, u, strict=True)
        ):
            check_parameter(name(i), w)
            check_companion("gradient", name(i), g, w)
            check_companion("v", name(i), v_i, w)
            check_companion("u", name(i), u_i, w)
            options.check_state_dtype(name(i), w)
            if options.stochastic_rounding and options.state_dtype is None:
                check_one_type(name(i), v_i, u_i)

    decays: list[bool] = []
    if options.state_dtype is not None or options.decay_filter is not None:
        check_tensors()
        v = [options.in_state_dtype(x) for x in v]
        u = [options.in_state_dtype(x) for x in u]
    if options.decay_filter is not None:
        decays = [
            bool(options.decay_filter(name(i), w)) for i, w in enumerate(parameters)
        ]
    check_step(step)
    tensors = (parameters, gradients, v, u, learning_rate)
    settings: dict[str, Any] = {
        "rho": options.rho,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
        "decoupled_weight_decay": options.decoupled_weight_decay,
        "decays": decays,
        "maximize": options.maximize,
        "stochastic_rounding": options.stochastic_rounding,
        "seed": options.seed,
        # An array only where it is used: a step allocates nothing else.
        "step": mx.array(step, mx.uint64) if options.stochastic_rounding else None,
        "gradient_scale": None
        if gradient_scale is None
        else check_gradient_scale(gradient_scale),
        "skip": None if skip is None else check_skip(skip),
    }
    chosen = resolve_backend(backend, stream)
    if chosen == "mlx" or backend_module.extension is None:
        check_tensors()
        return reference.adadelta_update(*tensors, **settings, stream=stream)
    device = {"metal": mx.gpu, "cpu": mx.cpu}[chosen]
    try:
        new: tuple[list[mx.array], list[mx.array], list[mx.array]] = (
            backend_module.extension.adadelta_update(
                *tensors, **settings, stream=stream or device
            )
        )
        return new
    except (TypeError, ValueError):
        # The extension checks the tensors too, a good deal faster, but it does
        # not know their names.
        check_tensors()
        if not any(w.dtype == mx.float64 for w in parameters):
            raise
    if backend != "auto":
        raise TypeError(f"backend {chosen!r} has no float64; use backend 'mlx'")
    return reference.adadelta_update(*tensors, **settings, stream=stream)
