"""The update as a function: checks its arguments and dispatches to a backend."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, get_args, overload

import mlx.core as mx

from . import _native, reference

Backend = Literal["auto", "metal", "cpu", "mlx"]
StreamOrDevice = mx.Stream | mx.Device | mx.DeviceType | None
FLOATS = (mx.float32, mx.float16, mx.bfloat16, mx.float64)


def backends() -> tuple[str, ...]:
    """The backends that can run here, best first; always ends with ``"mlx"``."""
    if _native.extension is None:
        return ("mlx",)
    return ("metal", "cpu", "mlx") if _native.extension.has_metal else ("cpu", "mlx")


def _device_type(stream: StreamOrDevice) -> mx.DeviceType:
    if isinstance(stream, mx.DeviceType):
        return stream
    if isinstance(stream, mx.Stream):
        return stream.device.type
    return (stream or mx.default_device()).type


def resolve_backend(
    backend: str, stream: StreamOrDevice = None
) -> Literal["metal", "cpu", "mlx"]:
    """Chooses the backend for work on a stream.

    Args:
        backend (str): ``"metal"``, ``"cpu"``, ``"mlx"``, or ``"auto"``: the
            environment variable ``MLX_ADADELTA_BACKEND`` where it is set,
            otherwise the native kernel of the stream's device, otherwise
            ``"mlx"``.
        stream (Stream or Device, optional): Default: the default device.

    Raises:
        ValueError: No backend has that name, or it cannot run on that stream.
        RuntimeError: The backend was asked for by name and cannot run here.
    """
    asked = backend
    if backend == "auto":
        backend = os.environ.get("MLX_ADADELTA_BACKEND", "auto")
    if backend not in get_args(Backend):
        raise ValueError(
            f"backend must be one of {', '.join(get_args(Backend))} but is {backend!r}"
        )
    here = backends()
    device = _device_type(stream)
    if backend == "auto":
        backend = "metal" if device == mx.gpu else "cpu"
        return backend if backend in here else "mlx"  # type: ignore[return-value]
    if backend not in here:
        reason = _native.why_not or "MLX has no Metal device"
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    wanted = {"metal": mx.gpu, "cpu": mx.cpu}.get(backend, device)
    if stream is not None and asked != "auto" and device != wanted:
        raise ValueError(f"backend {backend!r} cannot run on {stream}")
    return backend  # type: ignore[return-value]


def check_number(
    name: str,
    value: Any,
    accept: Callable[[float], bool],
    expected: str,
) -> float:
    """Returns a real number that is finite and accepted, as a float."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected} but is {value!r}")
    number = float(value)
    if not (math.isfinite(number) and accept(number)):
        raise ValueError(f"{name} must be {expected} but is {value!r}")
    return number


def check_rho(rho: Any) -> float:
    return check_number("rho", rho, lambda x: 0 <= x <= 1, "a number in [0, 1]")


def check_eps(eps: Any) -> float:
    return check_number("eps", eps, lambda x: x > 0, "a positive finite number")


def check_learning_rate(value: Any) -> mx.array:
    """Returns the learning rate as a scalar array. A number is also checked."""
    if not isinstance(value, mx.array):
        expected = "a finite number that is not negative, or a scalar array"
        return mx.array(
            check_number("learning_rate", value, lambda x: x >= 0, expected)
        )
    if value.ndim != 0 or value.dtype == mx.complex64:
        raise ValueError(
            "learning_rate must be a real scalar but has shape "
            f"{value.shape} and type {value.dtype}"
        )
    return value


def check_parameter(path: str, parameter: Any) -> None:
    """Refuses what is no array of real floating point numbers."""
    if not isinstance(parameter, mx.array):
        raise TypeError(
            f"parameter {path} must be an array but is {type(parameter).__name__}"
        )
    if parameter.dtype not in FLOATS:
        raise TypeError(
            f"parameter {path} must be of a real floating point type but is "
            f"{parameter.dtype}"
        )


