"""Trees of parameters: places, paths, and walking several side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from .options import check_scalar, check_step

# A leaf's place in a tree: its key and the place of the node above.
Place = tuple[Any, Any] | None


def keys_of(place: Place) -> list[Any]:
    keys = []
    while place is not None:
        place, key = place
        keys.append(key)
    return keys[::-1]


def path_of(place: Place) -> str:
    return ".".join(map(str, keys_of(place))) or "(root)"


def missing(kind: str, place: Place) -> ValueError:
    """The error where a gradient has no counterpart in another tree."""
    remedy = "; call optimizer.init(model.trainable_parameters()) to make it"
    return ValueError(
        f"there is a gradient at {path_of(place)} but no {kind}"
        f"{remedy if kind == 'state' else ''}"
    )


class Aligned:
    """Lines up gradients with the leaves of other trees, in columns."""

    def __init__(self, gradients: Any, **trees: Any) -> None:
        self.places: list[Place] = []
        self.gradients: list[Any] = []
        self.columns: dict[str, list[Any]] = {kind: [] for kind in trees}
        self._walk(gradients, trees, None)

    def path(self, i: int) -> str:
        return path_of(self.places[i])

    def _walk(self, gradients: Any, trees: dict[str, Any], place: Place) -> None:
        if isinstance(gradients, dict):
            items: Any = gradients.items()
        elif isinstance(gradients, (list, tuple)):
            items = enumerate(gradients)
        else:
            self.places.append(place)
            self.gradients.append(gradients)
            for kind, tree in trees.items():
                self.columns[kind].append(tree)
            return
        # The rows of an array are not a tree of parameters.
        nodes = [
            (kind, {} if isinstance(tree, mx.array) else tree, self.columns[kind])
            for kind, tree in trees.items()
        ]
        for key, gradient in items:
            # Most tensors need no call: this loop takes much of a small step.
            is_leaf = type(gradient) is mx.array
            try:
                if is_leaf:
                    for kind, node, column in nodes:  # noqa: B007 (in the error)
                        column.append(node[key])
                else:
                    below = {}
                    for kind, node, _ in nodes:
                        below[kind] = node[key]
            except (KeyError, IndexError, TypeError):
                raise missing(kind, (place, key)) from None
            if is_leaf:
                self.places.append((place, key))
                self.gradients.append(gradient)
            else:
                self._walk(gradient, below, (place, key))


def rebuild_sequence(like: Any, children: list[Any]) -> Any:
    """A list, tuple or named tuple of the same kind with other children."""
    return type(like)(*children) if hasattr(like, "_fields") else type(like)(children)


def rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """A tree of the same structure with other leaves."""
    if isinstance(tree, dict):
        return {
            key: next(leaves) if type(child) is mx.array else rebuild(child, leaves)
            for key, child in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return rebuild_sequence(tree, [rebuild(child, leaves) for child in tree])
    return next(leaves)


def _held(state: Any) -> str:
    return str(sorted(state)) if isinstance(state, dict) else type(state).__name__


def check_state(place: Place, state: Any, exactly: bool = True) -> None:
    """Refuses anything but a dict of "v" and "u"; a subclass may keep more."""
    fits = isinstance(state, dict) and "v" in state and "u" in state
    if not fits or (exactly and len(state) > 2):
        raise ValueError(
            f"the state of {path_of(place)} must hold 'v' and 'u' but is {_held(state)}"
        )


def check_root(parameters: Any, scalars: tuple[str, ...]) -> None:
    """Refuses a tree of parameters that a state cannot stand beside."""
    if not isinstance(parameters, dict):
        raise TypeError(
            "parameters (root) must be a dict, such as "
            f"model.trainable_parameters(), but is {type(parameters).__name__}"
        )
    for name in scalars:
        if name in parameters:
            raise ValueError(
                f"parameter {name} must have another name: the optimizer's state "
                f"keeps its own {name} there"
            )


def check_scalars(state: dict[str, Any], names: tuple[str, ...]) -> None:
    """Refuses a loaded state without its scalars, or with a wrong step."""
    for name in names:
        if name not in state:
            raise ValueError(f"the optimizer's state holds no {name}")
        if not isinstance(state[name], mx.array):
            got = type(state[name]).__name__
            raise TypeError(f"{name} must be a scalar array but is {got}")
    check_scalar("learning_rate", state["learning_rate"])
    check_step(step := state["step"])
    if mx.issubdtype(step.dtype, mx.signedinteger) and step.item() < 0:
        raise ValueError(f"step must not be negative but is {step.item()}")


def check_states(
    state: Any, places: list[Place], exactly: bool, parameters: Any = None
) -> None:
    """Refuses wrong state; given all parameters, also missing and foreign state."""
    if parameters is not None:
        _check_known(state, parameters, None)
    for place in places:
        node: Any = state
        for key in keys_of(place):
            try:
                node = node[key]
            except (KeyError, IndexError):
                node = {}
            except (TypeError, ValueError):  # None or an array holds nothing
                break
        if node == {}:
            if parameters is not None:
                raise missing("state", place)
        else:
            check_state(place, node, exactly)


def _check_known(state: Any, parameters: Any, place: Place) -> None:
    """Refuses state that stands where there is no parameter."""
    if isinstance(parameters, mx.array):
        return
    items = state.items() if isinstance(state, dict) else enumerate(state or ())
    for key, below in items:
        try:
            parameter = parameters[key]
        except (KeyError, IndexError, TypeError):
            path = path_of((place, key))
            raise ValueError(f"there is state at {path} but no parameter") from None
        if isinstance(below, (dict, list, tuple)):
            _check_known(below, parameter, (place, key))
