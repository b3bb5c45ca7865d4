"""A small model, a smaller tree, and the parts of a training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

VOCABULARY, WIDTH = 31, 16


class Transformer(nn.Module):
    """One of each: embedding, convolution, attention, norms, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, kernel_size=3, padding=1)
        self.encoder = nn.TransformerEncoder(2, WIDTH, num_heads=2)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embedding(tokens)
        x = x + self.convolution(x)
        mask = nn.MultiHeadAttention.create_additive_causal_mask(tokens.shape[1])
        return self.head(self.encoder(x, mask))


def make_transformer() -> Transformer:
    """Evaluated, always the same."""
    mx.random.seed(0)
    model = Transformer()
    mx.eval(model)
    return model


def make_tokens(step: int = 0) -> mx.array:
    """The batch of a step: arithmetic progressions, which can be learned."""
    start = mx.arange(4)[:, None] + 7 * step
    return (start + 3 * mx.arange(13)) % VOCABULARY


def decay(step: mx.array) -> mx.array:
    """A schedule of the learning rate."""
    return 1 / (1 + step)


def take_steps(
    model: Any, optimizer: Any, loss: Callable[..., mx.array], steps: int = 3
) -> None:
    """Trains on a loss of the model."""
    loss_and_grad = nn.value_and_grad(model, loss)
    for _ in range(steps):
        optimizer.update(model, loss_and_grad(model)[1])
        mx.eval(model.parameters(), optimizer.state)


def make_tree(seed: int, dtype: mx.Dtype = mx.float32) -> dict[str, Any]:
    """Parameters or gradients like those of two layers and a norm."""
    draw = np.random.default_rng(seed).standard_normal
    layers = [
        {"weight": draw((9, 5)), "bias": draw(9)},
        {"weight": draw((3, 9)), "bias": draw(3)},
    ]
    tree = {"layers": layers, "norm": {"weight": draw(9)}}
    tree = tree_map(lambda x: mx.array(x.astype(np.float32)).astype(dtype), tree)
    mx.eval(tree)
    return tree


def run(optimizer: optim.Optimizer, parameters: Any, steps: range) -> Any:
    """The parameters after these steps, each with gradients of its own."""
    for step in steps:
        gradients = make_tree(step + 1, parameters["norm"]["weight"].dtype)
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    return parameters


def eager_step(optimizer: Any, model: dict[str, Any]) -> Callable[[Any], None]:
    """Takes gradients and updates a tree of parameters in place."""

    def step(gradients: Any) -> None:
        model.update(optimizer.apply_gradients(gradients, model))

    return step


def compiled_step(optimizer: Any, model: dict[str, Any]) -> Callable[[Any], None]:
    state = [model, optimizer.state]
    step = eager_step(optimizer, model)
    return mx.compile(step, inputs=state, outputs=state)


def save_and_load(tree: Any, path: Path) -> Any:
    mx.save_safetensors(str(path), dict(tree_flatten(tree)))
    return tree_unflatten(list(mx.load(str(path)).items()))


def loss_fn(model: Transformer, tokens: mx.array) -> mx.array:
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")
