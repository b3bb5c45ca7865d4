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


def _check_rho(name: str, value: Any) -> float:
    return check_number(name, value, "a number in [0, 1]", lambda x: 0 <= x <= 1)


def _check_eps(name: str, value: Any) -> float:
    return check_number(name, value, "a positive finite number (>0)", lambda x: x > 0)


def _check_weight_decay(name: str, value: Any) -> float:
    return check_number(name, value, NOT_NEGATIVE, lambda x: x >= 0)


def _check_switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False but is {shown(value)}")
    return value


def _check_decay_filter(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        expected = "a function of a path and a parameter"
        raise TypeError(f"{name} must be {expected} but is {shown(value)}")
    return value


def _check_state_type(name: str, value: Any) -> Any:
    if value is not None and value not in STATE_TYPES:
        expected = "None, float32, float16 or bfloat16"
        raise ValueError(f"{name} must be {expected} but is {shown(value)}")
    return value


def _check_seed(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer but is {shown(value)}")
    if not 0 <= value < 2**64:
        raise ValueError(f"{name} must be in [0, 2**64) but is {shown(value)}")
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "rho": _check_rho,
    "eps": _check_eps,
    "weight_decay": _check_weight_decay,
    "decoupled_weight_decay": _check_switch,
    "decay_filter": _check_decay_filter,
    "maximize": _check_switch,
    "state_dtype": _check_state_type,
    "stochastic_rounding": _check_switch,
    "seed": _check_seed,
}


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
        defaults = {field.name: field.default for field in fields(Options)}
        values = {name: getattr(self, name) for name in defaults}
        # By type first: an mx.Dtype cannot be compared with None.
        return {
            name: x
            for name, x in values.items()
            if type(x) is not type(defaults[name]) or x != defaults[name]
        }

    def __setattr__(self, name: str, value: Any) -> None:
        check = _CHECKS.get(name)
        super().__setattr__(name, check(name, value) if check else value)

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
    elif not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step must be an integer but is {shown(step)}")
    elif not 0 <= step < 2**63:
        raise ValueError(f"step must be in [0, 2**63) but is {shown(step)}")
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
    """Refuses what is no array of real numbers, or has no state of the type asked."""
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
    """What the native backend checks in C++, with the same messages."""
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
