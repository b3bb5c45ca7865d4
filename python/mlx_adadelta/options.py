"""The options of an update and the checks of all arguments.

Options are checked where they are set, scalars once a step. The backend that
runs looks at the tensors: the native one in C++, the reference with check_tensors.
"""

import math
from collections.abc import Callable
from ctypes import c_float
from dataclasses import dataclass
from numbers import Real
from types import NoneType
from typing import Any, TypeAlias

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16, mx.float64)
STATE_TYPES = (mx.float32, mx.float16, mx.bfloat16)

# The path of the tensor at an index, for messages; "" for a single array.
Path = Callable[[int], str]
# Lists of w, g, v and u.
Tensors: TypeAlias = tuple[list[Any], list[Any], list[Any], list[Any]]
# Lists of new w, v and u.
Updated: TypeAlias = tuple[list[mx.array], list[mx.array], list[mx.array]]
StreamOrDevice: TypeAlias = (
    "mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None"
)
NOT_NEGATIVE = "a finite number that is not negative"
# mlx's stubs leave it out.
MLX_VERSION: str = mx.__version__  # type: ignore[attr-defined]
MLX_RELEASE = tuple(int(x) for x in MLX_VERSION.split(".")[:3])


# ---------------------------------- Options -----------------------------------

# Of an option or scalar: its type, the words for it, and whether a value is accepted.
Check = tuple[Any, str, Callable[[Any], bool]]
_AT_LEAST_0: Check = (Real, NOT_NEGATIVE, lambda x: 0 <= x < math.inf)
_SWITCH: Check = (bool, "True or False", lambda x: True)
_FUNCTION = "a function of a path and a parameter"
_STATE_TYPE = "None, float32, float16 or bfloat16"
_CHECKS: dict[str, Check] = {
    "learning_rate": (Real, f"{NOT_NEGATIVE}, or a scalar array", _AT_LEAST_0[2]),
    "rho": (Real, "a number in [0, 1]", lambda x: 0 <= x <= 1),
    "eps": (Real, "a positive finite number (>0)", lambda x: 0 < x < math.inf),
    "weight_decay": _AT_LEAST_0,
    "decoupled_weight_decay": _SWITCH,
    "decay_filter": ((Callable, NoneType), _FUNCTION, lambda x: True),
    "maximize": _SWITCH,
    "state_dtype": (object, _STATE_TYPE, lambda x: x is None or x in STATE_TYPES),
    "stochastic_rounding": _SWITCH,
    "seed": (int, "an integer in [0, 2**64)", lambda x: 0 <= x < 2**64),
    "step": (int, "an integer in [0, 2**63)", lambda x: 0 <= x < 2**63),
    "gradient_scale": (Real, "a finite number or a scalar array", math.isfinite),
    "skip": (bool, "bool or a scalar array of it", lambda x: True),
    "max_norm": _AT_LEAST_0,
}


