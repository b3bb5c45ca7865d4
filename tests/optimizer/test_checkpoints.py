"""Checkpoints that do not fit are refused by path, before anything is touched."""

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from checks import assert_same_bits, unchanged
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from models import decay, take_steps

from mlx_adadelta import AdaDelta

Flat = dict[str, mx.array]


def make_model(seed: int = 0) -> nn.Module:
    mx.random.seed(seed)
    # Functions leave gaps in the list of layers, which no file keeps.
    model = nn.Sequential(nn.Linear(4, 3), nn.relu, nn.Linear(3, 2), nn.tanh)
    mx.eval(model)
    return model


def loss(model: nn.Module) -> mx.array:
    return model(mx.ones((5, 4))).square().mean()


def unflatten(flat: Flat) -> Any:
    return tree_unflatten(list(flat.items()))


@pytest.fixture
def flat() -> Flat:
    """The optimizer's state after two steps, as a file holds it."""
    model, optimizer = make_model(), AdaDelta(decay)
    take_steps(model, optimizer, loss, 2)
    return dict(tree_flatten(optimizer.state))


def replace(path: str, make: Callable[[mx.array], mx.array]) -> Any:
    return lambda flat: flat | {path: make(flat[path])}


def remove(path: str) -> Any:
    """One array of a checkpoint, or a whole part of it."""

    def do(flat: Flat) -> Flat:
        found = [key for key in flat if key == path or key.startswith(path + ".")]
        assert found
        return {key: x for key, x in flat.items() if key not in found}

    return do


def add(path: str) -> Any:
    return lambda flat: flat | {path: mx.zeros((3,))}


def move(old: str, new: str) -> Any:
    return lambda flat: {key.replace(old, new): x for key, x in flat.items()}


def missing(path: str) -> str:
    return f"gradient at {path} but no state"


def foreign(path: str) -> str:
    return f"state at {path} but no parameter"


W0 = "layers.0.weight"
# What is done to a checkpoint and what the error says, in this order; its type,
# where it is not ValueError.
MISFITS = {
    "no step": (remove("step"), "holds no step"),
    "no learning rate": (remove("learning_rate"), "holds no learning_rate"),
    "no v": (remove(W0 + ".v"), f"state of {W0} .. ['u']"),
    "no u": (remove(W0 + ".u"), f"state of {W0} .. ['v']"),
    "no parameter's state": (remove("layers.2.bias"), missing("layers.2.bias")),
    "no layer": (remove("layers.2"), missing("layers.2.weight")),
    "nothing but the step": (remove("layers"), missing("layers.0.weight")),
    "one array more": (add(W0 + ".m"), f"state of {W0} .. ['m', 'u', 'v']"),
    "one parameter more": (add("layers.2.scale.v"), foreign("layers.2.scale")),
    "one layer more": (add("layers.4.weight.v"), foreign("layers.4")),
    "one scalar more": (add("rho"), foreign("rho")),
    "state of a function": (add("layers.1.weight.v"), foreign("layers.1.weight")),
    "other names": (move("layers", "blocks"), foreign("blocks")),
    "a wrong shape": (
        replace(W0 + ".u", mx.transpose),
        f"u of {W0} .. (3, 4) .. (4, 3)",
    ),
    "a fractional step": (
        replace("step", lambda x: x.astype(mx.float32)),
        *("step must be an integer but is .. float32", TypeError),
    ),
    "a negative step": (
        replace("step", lambda x: mx.array(-1)),
        "step must not be negative but is -1",
    ),
    "many steps": (
        replace("step", lambda x: mx.array([1, 2])),
        "step must be a real scalar .. (2,)",
    ),
    "many learning rates": (
        replace("learning_rate", lambda x: mx.ones((1,))),
        "learning_rate must be a real scalar .. (1,)",
    ),
}


