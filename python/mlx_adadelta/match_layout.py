"""Lays parameters out in memory as their gradients lie."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .options import check_companion
from .tree import Place, missing, path_of, rebuild


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


def _lay_out(path: str, parameter: mx.array, gradient: mx.array) -> mx.array:
    check_companion("gradient", path, gradient, parameter)
    order = _memory_order(gradient)
    if order is None or order == _memory_order(parameter):
        return parameter
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return mx.contiguous(parameter.transpose(order)).transpose(inverse)


def match_layout(parameters: Any, gradients: Any) -> Any:
    """Lays each parameter out in memory as its gradient lies.

    The gradient of an ``nn.Linear`` weight is column-contiguous, the weight
    row-contiguous. Called once, with the gradients of a first backward pass,
    this makes every update linear. No value changes, but a matrix product with
    a re-laid weight may round differently. Checkpoints do not keep the layout:
    after loading, call this again before training goes on; then the run is the
    uninterrupted one to the bit. Backend ``"mlx"`` may go back to row-contiguous.

    Example:
        >>> loss, gradients = loss_and_grad(model, x, y)
        >>> model.update(match_layout(model.parameters(), gradients))

    Args:
        parameters (array or tree): The parameters.
        gradients (array or tree): Their gradients, which are evaluated.

    Returns:
        A tree like ``parameters``. An array stays as it is where it lies right
        already, or its gradient is missing, is ``None`` or has gaps.

    Raises:
        ValueError: A gradient does not have its parameter's shape.
    """
    if gradients is None:
        return parameters
    return rebuild(parameters, _leaves(parameters, gradients, None))


def _leaves(parameters: Any, gradients: Any, place: Place) -> Iterator[mx.array]:
    """The leaves that a tree like ``parameters`` is to have."""
    if gradients is None:
        leaves: Any = tree_flatten(parameters)
        yield from (leaf for _, leaf in leaves)
    elif isinstance(parameters, dict) and isinstance(gradients, dict):
        for key, child in parameters.items():
            yield from _leaves(child, gradients.get(key), (place, key))
    elif isinstance(parameters, (list, tuple)) and isinstance(gradients, (list, tuple)):
        if len(gradients) > len(parameters):
            raise missing("parameter", path_of((place, len(parameters))))
        for i, (child, gradient) in enumerate(zip_longest(parameters, gradients)):
            yield from _leaves(child, gradient, (place, i))
    elif isinstance(parameters, (dict, list, tuple)):
        kind = type(parameters).__name__
        raise TypeError(
            f"gradients of {path_of(place)} must be a {kind}, as the parameters are, "
            f"but are {type(gradients).__name__}"
        )
    else:
        yield _lay_out(path_of(place), parameters, gradients)
