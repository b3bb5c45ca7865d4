"""A transformer-shaped model, trained: stock's results, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from arrays import strides
from checks import assert_same_trees
from mlx.utils import tree_flatten
from models import Transformer, loss_fn, make_tokens, make_transformer

from mlx_adadelta import AdaDelta

STEPS = 20

# (model, optimizer) -> tokens -> loss
MakeStep = Callable[[Transformer, optim.Optimizer], Callable[[mx.array], mx.array]]


def eager(model: Transformer, optimizer: optim.Optimizer) -> Any:
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def step(tokens: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(model, tokens)
        optimizer.update(model, gradients)
        return loss

    return step


def compiled(model: Transformer, optimizer: optim.Optimizer) -> Any:
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    return partial(mx.compile, inputs=state, outputs=state)(eager(model, optimizer))


def compiled_but_for_the_update(model: Transformer, optimizer: optim.Optimizer) -> Any:
    """As `compiled`, the update apart: some C++ compilers contract a compiled one."""

    @partial(mx.compile, inputs=model.state, outputs=model.state)
    def loss_and_grad(tokens: mx.array) -> Any:
        return nn.value_and_grad(model, loss_fn)(model, tokens)

    def step(tokens: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(tokens)
        optimizer.update(model, gradients)
        return loss

    return step


def train(make_step: MakeStep, optimizer: optim.Optimizer) -> dict[str, Any]:
    model = make_transformer()
    step = make_step(model, optimizer)
    losses = []
    for i in range(STEPS):
        losses.append(step(make_tokens(i)))
        mx.eval(losses, model, optimizer.state)
    return {
        "losses": losses,
        "parameters": model.parameters(),
        "state": optimizer.state,
    }


SCHEDULE = optim.cosine_decay(2.0, STEPS)


@pytest.mark.parametrize("lr", [1.0, SCHEDULE], ids=["constant", "schedule"])
def test_eager_training_is_stocks(backend: str, lr: Any) -> None:
    stock = train(eager, optim.AdaDelta(lr))
    assert stock["losses"][-1].item() < 0.8 * stock["losses"][0].item()
    assert_same_trees(backend, train(eager, AdaDelta(lr, backend=backend)), stock)


def test_compiled_training_is_stocks(backend: str) -> None:
    reference = compiled if backend == "mlx" else compiled_but_for_the_update
    stock = train(reference, optim.AdaDelta(SCHEDULE))
    ours = train(compiled, AdaDelta(SCHEDULE, backend=backend))
    assert_same_trees(backend, ours, stock)


def test_gradients_are_transposed() -> None:
    """So that the tests above go through the tile."""
    model = make_transformer()
    _, gradients = nn.value_and_grad(model, loss_fn)(model, make_tokens())
    linear = {
        path: g
        for path, g in tree_flatten(gradients)
        if path.endswith("weight") and g.ndim == 2 and "embedding" not in path
    }
    assert len(linear) == 13
    for path, g in linear.items():
        assert strides(g) == (1, g.shape[0]), path


@pytest.mark.parametrize(
    ("dtype", "make_step"), [(mx.float16, eager), (mx.bfloat16, compiled)]
)
def test_sixteen_bit_training_learns(
    backend: str, dtype: mx.Dtype, make_step: MakeStep
) -> None:
    model = make_transformer(dtype)
    optimizer = AdaDelta(1.0, backend=backend)
    step = make_step(model, optimizer)
    losses = []
    for i in range(STEPS):
        losses.append(step(make_tokens(i)).item())
        mx.eval(model, optimizer.state)
    assert losses[-1] < 0.9 * losses[0]
    state = {k: x for k, x in optimizer.state.items() if k in model.parameters()}
    for _, x in tree_flatten([model.parameters(), state]):
        assert x.dtype == dtype