def shown(value: Any) -> str:
    """A value as a message shows it: its type where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else type(value).__name__


def check(name: str, value: Any) -> Any:
    """Returns the value if it is one for this name. Numbers count as in float32."""
    kind, expected, accept = _CHECKS[name]
    error: type[Exception] = TypeError
    note = ""
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        error = ValueError
        used = _to_float32(value) if kind is Real else value
        if accept(used):
            return float(value) if kind is Real else value
        if kind is Real and used in (0, math.inf, -math.inf) and used != value:
            note = f" ({used} in float32)"
    raise error(f"{name} must be {expected} but is {shown(value)}{note}")


def _to_float32(number: Any) -> float:
    try:
        return c_float(number).value
    except OverflowError:  # a large integer
        return math.inf if number > 0 else -math.inf


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
    backend: str = "auto"  # which backend.py checks

    def __post_init__(self) -> None:
        for name in ("decoupled_weight_decay", "decay_filter"):
            if getattr(self, name) and self.weight_decay == 0:
                raise ValueError(f"{name} says how to decay, but weight_decay is 0")

    def __setattr__(self, name: str, value: Any) -> None:
        checked = name in vars(Options) and name in _CHECKS
        super().__setattr__(name, check(name, value) if checked else value)

    def __getstate__(self) -> dict[str, Any]:
        # An mx.Dtype can be neither copied nor pickled.
        name = self.state_dtype and str(self.state_dtype).rpartition(".")[-1]
        return {**vars(self), "state_dtype": name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name = state["state_dtype"]
        vars(self).update(state)
        self.state_dtype = name and getattr(mx, name)


# ---------------------------------- Scalars -----------------------------------


def check_scalar(name: str, x: mx.array) -> mx.array:
    """Returns an array that is a real scalar, of the kind that its name asks for."""
    if x.ndim != 0 or x.dtype == mx.complex64:
        raise ValueError(
            f"{name} must be a real scalar but has shape {x.shape} and type {x.dtype}"
        )
    if name == "step" and not mx.issubdtype(x.dtype, mx.integer):
        raise TypeError(f"step must be an integer but is {x.dtype}")
    if name == "skip" and x.dtype != mx.bool_:
        raise TypeError(f"skip must be bool but is {x.dtype}")
    return x


def to_scalar(name: str, value: Any) -> mx.array:
    """Returns a scalar array. A number is also checked."""
    if name not in _CHECKS:  # a subclass has it on a schedule
        return mx.array(value)
    if isinstance(value, mx.array):
        return check_scalar(name, value)
    if getattr(value, "shape", None) == ():  # a scalar of NumPy
        value = value.item()
    return mx.array(check(name, value))


def to_optional_scalar(name: str, value: Any) -> mx.array | None:
    return None if value is None else to_scalar(name, value)


# ---------------------------------- Tensors -----------------------------------


def _named(kind: str, path: str) -> str:
    between = " " if kind == "parameter" else " of "
    return f"{kind}{between}{path}" if path else kind


def check_array(name: str, x: Any, remedy: str = "") -> None:
    if not isinstance(x, mx.array):
        raise TypeError(f"{name} must be an array but is {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be of a real floating point type but is {x.dtype}{remedy}"
        )


def check_parameter(path: str, parameter: Any, options: Options) -> None:
    """Refuses a parameter of a wrong type, or one that state_dtype does not fit."""
    name = _named("parameter", path)
    check_array(name, parameter, "; freeze it, or pass model.trainable_parameters()")
    dtype, state = parameter.dtype, options.state_dtype
    if state is not None and dtype != mx.float32 and state not in (mx.float32, dtype):
        raise ValueError(
            f"state_dtype must be float32 or the type of {name} ({dtype}) "
            f"but is {state}"
        )


def check_companion(kind: str, path: str, x: Any, parameter: mx.array) -> None:
    """Refuses a gradient, v or u that does not fit its parameter."""
    name = _named(kind, path)
    check_array(name, x)
    if x.shape != parameter.shape:
        raise ValueError(
            f"{name} must have the parameter's shape {parameter.shape} "
            f"but has {x.shape}"
        )


def check_lengths(tensors: Tensors) -> None:
    lengths = [len(x) for x in tensors]
    if len(set(lengths)) > 1:
        raise ValueError(
            "parameters, gradients, v and u must be equally long but have "
            f"{', '.join(map(str, lengths))} elements"
        )


def check_tensors(path: Path, tensors: Tensors, options: Options) -> None:
    """Makes the checks that the native backend makes in C++."""
    for i, (w, g, v, u) in enumerate(zip(*tensors, strict=True)):
        check_parameter(path(i), w, options)
        for kind, x in (("gradient", g), ("v", v), ("u", u)):
            check_companion(kind, path(i), x, w)
        mixed = v.dtype != u.dtype and options.state_dtype is None
        if options.stochastic_rounding and mixed:
            raise TypeError(
                f"{_named('v and u', path(i))} must be of one type for stochastic "
                f"rounding but are {v.dtype} and {u.dtype}"
            )
