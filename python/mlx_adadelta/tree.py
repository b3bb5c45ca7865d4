"""Trees of parameters: places, paths, and walking several side by side."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .options import check_scalar

# A leaf's place in a tree: its key and the place of the node above.
Place = tuple[Any, Any] | None


def path_of(place: Place) -> str:
    keys = []
    while place is not None:
        place, key = place
        keys.append(str(key))
    return ".".join(keys[::-1]) or "(root)"


def missing(kind: str, path: str) -> ValueError:
    """The error where a gradient has no counterpart in another tree."""
    remedy = "; call optimizer.init(model.trainable_parameters()) to make it"
    return ValueError(
        f"there is a gradient at {path} but no {kind}"
        f"{remedy if kind == 'state' else ''}"
    )


class Aligned:
    """Gradients in a list, and the parameters and states in the same places."""

    def __init__(self, gradients: Any, parameters: Any, states: Any) -> None:
        self.places: list[Place] = []
        self.gradients: list[Any] = []
        self.parameters: list[Any] = []
        self.states: list[Any] = []
        self._walk(None, gradients, parameters, states)

    def path(self, i: int) -> str:
        return path_of(self.places[i])

    def check_states(self, exactly: bool) -> None:
        for place, state in zip(self.places, self.states, strict=True):
            check_state(place, state, exactly)

    def _walk(self, place: Place, gradients: Any, parameters: Any, states: Any) -> None:
        if isinstance(gradients, dict):
            items: Any = gradients.items()
        elif isinstance(gradients, (list, tuple)):
            items = enumerate(gradients)
        else:
            self.places.append(place)
            self.gradients.append(gradients)
            self.parameters.append(parameters)
            self.states.append(states)
            return
        # The rows of an array are not a tree of parameters.
        parameters = {} if isinstance(parameters, mx.array) else parameters
        states = {} if isinstance(states, mx.array) else states
        for key, gradient in items:
            kind = "parameter"
            try:
                parameter = parameters[key]
                kind = "state"
                state = states[key]
            except (KeyError, IndexError, TypeError):
                flat: Any = tree_flatten(gradient, prefix=f".{path_of((place, key))}")
                if flat:  # not the empty tree of a frozen layer
                    raise missing(kind, flat[0][0]) from None
            else:
                self._walk((place, key), gradient, parameter, state)


def rebuild(tree: Any, leaves: Iterator[Any]) -> Any:
    """A tree of the same structure with other leaves."""
    # Not with tree_map: it takes five times as long.
    if isinstance(tree, dict):
        return {key: rebuild(child, leaves) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        new = [rebuild(child, leaves) for child in tree]
        return type(tree)(*new) if hasattr(tree, "_fields") else type(tree)(new)
    return next(leaves)


def check_state(place: Place, state: Any, exactly: bool) -> None:
    """Refuses anything but a dict of "v" and "u"; a subclass may keep more."""
    if state == {}:  # a gap in a list of a checkpoint
        raise missing("state", path_of(place))
    fits = isinstance(state, dict) and "v" in state and "u" in state
    if not fits or (exactly and len(state) > 2):
        held = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"the state of {path_of(place)} must hold 'v' and 'u' but is {held}"
        )


def check_states(
    state: Any, parameters: Any, exactly: bool, whole: bool, place: Place = None
) -> None:
    """Refuses a wrong state; given the whole tree of parameters, also a foreign one.

    A parameter may have none.
    """
    if isinstance(state, dict):
        items: Any = state.items()
    else:
        items = enumerate(state) if isinstance(state, (list, tuple)) else ()
    if isinstance(parameters, mx.array) or items == ():
        if state != {}:
            check_state(place, state, exactly)
        return
    for key, below in items:
        try:
            parameter = parameters[key]
        except (KeyError, IndexError, TypeError):
            if not whole:
                continue
            path = path_of((place, key))
            raise ValueError(f"there is state at {path} but no parameter") from None
        check_states(below, parameter, exactly, whole, (place, key))


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
        if not isinstance(state.get(name), mx.array):
            raise ValueError(f"the optimizer's state holds no {name}, a scalar array")
    check_scalar("learning_rate", state["learning_rate"])
    check_scalar("step", step := state["step"])
    if mx.issubdtype(step.dtype, mx.signedinteger) and step.item() < 0:
        raise ValueError(f"step must not be negative but is {step.item()}")