def check_companion(kind: str, path: str, x: Any, parameter: mx.array) -> None:
    """Refuses a gradient, v or u that does not fit its parameter."""
    if not isinstance(x, mx.array):
        raise TypeError(f"{kind} of {path} must be an array but is {type(x).__name__}")
    if x.shape != parameter.shape:
        raise ValueError(
            f"{kind} of {path} must have the parameter's shape {parameter.shape} "
            f"but has {x.shape}"
        )
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{kind} of {path} must be of a real floating point type but is {x.dtype}"
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
    arguments keep their values.

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
        backend (str, optional): ``"metal"``, ``"cpu"``, ``"mlx"`` or
            ``"auto"``, see :func:`backends`. Default: ``"auto"``.
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
        check_rho(rho),
        check_eps(eps),
        backend=backend,
        stream=stream,
    )
    return tuple(x[0] for x in new) if isinstance(parameters, mx.array) else new


def _memory_order(x: mx.array) -> tuple[int, ...] | None:
    """The axes of a dense array, outermost in memory first; None if not dense."""
    if x.ndim == 0:
        return ()
    # The buffer protocol knows no bfloat16; mlx's stubs know no buffer protocol.
    bits: Any = x.view({2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[x.itemsize])
    with memoryview(bits) as memory:
        strides = memory.strides or ()
    order = sorted(range(x.ndim), key=lambda axis: -strides[axis])
    expected = x.itemsize
    for axis in reversed(order):
        if x.shape[axis] > 1 and strides[axis] != expected:
            return None
        expected *= x.shape[axis]
    return tuple(order)


def match_layout(parameters: Any, gradients: Any) -> Any:
    """Lays each parameter out in memory as its gradient lies.

    The gradient of an ``nn.Linear`` weight is column-contiguous, the weight
    row-contiguous, so an update has to turn one against the other. Called once
    with the gradients of a first backward pass, this makes every update
    linear. No value changes, but a matrix product with a re-laid weight may
    round differently. Checkpoints do not keep the layout: call this again
    after loading, before training goes on, and the run is the uninterrupted
    one to the bit. The native kernels keep the layout; the operations of
    backend ``"mlx"`` may go back to row-contiguous.

    Example:
        >>> loss, gradients = loss_and_grad(model, x, y)
        >>> model.update(match_layout(model.parameters(), gradients))

    Args:
        parameters (array or tree): The parameters.
        gradients (array or tree): Their gradients, which are evaluated. Where
            one is missing or ``None`` the parameter is left as it is, so is
            one whose gradient has gaps.

    Returns:
        A tree like ``parameters``; arrays that lie right already are returned
        as they are.

    Raises:
        ValueError: A gradient has not its parameter's shape.
    """
    return _match_layout(parameters, gradients, "")


def _match_layout(parameters: Any, gradients: Any, path: str) -> Any:
    if gradients is None:
        return parameters
    if isinstance(parameters, dict):
        return {
            key: _match_layout(child, gradients.get(key), f"{path}.{key}")
            for key, child in parameters.items()
        }
    if isinstance(parameters, (list, tuple)):
        missing = [None] * (len(parameters) - len(gradients))
        children = [
            _match_layout(child, gradient, f"{path}.{i}")
            for i, (child, gradient) in enumerate(
                zip(parameters, [*gradients, *missing], strict=True)
            )
        ]
        return rebuild_sequence(parameters, children)
    check_companion("gradient", path.lstrip(".") or "(root)", gradients, parameters)
    order = _memory_order(gradients)
    if order is None or order == _memory_order(parameters):
        return parameters
    inverse = sorted(range(len(order)), key=order.__getitem__)
    dense = mx.contiguous(parameters.transpose(order))
    return dense.transpose(inverse)


def rebuild_sequence(like: Any, children: list[Any]) -> Any:
    """A list, tuple or named tuple of the same kind with other children."""
    return type(like)(*children) if hasattr(like, "_fields") else type(like)(children)


def update_tensors(
    name: Callable[[int], str],
    parameters: list[mx.array],
    gradients: list[mx.array],
    v: list[mx.array],
    u: list[mx.array],
    learning_rate: mx.array,
    rho: float,
    eps: float,
    *,
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

    tensors = (parameters, gradients, v, u, learning_rate, rho, eps)
    chosen = resolve_backend(backend, stream)
    if chosen == "mlx" or _native.extension is None:
        check_tensors()
        return reference.adadelta_update(*tensors, stream=stream)
    device = {"metal": mx.gpu, "cpu": mx.cpu}[chosen]
    try:
        new: tuple[list[mx.array], list[mx.array], list[mx.array]] = (
            _native.extension.adadelta_update(*tensors, stream=stream or device)
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
    return reference.adadelta_update(*tensors, stream=stream)
