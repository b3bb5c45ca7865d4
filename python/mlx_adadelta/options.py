"""The options of an update and the checks of all arguments.

Options are checked where they are set, scalars once a step. The backend that
runs looks at the tensors: the native one in C++, the reference with check_tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16, mx.float64)
STATE_TYPES = (mx.float32, mx.float16, mx.bfloat16)

# The path of the tensor at an index, for messages; "" for a single array.
Path = Callable[[int], str]
NOT_NEGATIVE = "a finite number that is not negative"


# ---------------------------------- Options -----------------------------------


def shown(value: Any) -> str:
    """A value as a message shows it: its type where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else type(value).__name__


def _to_float32(number: Any) -> float:
    try:
        single: float = struct.unpack("f", struct.pack("f", number))[0]
    except (OverflowError, struct.error):  # the latter for a large integer
        return math.inf if number > 0 else -math.inf
    return single


def check_number(
    name: str, value: Any, expected: str, accept: Callable[[float], bool]
) -> float:
    """Returns a real number that is acceptable as the kernels use it, in float32."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected} but is {shown(value)}")
    single = _to_float32(value)
    if math.isfinite(single) and accept(single):
        return float(value)
    lost = single in (0, math.inf, -math.inf) and single != value
    rounded = f" ({single} in float32)" if lost else ""
    raise ValueError(f"{name} must be {expected} but is {shown(value)}{rounded}")


def check_integer(name: str, value: Any, bits: int) -> int:
    """Returns an integer that is not negative and has no more bits."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer but is {shown(value)}")
    if not 0 <= value < 2**bits:
        raise ValueError(f"{name} must be in [0, 2**{bits}) but is {shown(value)}")
    return value


_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "rho": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "eps": ("a positive finite number (>0)", lambda x: x > 0),
    "weight_decay": (NOT_NEGATIVE, lambda x: x >= 0),
}
_SWITCH = (TypeError, "True or False", lambda x: isinstance(x, bool))
_CHOICES: dict[str, tuple[type[Exception], str, Callable[[Any], bool]]] = {
    "decoupled_weight_decay": _SWITCH,
    "maximize": _SWITCH,
    "stochastic_rounding": _SWITCH,
    "decay_filter": (
        TypeError,
        "a function of a path and a parameter",
        lambda x: x is None or callable(x),
    ),
    "state_dtype": (
        ValueError,
        "None, float32, float16 or bfloat16",
        lambda x: x is None or x in STATE_TYPES,
    ),
}


def _check_option(name: str, value: Any) -> Any:
    if name in _NUMBERS:
        return check_number(name, value, *_NUMBERS[name])
    if name == "seed":
        return check_integer(name, value, 64)
    if name in _CHOICES:
        error, expected, accept = _CHOICES[name]
        if not accept(value):
            raise error(f"{name} must be {expected} but is {shown(value)}")
    return value


