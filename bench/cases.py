"""The cases: shapes of a step's tensors, and the layout of their gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

Array = NDArray[np.float32]
LR, RHO, EPS = 1.0, 0.9, 1e-6
CONTEXT_LR = 1e-3  # of the optimizers that are not AdaDelta

OURS = ("ours", "ours-compiled")
STOCK = ("stock", "stock-compiled")
TORCH = ("torch-foreach", "torch-loop")
TORCH_COMPILED = ("torch-foreach-compiled", "torch-loop-compiled")
UPDATE = (*OURS, "ours-mlx", *STOCK, *TORCH, *TORCH_COMPILED, "optax")
# For 16-bit weights: also other options, and float32 weights for comparison.
NARROW = (*OURS, "ours-stochastic", "ours-wide", "ours-state", "ours-float32")
NARROW += ("ours-mlx", *STOCK, *TORCH, *TORCH_COMPILED)
MANY = (*UPDATE, "arrays")
SWEEP = (*OURS, *STOCK, "torch-foreach", "optax")
CLIPPING = (*OURS, "stock-clip", "stock-clip-compiled", "ours-clip")
CLIPPING += ("ours-clip-scale", "ours-clip-scale-compiled", "ours-norm")
TRAINING = ("no-update", "no-update-compiled", *OURS)
TRAINING += ("ours-matched", "ours-matched-compiled", *STOCK)
TRAINING += ("torch-no-update", "torch-foreach")
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
    """A parameter; `transposed` describes its gradient (as for an nn.Linear weight)."""

    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Case:
    """One step to measure: an update of `tensors`, or all of a `model`'s training."""

    name: str
    title: str
    tensors: tuple[Tensor, ...] = ()
    contenders: tuple[str, ...] = UPDATE
    dtype: mx.Dtype = mx.float32  # of weights and gradients
    model: Callable[[], tuple[nn.Module, mx.array, mx.array]] | None = None


def linear(outputs: int, inputs: int) -> tuple[Tensor, ...]:
    return Tensor((outputs, inputs), transposed=True), Tensor((outputs,))


def gpt2_tensors(layers: int, tables: int) -> tuple[Tensor, ...]:
    """GPT-2's parameters, with the first `tables` of its two embedding tables."""
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
        causal = nn.MultiHeadAttention.create_additive_causal_mask
        mask = causal(text.shape[1], x.dtype)
        x = x + self.attention(y, y, y, mask)
        x = x + self.down(nn.gelu_approx(self.up(self.norms[1](x))))
        return self.embedding.as_linear(self.norms[2](x))


def gpt2_model(
    vocabulary: int, tokens: int, dtype: mx.Dtype = mx.float32
) -> tuple[nn.Module, mx.array, mx.array]:
    mx.random.seed(0)
    text = mx.random.randint(0, vocabulary, (1, tokens + 1))
    model = Gpt2(vocabulary)
    model.set_dtype(dtype)
    return model, text[:, :-1], text[:, 1:]


def mlp_model(
    layers: int, batch: int, dtype: mx.Dtype = mx.float32
) -> tuple[nn.Module, mx.array, mx.array]:
    width = 1024
    mx.random.seed(0)
    hidden = [f for _ in range(layers) for f in (nn.Linear(width, width), nn.relu)]
    x, y = mx.random.normal((batch, width), dtype), mx.random.randint(0, 10, (batch,))
    model = nn.Sequential(*hidden, nn.Linear(width, 10))
    model.set_dtype(dtype)
    return model, x, y