def check_refused(
    model: nn.Module, optimizer: AdaDelta, message: str, error: Any = ValueError
) -> None:
    """An update is refused, and nothing of model and optimizer is touched."""
    gradients = tree_map(mx.ones_like, model.trainable_parameters())
    pattern = ".*".join(map(re.escape, message.split(" .. ")))
    for _ in range(2):  # it stays refused
        with (
            unchanged(model.parameters(), optimizer.state),
            pytest.raises(error, match=pattern),
        ):
            optimizer.update(model, gradients)


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_that_does_not_fit(misfit: str, flat: Flat) -> None:
    change, message, *error = MISFITS[misfit]
    model, optimizer = make_model(1), AdaDelta(decay)
    optimizer.state = unflatten(change(flat))
    check_refused(model, optimizer, message, *error)
    # The right one is then taken as if nothing had been.
    optimizer.state = unflatten(flat)
    take_steps(model, optimizer, loss, 1)
    assert optimizer.step.item() == 3


def test_a_checkpoint_that_was_not_unflattened(flat: Flat) -> None:
    model, optimizer = make_model(1), AdaDelta(decay)
    optimizer.state = flat
    check_refused(model, optimizer, "state at layers. .. but no parameter")


@pytest.mark.parametrize("state", [None, [], mx.zeros((3,)), "path"], ids=repr)
def test_what_is_no_tree_at_all(state: Any) -> None:
    model, optimizer = make_model(), AdaDelta(decay)
    take_steps(model, optimizer, loss, 1)
    message = f"must be a dict but is {type(state).__name__}"
    with unchanged(optimizer.state), pytest.raises(TypeError, match=message):
        optimizer.state = state
    take_steps(model, optimizer, loss, 1)
    assert optimizer.step.item() == 2


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "in place"])
@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "gradient at w but no state"),
        (None, "state of w must hold 'v' and 'u' but is NoneType"),
        (mx.zeros(3), "state of w must hold 'v' and 'u' but is array"),
    ],
    ids=["{}", "None", "array"],
)
def test_no_state_in_a_parameters_place(held: Any, message: str, loaded: bool) -> None:
    ones = {"w": mx.ones(3)}
    optimizer = AdaDelta(1.0)
    if loaded:
        optimizer.state = {**optimizer.state, "w": held}
    else:
        optimizer.state["w"] = held
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.apply_gradients(ones, ones)
        assert type(optimizer.state["w"]) is type(held)
    if not isinstance(held, dict):
        with pytest.raises(ValueError, match=message):
            optimizer.init(ones)
        assert optimizer.state["w"] is held


def test_init_checks_the_step_of_a_checkpoint() -> None:
    ones = {"w": mx.ones(3)}
    optimizer = AdaDelta(1.0)
    optimizer.state = {**optimizer.state, "step": mx.array(-2)}
    with pytest.raises(ValueError, match="step must not be negative but is -2"):
        optimizer.init(ones)
    assert "w" not in optimizer.state


OTHERS = ["Adam", "AdamW", "Adamax", "RMSprop", "Adagrad", "Lion", "Adafactor", "Muon"]


@pytest.mark.parametrize("name", ["SGD", *OTHERS])
def test_the_state_of_another_optimizer(name: str) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    other = getattr(optim, name)(0.1, **options)
    take_steps(make_model(), other, loss, 2)
    model, optimizer = make_model(1), AdaDelta(1.0)
    optimizer.state = unflatten(dict(tree_flatten(other.state)))
    held = sorted(optimizer.state["layers"][0]["weight"])
    assert held != ["u", "v"]
    check_refused(model, optimizer, f"state .. layers. .. {held}")


# ------------------------------ What does fit ---------------------------------


@pytest.mark.parametrize("frozen", [0, 2])  # the first and the last
def test_frozen_parameters_may_have_state_or_not(flat: Flat, frozen: int) -> None:
    model, optimizer = make_model(1), AdaDelta(decay)
    model.layers[frozen].freeze()
    for state in (flat, remove(f"layers.{frozen}")(flat)):
        optimizer.state = unflatten(state)
        take_steps(model, optimizer, loss, 1)
        assert optimizer.step.item() == 3


def test_init_makes_what_a_checkpoint_lacks(flat: Flat) -> None:
    """A model that has grown: asked for, it is no misfit."""
    model, optimizer = make_model(1), AdaDelta(decay)
    optimizer.state = unflatten(remove("layers.2")(flat))
    optimizer.init(model.trainable_parameters())
    state = dict(tree_flatten(optimizer.state))
    assert_same_bits(state[W0 + ".v"], flat[W0 + ".v"])
    assert not state["layers.2.weight.v"].any().item()
    take_steps(model, optimizer, loss, 1)
    assert optimizer.step.item() == 3
