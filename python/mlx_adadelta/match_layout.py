"""Lays parameters out in memory as their gradients lie."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import mlx.core as mx

from .options import check_companion
from .tree import rebuild_sequence


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
        gradients (array or tree): Their gradients, which are evaluated. A
            parameter stays as it is where its gradient is missing, is ``None``
            or has gaps.

    Returns:
        A tree like ``parameters``. An array that lies right already is
        returned as it is.

    Raises:
        ValueError: A gradient does not have its parameter's shape.
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
