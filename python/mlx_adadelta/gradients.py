"""Looks at all gradients at once: their norm, and whether they are finite."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .backend import choose
from .options import check, check_array


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
    largest = check("max_norm", max_norm)
    norm = _look("norm", gradients)
    return mx.minimum(largest / (norm + 1e-6), 1.0), norm


def nonfinite(gradients: Any) -> mx.array:
    """Whether any gradient holds an infinity or a NaN, to be given as ``skip``.

    Args:
        gradients (array or tree): The gradients. Their norm by :func:`clip_scale`
            tells the same without another pass; it is also infinite where it is
            too large for float32.

    Returns:
        array: A bool scalar, not yet evaluated.
    """
    return _look("nonfinite", gradients)


def _look(function: str, gradients: Any) -> mx.array:
    leaves: Any = tree_flatten(gradients)
    for path, leaf in leaves:
        check_array(f"gradient of {path or '(root)'}", leaf)
    arrays = [leaf for _, leaf in leaves]
    module, stream = choose("auto", None, arrays)
    result: mx.array = getattr(module, function)(arrays, stream=stream)
    return result
