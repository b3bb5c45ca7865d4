"""A transformer-shaped model, trained: stock's results, to the last bit."""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from checks import assert_same_trees
from models import loss_fn, make_tokens, make_transformer

from mlx_adadelta import AdaDelta

STEPS = 20


def train(optimizer: optim.Optimizer, compiled: str = "") -> dict[str, Any]:
    """Trains eagerly, or with the "gradients" or the "whole" step compiled."""
    model = make_transformer()
    optimizer.init(model.trainable_parameters())
    loss_and_grad = partial(nn.value_and_grad(model, loss_fn), model)
    if compiled == "gradients":
        loss_and_grad = mx.compile(loss_and_grad, model.state, model.state)

    def step(tokens: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(tokens)
        optimizer.update(model, gradients)
        return loss

    state = [model.state, optimizer.state]
    if compiled == "whole":
        step = mx.compile(step, state, state)
    losses = []
    for i in range(STEPS):
        losses.append(step(make_tokens(i)))
        mx.eval(losses, state)
    return {"losses": losses, "state": [model.parameters(), optimizer.state]}


SCHEDULE = optim.cosine_decay(2.0, STEPS)


@pytest.mark.parametrize("lr", [1.0, SCHEDULE], ids=["constant", "schedule"])
def test_eager_training_is_stocks(backend: str, lr: Any) -> None:
    stock = train(optim.AdaDelta(lr))
    assert stock["losses"][-1].item() < 0.8 * stock["losses"][0].item()
    assert_same_trees(backend, train(AdaDelta(lr, backend=backend)), stock)


def test_compiled_training_is_stocks(backend: str) -> None:
    # Some C++ compilers contract a compiled update of plain operations.
    what = "whole" if backend == "mlx" else "gradients"
    stock = train(optim.AdaDelta(SCHEDULE), what)
    ours = train(AdaDelta(SCHEDULE, backend=backend), "whole")
    assert_same_trees(backend, ours, stock)
