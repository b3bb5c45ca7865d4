"""A transformer-shaped model, trained: stock's results, to the last bit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from checks import assert_same_trees
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
