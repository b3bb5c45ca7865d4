"""Trees of parameters: places, paths, and walking several side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

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
    """Gradients and what stands in the place of each in other trees, in columns."""

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
            # Spares most tensors a call: this loop is much of a small step.
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
    if isinstance(state, dict) and "v" in state and "u" in state:
        if len(state) == 2 or not exactly:
            return
    raise ValueError(
        f"the state of {path_of(place)} must hold 'v' and 'u' but is {_held(state)}"
    )


def check_states(
    state: Any, places: list[Place], complete: bool, exactly: bool
) -> None:
    """Refuses wrong state at these places; with `complete` also missing state."""
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
            if complete:
                raise missing("state", place)
        else:
            check_state(place, node, exactly)


def check_known(state: Any, parameters: Any, place: Place) -> None:
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
            check_known(below, parameter, (place, key))
