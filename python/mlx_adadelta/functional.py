"""The update as a function: checks its arguments and dispatches to a backend."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args, overload

import mlx.core as mx
from mlx.utils import tree_flatten

from . import _native, reference

Backend = Literal["auto", "metal", "cpu", "mlx"]
StreamOrDevice: TypeAlias = (
    "mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None"
)
FLOATS = (mx.float32, mx.float16, mx.bfloat16, mx.float64)


def backends() -> tuple[str, ...]:
    """The backends that can run here, best first; always ends with ``"mlx"``."""
    if _native.extension is None:
        return ("mlx",)
    return ("metal", "cpu", "mlx") if _native.extension.has_metal else ("cpu", "mlx")


def _device_type(stream: StreamOrDevice) -> mx.DeviceType:
    if isinstance(stream, mx.DeviceType):
        return stream
    device = mx.default_device() if stream is None else stream
    return device.type if isinstance(device, mx.Device) else device.device.type


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


def check_choice(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False but is {value!r}")
    return value


@dataclass
class Options:
    """What an update does, checked; see :func:`adadelta_update`."""

    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    decay_filter: Callable[[str, mx.array], bool] | None = None
    maximize: bool = False
    state_dtype: mx.Dtype | None = None
    stochastic_rounding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        expected = "a number in [0, 1]"
        self.rho = check_number("rho", self.rho, lambda x: 0 <= x <= 1, expected)
        expected = "a positive finite number"
        self.eps = check_number("eps", self.eps, lambda x: x > 0, expected)
        expected = "a finite number that is not negative"
        self.weight_decay = check_number(
            "weight_decay", self.weight_decay, lambda x: x >= 0, expected
        )
        check_choice("decoupled_weight_decay", self.decoupled_weight_decay)
        check_choice("maximize", self.maximize)
        check_choice("stochastic_rounding", self.stochastic_rounding)
        if self.weight_decay == 0:
            for name in ("decoupled_weight_decay", "decay_filter"):
                if getattr(self, name):
                    raise ValueError(f"{name} says how to decay, but weight_decay is 0")
        if self.decay_filter is not None and not callable(self.decay_filter):
            raise TypeError(
                "decay_filter must be called with a path and a parameter but is "
                f"{self.decay_filter!r}"
            )
        types = (mx.float32, mx.float16, mx.bfloat16)
        if self.state_dtype is not None and self.state_dtype not in types:
            raise ValueError(
                "state_dtype must be None, float32 or the parameters' 16-bit type "
                f"but is {self.state_dtype!r}"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed must be an integer but is {self.seed!r}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2**64) but is {self.seed}")

    def check_state_dtype(self, path: str, parameter: mx.array) -> None:
        types = (mx.float32, parameter.dtype)
        if self.state_dtype is not None and self.state_dtype not in types:
            raise ValueError(
                f"state_dtype is {self.state_dtype}, but parameter {path} is "
                f"{parameter.dtype}: its state can be that type or float32"
            )

    def in_state_dtype(self, x: mx.array) -> mx.array:
        return x if self.state_dtype is None else x.astype(self.state_dtype)


def check_scalar(name: str, x: mx.array) -> mx.array:
    """Returns an array that is a real scalar."""
    if x.ndim != 0 or x.dtype == mx.complex64:
        raise ValueError(
            f"{name} must be a real scalar but has shape {x.shape} and type {x.dtype}"
        )
    return x


def check_skip(skip: Any) -> mx.array:
    if isinstance(skip, bool):
        return mx.array(skip)
    if not isinstance(skip, mx.array):
        raise TypeError(f"skip must be bool, or a scalar array of it, but is {skip!r}")
    if check_scalar("skip", skip).dtype != mx.bool_:
        raise TypeError(f"skip must be bool but is {skip.dtype}")
    return skip


def check_gradient_scale(scale: Any) -> mx.array:
    if isinstance(scale, mx.array):
        return check_scalar("gradient_scale", scale)
    expected = "a finite number or a scalar array"
    return mx.array(check_number("gradient_scale", scale, lambda _: True, expected))


def check_step(step: Any) -> None:
    if isinstance(step, mx.array):
        if not mx.issubdtype(check_scalar("step", step).dtype, mx.integer):
            raise TypeError(f"step must be an integer but is {step.dtype}")
    elif not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step must be an integer but is {step!r}")
    elif not 0 <= step < 2**63:
        raise ValueError(f"step must lie in [0, 2**63) but is {step}")


def check_learning_rate(value: Any) -> mx.array:
    """Returns the learning rate as a scalar array. A number is also checked."""
    if not isinstance(value, mx.array):
        expected = "a finite number that is not negative, or a scalar array"
        return mx.array(
            check_number("learning_rate", value, lambda x: x >= 0, expected)
        )
    return check_scalar("learning_rate", value)


def check_parameter(path: str, parameter: Any) -> None:
    """Refuses what is no array of real floating point numbers."""
    if not isinstance(parameter, mx.array):
        raise TypeError(
            f"parameter {path} must be an array but is {type(parameter).__name__}"
        )
    if parameter.dtype not in FLOATS:
        raise TypeError(
            f"parameter {path} must be of a real floating point type but is "
            f"{parameter.dtype}; what is not to be trained can be frozen"
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


def check_one_type(path: str, v: mx.array, u: mx.array) -> None:
    """Refuses state that no kernel can round stochastically."""
    if v.dtype != u.dtype:
        raise TypeError(
            f"v and u of {path} must be of one type to be rounded stochastically "
            f"but are {v.dtype} and {u.dtype}"
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


def clip_scale(gradients: Any, max_norm: float) -> tuple[mx.array, mx.array]:
    """The factor that clips gradients to a global norm, and that norm.

    Given to an update as ``gradient_scale`` it does what
    :func:`mlx.optimizers.clip_grad_norm` does before one, without writing the
    gradients once more.

    Args:
        gradients (array or tree): The gradients, which are left as they are.
        max_norm (float): The largest global norm, not negative.

    Returns:
        tuple: The scale, ``min(max_norm / (norm + 1e-6), 1)``, and the norm,
        both float32 scalars, not yet evaluated.
    """
    largest = check_number(
        "max_norm", max_norm, lambda x: x >= 0, "a finite number that is not negative"
    )
    squares = [mx.square(g.astype(mx.float32)).sum() for g in _arrays(gradients)]
    norm = mx.sqrt(sum(squares, start=mx.array(0.0)))
    return mx.minimum(largest / (norm + 1e-6), 1.0), norm


def nonfinite(gradients: Any) -> mx.array:
    """Whether any gradient holds an infinity or a NaN, to be given as ``skip``.

    Args:
        gradients (array or tree): The gradients.

    Returns:
        array: A bool scalar, not yet evaluated.
    """
    # The largest magnitude is a NaN where there is any.
    finite = [mx.isfinite(mx.abs(g).max()) for g in _arrays(gradients) if g.size > 0]
    return mx.logical_not(mx.stack(finite).all()) if finite else mx.array(False)


def _arrays(tree: Any) -> list[mx.array]:
    leaves: Any = tree_flatten(tree)
    for path, leaf in leaves:
        kind = leaf.dtype if isinstance(leaf, mx.array) else type(leaf).__name__
        if kind not in FLOATS:
            raise TypeError(
                f"gradient {path or '(root)'} must be an array of a real floating "
                f"point type but is {kind}"
            )
    return [leaf for _, leaf in leaves]


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
    if isinstance(parameters, (dict, list, tuple)):
        kind = dict if isinstance(parameters, dict) else (list, tuple)
        if not isinstance(gradients, kind):
            raise TypeError(
                f"gradients of {path.lstrip('.') or '(root)'} must be a "
                f"{type(parameters).__name__}, as the parameters are, but are "
                f"{type(gradients).__name__}"
            )
    if isinstance(parameters, dict):
        return {
            key: _match_layout(child, gradients.get(key), f"{path}.{key}")
            for key, child in parameters.items()
        }
    if isinstance(parameters, (list, tuple)):
        if len(gradients) > len(parameters):
            extra = f"{path}.{len(parameters)}".lstrip(".")
            raise ValueError(f"there is a gradient at {extra} but no parameter")
        children = [
            _match_layout(child, gradient, f"{path}.{i}")
            for i, (child, gradient) in enumerate(zip_longest(parameters, gradients))
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
    if chosen == "mlx" or _native.extension is None:
        check_tensors()
        return reference.adadelta_update(*tensors, **settings, stream=stream)
    device = {"metal": mx.gpu, "cpu": mx.cpu}[chosen]
    try:
        new: tuple[list[mx.array], list[mx.array], list[mx.array]] = (
            _native.extension.adadelta_update(
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
