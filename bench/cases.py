"""What is measured: the shapes of a step's tensors and how their gradients lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from tests.reference import adadelta_step

Array = NDArray[np.float32]
LR, RHO, EPS = 1.0, 0.9, 1e-6
CONTEXT_LR = 1e-3  # of the optimizers that are not AdaDelta

OURS = ("ours", "ours-compiled")
STOCK = ("stock", "stock-compiled")
UPDATE = (*OURS, "ours-mlx", *STOCK, "torch-foreach", "torch-loop", "optax")
SWEEP = (*OURS, *STOCK, "torch-foreach", "optax")
CLIPPING = (*OURS, "stock-clip", "stock-clip-compiled", "ours-clip")
CLIPPING += ("ours-clip-scale", "ours-clip-scale-compiled")
TRAINING = ("no-update", "no-update-compiled", *OURS)
TRAINING += ("ours-matched", "ours-matched-compiled", *STOCK)
CONTEXT: dict[str, type[optim.Optimizer]] = {
    "sgd": optim.SGD,
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "lion": optim.Lion,
    "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
}


@dataclass(frozen=True)
class Tensor:
    """A parameter; `transposed` is its gradient, as that of an nn.Linear weight."""

    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Case:
    """One step to measure: an update of `tensors`, or all of a `model`'s training."""

    name: str
    title: str
    tensors: tuple[Tensor, ...] = ()
    contenders: tuple[str, ...] = UPDATE
    matched: bool = False
    model: Callable[[], tuple[nn.Module, mx.array, mx.array]] | None = None
    swept: bool = False


def linear(outputs: int, inputs: int) -> tuple[Tensor, ...]:
    return Tensor((outputs, inputs), transposed=True), Tensor((outputs,))


def gpt2_tensors(layers: int, tables: int) -> tuple[Tensor, ...]:
    """GPT-2's parameters, of the two embedding tables the first `tables`."""
    width = 768
    norm = (Tensor((width,)), Tensor((width,)))
    block = (
        *norm,
        *linear(3 * width, width),
        *linear(width, width),
        *norm,
        *linear(4 * width, width),
        *linear(width, 4 * width),
    )
    embeddings = (Tensor((1024, width)), Tensor((50257, width)))[:tables]
    return (*embeddings, *(block * layers), *norm)


def resnet_tensors(stages: str) -> tuple[Tensor, ...]:
    def convolution(outputs: int, size: int, inputs: int) -> tuple[Tensor, ...]:
        kernel = Tensor((outputs, size, size, inputs))
        return kernel, Tensor((outputs,)), Tensor((outputs,))  # and its batch norm

    tensors, inputs = convolution(64, 7, 3), 64
    for stage, blocks in enumerate(stages):
        width = 64 << stage
        for block in range(int(blocks)):
            tensors += convolution(width, 1, inputs) + convolution(width, 3, width)
            tensors += convolution(4 * width, 1, width)
            if block == 0:
                tensors += convolution(4 * width, 1, inputs)
            inputs = 4 * width
    return (*tensors, *linear(1000, inputs))