@dataclass(eq=False, repr=False)
class Options:
    """What an update does; see :func:`adadelta_update`.

    An assignment checks the value, later ones too.
    """

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
        for name in ("decoupled_weight_decay", "decay_filter"):
            if getattr(self, name) and self.weight_decay == 0:
                raise ValueError(f"{name} says how to decay, but weight_decay is 0")

    def changed(self) -> dict[str, Any]:
        """The options that have another value than their default."""
        values = {field.name: getattr(self, field.name) for field in fields(Options)}
        # As text: an mx.Dtype cannot be compared with None.
        defaults = {field.name: repr(field.default) for field in fields(Options)}
        return {k: x for k, x in values.items() if repr(x) != defaults[k]}

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _check_option(name, value))

    def __getstate__(self) -> dict[str, Any]:
        # An mx.Dtype can be neither copied nor pickled.
        dtype = self.state_dtype
        name = None if dtype is None else str(dtype).rpartition(".")[-1]
        return {**vars(self), "state_dtype": name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name = state["state_dtype"]
        vars(self).update(state)
        self.state_dtype = None if name is None else getattr(mx, name)


# ---------------------------------- Scalars -----------------------------------


def check_scalar(name: str, x: mx.array) -> mx.array:
    """Returns an array that is a real scalar."""
    if x.ndim != 0 or x.dtype == mx.complex64:
        raise ValueError(
            f"{name} must be a real scalar but has shape {x.shape} and type {x.dtype}"
        )
    return x


def check_learning_rate(value: Any) -> mx.array:
    """Returns the learning rate as a scalar array. A number is also checked."""
    if isinstance(value, mx.array):
        return check_scalar("learning_rate", value)
    if getattr(value, "shape", None) == ():  # a scalar of NumPy
        value = value.item()
    expected = f"{NOT_NEGATIVE}, or a scalar array"
    return mx.array(check_number("learning_rate", value, expected, lambda x: x >= 0))


def check_scheduled(name: str, value: Any) -> mx.array:
    """Returns what a schedule gave as an array; a subclass may have its own."""
    return check_learning_rate(value) if name == "learning_rate" else mx.array(value)


def check_gradient_scale(scale: Any) -> mx.array | None:
    """Returns the scale as a scalar array. A number is also checked."""
    if scale is None:
        return None
    if isinstance(scale, mx.array):
        return check_scalar("gradient_scale", scale)
    expected = "a finite number or a scalar array"
    return mx.array(check_number("gradient_scale", scale, expected, lambda _: True))


def check_skip(skip: Any) -> mx.array | None:
    """Returns whether to skip as a scalar array."""
    if skip is None:
        return None
    if isinstance(skip, bool):
        return mx.array(skip)
    if not isinstance(skip, mx.array):
        raise TypeError(
            f"skip must be bool or a scalar array of it but is {shown(skip)}"
        )
    if check_scalar("skip", skip).dtype != mx.bool_:
        raise TypeError(f"skip must be bool but is {skip.dtype}")
    return skip


def check_step(step: Any) -> int | mx.array:
    """Returns a step: an integer that is not negative, or a scalar array of it."""
    if isinstance(step, mx.array):
        if not mx.issubdtype(check_scalar("step", step).dtype, mx.integer):
            raise TypeError(f"step must be an integer but is {step.dtype}")
    else:
        check_integer("step", step, 63)
    return step  # type: ignore[no-any-return]


# ---------------------------------- Tensors -----------------------------------


def _named(kind: str, path: str) -> str:
    between = " " if kind == "parameter" else " of "
    return f"{kind}{between}{path}" if path else kind


def _check_array(kind: str, path: str, x: Any) -> None:
    if not isinstance(x, mx.array):
        raise TypeError(
            f"{_named(kind, path)} must be an array but is {type(x).__name__}"
        )
    if x.dtype not in FLOATS:
        remedy = "; freeze it, or pass model.trainable_parameters()"
        raise TypeError(
            f"{_named(kind, path)} must be of a real floating point type but is "
            f"{x.dtype}{remedy if kind == 'parameter' else ''}"
        )


def check_parameter(path: str, parameter: Any, options: Options) -> None:
    """Refuses a parameter of a wrong type, or one that state_dtype does not fit."""
    _check_array("parameter", path, parameter)
    dtype, state = parameter.dtype, options.state_dtype
    if state is not None and dtype != mx.float32 and state not in (mx.float32, dtype):
        raise ValueError(
            f"state_dtype must be float32 or the type of {_named('parameter', path)} "
            f"({dtype}) but is {state}"
        )


def check_companion(kind: str, path: str, x: Any, parameter: mx.array) -> None:
    """Refuses a gradient, v or u that does not fit its parameter."""
    _check_array(kind, path, x)
    if x.shape != parameter.shape:
        raise ValueError(
            f"{_named(kind, path)} must have the parameter's shape "
            f"{parameter.shape} but has {x.shape}"
        )


def check_tensors(
    path: Path,
    parameters: list[Any],
    gradients: list[Any],
    v: list[Any],
    u: list[Any],
    options: Options,
) -> None:
    """Makes the checks that the native backend makes in C++."""
    for i, w in enumerate(parameters):
        check_parameter(path(i), w, options)
        for kind, xs in (("gradient", gradients), ("v", v), ("u", u)):
            check_companion(kind, path(i), xs[i], w)
        mixed = v[i].dtype != u[i].dtype and options.state_dtype is None
        if options.stochastic_rounding and mixed:
            raise TypeError(
                f"{_named('v and u', path(i))} must be of one type for stochastic "
                f"rounding but are {v[i].dtype} and {u[i].dtype}"
            )