def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def all_cases(quick: bool) -> dict[str, Case]:
    """Every case by name; `quick` makes the large ones smaller."""
    side, layers, stages = (1024, 1, "1111") if quick else (4096, 12, "3463")
    vocabulary, tokens = (1024, 16) if quick else (4096, 64)
    hidden, batch = (4, 16) if quick else (8, 64)
    gpt2 = gpt2_tensors(layers, tables=1 if quick else 2)
    blocks = f"GPT-2 of {layers} layers, gradients transposed"
    matrices = f"2 matrices of {side} x {side}"
    large, turned = ((Tensor((side, side), x),) * 2 for x in (False, True))
    both = (*UPDATE, *CONTEXT)
    cases = [
        Case("large", matrices, large, both),
        Case("transformer", blocks, gpt2),
        Case("transposed", f"{matrices}, gradients transposed", turned),
        Case("lora", "300 tensors of 16 x 1024", (Tensor((16, 1024)),) * 300, MANY),
        Case("small", "500 tensors of 64", (Tensor((64,)),) * 500, MANY),
        Case("clip", f"{matrices}, norm clipped", large, CLIPPING),
        Case("resnet50", f"ResNet, stages of {stages}", resnet_tensors(stages)),
    ]
    for name, dtype in (("bf16", mx.bfloat16), ("fp16", mx.float16)):
        for suffix, tensors in (("", large), ("-transposed", turned)):
            title = f"{matrices} of {name}{suffix.replace('-', ', ')}"
            cases.append(Case(name + suffix, title, tensors, NARROW, dtype=dtype))
    gpt2_title = f"one GPT-2 block, vocabulary {vocabulary}, {tokens} tokens"
    mlp_title = f"{hidden} layers of 1024, batch of {batch}"
    step_types = [("", mx.float32), ("-bf16", mx.bfloat16)]
    for suffix, dtype in step_types[: 1 if quick else 2]:
        for name, title, model in (
            ("step-gpt2", gpt2_title, partial(gpt2_model, vocabulary, tokens, dtype)),
            ("step-mlp", mlp_title, partial(mlp_model, hidden, batch, dtype)),
        ):
            full = f"training, {title}{suffix.replace('-', ', ')}"
            new = Case(name + suffix, full, (), TRAINING, dtype=dtype, model=model)
            cases.append(new)
    for i in (8, 12, 16, 19, 22) if quick else range(8, 27):
        one = (Tensor((1 << i,)),)
        cases.append(Case(f"sweep-{i:02}", f"2^{i}", one, SWEEP))
    return {case.name: case for case in cases}


# By type: the relative error of results, and the smallest number that counts.
TOLERANCE = {mx.float32: (1e-5, 1e-15), mx.bfloat16: (2**-5, 1e-15)}
TOLERANCE[mx.float16] = (2**-8, 2**-22)


def to_numpy(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32))


class Data:
    """A case's weights and gradients, the same for every contender.

    They are numbers of the case's type, held in float32.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.steps = 3  # of the check
        self.tolerance, self.least = TOLERANCE[case.dtype]
        if case.model is None:
            draw = np.random.default_rng(0).standard_normal
            shapes = [tensor.shape for tensor in case.tensors]
            drawn = [draw(shape, np.float32) for shape in shapes]
            drawn += [draw(shape, np.float32) * 0.1 for shape in shapes]
            arrays = [to_numpy(mx.array(x, case.dtype)) for x in drawn]
            self.weights, self.gradients = arrays[: len(shapes)], arrays[len(shapes) :]
        else:
            # One step only: a gradient that is summed in another order differs by
            # more than an update, and the next step's gradients depend on it.
            self.steps, self.tolerance = 1, max(1e-3, self.tolerance)
            model, x, y = case.model()
            _, gradients = nn.value_and_grad(model, loss)(model, x, y)
            self.weights, self.gradients = (
                [to_numpy(x) for _, x in tree_flatten(tree)]
                for tree in (model.trainable_parameters(), gradients)
            )
        self.made: dict[mx.Dtype, dict[str, mx.array]] = {}
        self.size = sum(w.size for w in self.weights)

    def mlx_gradients(self, dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
        """Evaluated gradients of the case's type, laid out as a backward pass does."""
        dtype = dtype or self.case.dtype
        if dtype in self.made:
            return self.made[dtype]
        gradients = {}
        for i, g in enumerate(self.gradients):
            gradient = mx.array(g, dtype)
            if self.case.tensors[i].transposed:
                gradient = mx.contiguous(gradient.T).T
            gradients[f"t{i}"] = gradient
        mx.eval(gradients)
        return self.made.setdefault(dtype, gradients)

    @cached_property
    def max_norm(self) -> float:
        """Half of the gradients' norm, so that they are halved."""
        squares = (np.square(g, dtype=np.float64).sum() for g in self.gradients)
        return float(np.sqrt(sum(squares))) / 2

    @cached_property
    def max_norm_of_mlx(self) -> float:
        """Half of the norm that MLX computes, which is off by percents."""
        _, norm = optim.clip_grad_norm(self.mlx_gradients(), 0.0)
        return float(norm.item()) / 2

    def expected(self, rule: str) -> list[tuple[Array, ...]]:
        """Each tensor and its state after the check's steps by MLX in float64."""
        kind = CONTEXT.get(rule)
        optimizer = kind(CONTEXT_LR) if kind else optim.AdaDelta(LR, RHO, EPS)
        scale = 0.5 if rule == "clipped" else 1.0
        results = []
        for pair in zip(self.weights, self.gradients, strict=True):
            w, g = (mx.array(x, mx.float64) for x in pair)
            state: dict[str, mx.array] = {}
            with mx.stream(mx.cpu):
                optimizer.init_single(w, state)
                for _ in range(self.steps):
                    w = optimizer.apply_single(g * scale, w, state)
                    mx.eval(w, state)
            averages = [state[x] for x in "mvu" if x in state]
            results.append(tuple(np.array(x, np.float32) for x in (w, *averages)))
        return results