class Gpt2(nn.Module):
    """A block of GPT-2 between tied embeddings of a smaller vocabulary."""

    def __init__(self, vocabulary: int, width: int = 768) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norms = [nn.LayerNorm(width) for _ in range(3)]
        self.attention = nn.MultiHeadAttention(width, 12, bias=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def __call__(self, text: mx.array) -> mx.array:
        x = self.embedding(text)
        y = self.norms[0](x)
        mask = nn.MultiHeadAttention.create_additive_causal_mask(text.shape[1])
        x = x + self.attention(y, y, y, mask)
        x = x + self.down(nn.gelu_approx(self.up(self.norms[1](x))))
        return self.embedding.as_linear(self.norms[2](x))


def gpt2_model(vocabulary: int, tokens: int) -> tuple[nn.Module, mx.array, mx.array]:
    mx.random.seed(0)
    text = mx.random.randint(0, vocabulary, (1, tokens + 1))
    return Gpt2(vocabulary), text[:, :-1], text[:, 1:]


def mlp_model(layers: int, batch: int) -> tuple[nn.Module, mx.array, mx.array]:
    width = 1024
    mx.random.seed(0)
    hidden = [f for _ in range(layers) for f in (nn.Linear(width, width), nn.relu)]
    x, y = mx.random.normal((batch, width)), mx.random.randint(0, 10, (batch,))
    return nn.Sequential(*hidden, nn.Linear(width, 10)), x, y


def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def all_cases(quick: bool) -> dict[str, Case]:
    """Every case by name; `quick` shrinks those that take long."""
    side, layers, stages = (2048, 1, "1111") if quick else (4096, 12, "3463")
    vocabulary, tokens = (1024, 16) if quick else (4096, 64)
    hidden, batch = (4, 16) if quick else (8, 64)
    gpt2 = gpt2_tensors(layers, tables=1 if quick else 2)
    blocks = f"{layers} of GPT-2's 12 layers, nn.Linear gradients transposed"
    large = (Tensor((side, side)),) * 2
    both = (*UPDATE, *CONTEXT)
    cases = [
        Case("large", f"2 matrices of {side} x {side}", large, both),
        Case("transformer", blocks, gpt2),
        Case("transformer-matched", f"{blocks}, match_layout", gpt2, matched=True),
        Case("lora", "300 tensors of 16 x 1024", (Tensor((16, 1024)),) * 300),
        Case("small", "500 tensors of 64", (Tensor((64,)),) * 500),
        Case("clip", f"2 matrices of {side} x {side}, norm clipped", large, CLIPPING),
        Case("resnet50", f"ResNet, stages of {stages}", resnet_tensors(stages)),
        Case(
            "step-gpt2",
            f"training, one GPT-2 block, vocabulary {vocabulary}, {tokens} tokens",
            contenders=TRAINING,
            model=lambda: gpt2_model(vocabulary, tokens),
        ),
        Case(
            "step-mlp",
            f"training, {hidden} layers of 1024, batch of {batch}",
            contenders=TRAINING,
            model=lambda: mlp_model(hidden, batch),
        ),
    ]
    for i in (8, 12, 16, 19, 22) if quick else range(8, 27):
        one = (Tensor((1 << i,)),)
        cases.append(Case(f"sweep-{i:02}", f"2^{i}", one, SWEEP, swept=True))
    return {case.name: case for case in cases}


class Data:
    """A case's weights and gradients, the same for every contender."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.steps, self.tolerance = 3, 1e-5  # of the check
        self.weights: list[Array]
        self.gradients: list[Array]
        if case.model is None:
            draw = np.random.default_rng(0).standard_normal
            shapes = [tensor.shape for tensor in case.tensors]
            self.weights = [draw(shape, np.float32) for shape in shapes]
            self.gradients = [draw(shape, np.float32) * 0.1 for shape in shapes]
        else:
            # The next step's gradients are of other weights, and a gradient
            # summed in another order differs by more than an update.
            self.steps, self.tolerance = 1, 1e-3
            model, x, y = case.model()
            _, gradients = nn.value_and_grad(model, loss)(model, x, y)
            self.weights, self.gradients = (
                [np.array(leaf) for _, leaf in tree_flatten(tree)]
                for tree in (model.trainable_parameters(), gradients)
            )
        self.size = sum(w.size for w in self.weights)

    @cached_property
    def mlx_gradients(self) -> dict[str, mx.array]:
        """Evaluated gradients that lie as a real backward pass leaves them."""
        gradients = {}
        for i, g in enumerate(self.gradients):
            gradient = mx.array(g)
            if self.case.tensors[i].transposed:
                gradient = mx.contiguous(gradient.T).T
            gradients[f"t{i}"] = gradient
        mx.eval(gradients)
        return gradients

    @cached_property
    def max_norm(self) -> float:
        """Half the global norm, as MLX sums it up in float32: gradients are halved."""
        _, norm = optim.clip_grad_norm(self.mlx_gradients, 0.0)
        return norm.item() / 2

    def expected(self, rule: str) -> list[tuple[Array, ...]]:
        """What each tensor and its state are after `steps` steps, from float64."""
        slots, step = RULES[rule]
        results = []
        for weights, gradients in zip(self.weights, self.gradients, strict=True):
            end = tuple(np.zeros(weights.shape, np.float32) for _ in range(1 + slots))
            for i in range(0, weights.size, 1 << 16):  # stays in the cache
                part = slice(i, i + (1 << 16))
                g = gradients.reshape(-1)[part].astype(np.float64)
                arrays = (weights.reshape(-1)[part].astype(np.float64),)
                arrays += (np.zeros_like(g),) * slots
                for _ in range(self.steps):
                    arrays = step(arrays[0], g, *arrays[1:])
                for x, array in zip(end, arrays, strict=True):
                    x.reshape(-1)[part] = array
            results.append(end)
        return results


def adam(w: Any, g: Any, m: Any, v: Any, decay: float = 0.0) -> tuple[Any, ...]:
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return w * (1 - decay) - CONTEXT_LR * m / (np.sqrt(v) + 1e-8), m, v


def lion(w: Any, g: Any, m: Any) -> tuple[Any, ...]:
    return w - CONTEXT_LR * np.sign(0.9 * m + 0.1 * g), 0.99 * m + 0.01 * g


def scaled(w: Any, g: Any, v: Any) -> tuple[Any, ...]:
    return w - CONTEXT_LR * g / (np.sqrt(v) + 1e-8), v


# In float64: (weight, gradient, state...) -> (weight, state...) behind how many
# arrays of state that takes; MLX's defaults.
RULES: dict[str, tuple[int, Callable[..., tuple[Any, ...]]]] = {
    "adadelta": (2, lambda w, g, v, u: adadelta_step(w, g, v, u, LR, RHO, EPS)),
    "clipped": (2, lambda w, g, v, u: adadelta_step(w, g / 2, v, u, LR, RHO, EPS)),
    "sgd": (0, lambda w, g: (w - CONTEXT_LR * g,)),
    "adam": (2, adam),
    "adamw": (2, lambda w, g, m, v: adam(w, g, m, v, CONTEXT_LR * 0.01)),
    "lion": (1, lion),
    "rmsprop": (1, lambda w, g, v: scaled(w, g, 0.99 * v + 0.01 * g * g)),
    "adagrad": (1, lambda w, g, v: scaled(w, g, v + g * g)),
}
