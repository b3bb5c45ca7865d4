"""What an update does, and the checks of everything it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16, mx.float64)


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
