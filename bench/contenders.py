"""The contenders. Each holds its own parameters and state and steps them."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

import mlx_adadelta

from .cases import CONTEXT, CONTEXT_LR, EPS, LR, RHO, Array, Case, Data, loss, to_numpy
from .peers import CORES, CompiledTorch, Optax, Runner, Torch, TorchTraining

LABELS = {
    "limit": "limit",
    "limit-wide": "limit, float32 state",
    "limit-float32": "limit, float32",
    "limit-state": "limit, float32 and 16-bit state",
    "limit-norm": "limit of the norm",
    "floor": "arithmetic alone",
    "arrays": "as many arrays, no update",
    "ours": "mlx-adadelta",
    "ours-mlx": "mlx-adadelta, backend mlx",
    "ours-stochastic": "mlx-adadelta, stochastic rounding",
    "ours-wide": "mlx-adadelta, float32 state",
    "ours-float32": "mlx-adadelta, float32",
    "ours-state": "mlx-adadelta, float32 and stochastic 16-bit state",
    "ours-matched": "mlx-adadelta, matched",
    "ours-clip": "clip_grad_norm, mlx-adadelta",
    "ours-clip-scale": "clip_scale, mlx-adadelta",
    "ours-norm": "clip_scale alone",
    "stock": "MLX AdaDelta",
    "stock-clip": "clip_grad_norm, MLX AdaDelta",
    **{name: f"MLX {kind.__name__}" for name, kind in CONTEXT.items()},
    "torch-no-update": "PyTorch, no update",
    "torch-foreach": "PyTorch Adadelta, foreach",
    "torch-loop": "PyTorch Adadelta, for-loop",
    "optax": "optax adadelta, jax.jit",
    "no-update": "no update",
}
COMPILED = ("ours", "ours-matched", "ours-clip-scale", "stock", "stock-clip")
COMPILED += ("torch-foreach", "torch-loop", "no-update")
LABELS |= {f"{name}-compiled": f"{LABELS[name]}, compiled" for name in COMPILED}


def family(name: str) -> str:
    return name.partition("-")[0]


def kept_types(name: str, dtype: mx.Dtype) -> tuple[mx.Dtype, mx.Dtype]:
    """The types of the weights and of the state, for a case of dtype."""
    weight = mx.float32 if name.endswith(("-float32", "-state")) else dtype
    state = mx.float32 if name.endswith(("-float32", "-wide")) else dtype
    return weight, state


def limit_of(name: str) -> str:
    """The limit that moves as many bytes as this contender."""
    suffix = name.rpartition("-")[2]
    return f"limit-{suffix}" if f"limit-{suffix}" in LABELS else "limit"


def step_bytes(name: str, dtype: mx.Dtype) -> int:
    """Bytes a parameter: w, g, v, u read and w, v, u written; for a norm g read."""
    weight, state = (x.size for x in kept_types(name, dtype))
    return weight if name.endswith("-norm") else 3 * weight + 4 * state


class MlxRunner(Runner):
    """A runner on MLX, which can tell the memory of a step."""

    def launch(self) -> Any:
        """Builds one step's graph; its arrays are not evaluated yet."""
        raise NotImplementedError

    def step(self) -> None:
        mx.eval(self.launch())

    def peak(self) -> int:
        """Bytes that a step allocates above those held before it."""
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        self.step()
        return mx.get_peak_memory() - before


class Update(MlxRunner):
    """An MLX optimizer given evaluated gradients, the same each step."""

    def __init__(self, name: str, case: Case, data: Data) -> None:
        optimizer = make_optimizer(name, case)
        assert optimizer is not None
        self.optimizer, self.name, self.data = optimizer, name, data
        if "-clip" in name:
            self.rule = "clipped"
        elif name in CONTEXT:
            self.rule = name
        dtype, _ = kept_types(name, case.dtype)
        self.gradients = data.mlx_gradients(dtype)
        weights = {f"t{i}": mx.array(w, dtype) for i, w in enumerate(data.weights)}
        optimizer.init(weights)
        mx.eval(weights, optimizer.state)
        self.weights = weights
        self.update = self.eager
        if name.endswith("-compiled"):
            # The tree must be the same object from step to step.
            state = [weights, optimizer.state]
            self.update = mx.compile(self.eager, inputs=state, outputs=state)

    def eager(self, gradients: dict[str, mx.array]) -> None:
        options = {}
        if "-clip-scale" in self.name:
            scale, _ = mlx_adadelta.clip_scale(gradients, self.data.max_norm)
            options["gradient_scale"] = scale
        elif "-clip" in self.name:
            largest = self.data.max_norm_of_mlx
            gradients, _ = optim.clip_grad_norm(gradients, largest)
        new = self.optimizer.apply_gradients(gradients, self.weights, **options)
        self.weights.update(new)

    def launch(self) -> Any:
        self.update(self.gradients)
        return [self.weights, self.optimizer.state]

    def result(self) -> list[tuple[Array, ...]]:
        return results(self.weights, self.optimizer.state)


def results(weights: Any, state: Any) -> list[tuple[Array, ...]]:
    flat = dict(tree_flatten(state))
    rows = []
    for path, w in tree_flatten(weights):
        averages = [flat[f"{path}.{x}"] for x in "mvu" if f"{path}.{x}" in flat]
        rows.append(tuple(map(to_numpy, (w, *averages))))
    return rows


class Other(MlxRunner):
    """What is no update: a function that takes the arrays of its last call."""

    rule = None

    def __init__(self, function: Callable[[Any], Any], arrays: Any = ()) -> None:
        mx.eval(arrays)
        self.function, self.arrays = function, arrays

    def launch(self) -> Any:
        self.arrays = self.function(self.arrays)
        return self.arrays


def make_norm(data: Data) -> Other:
    """clip_scale without an update; "ours-clip-scale" is checked with one."""
    gradients, largest = data.mlx_gradients(), data.max_norm
    return Other(lambda _: mlx_adadelta.clip_scale(gradients, largest))


def make_arrays(data: Data) -> Other:
    """As many arrays as an update's, through a primitive of MLX that does nothing."""
    gradients = [[g] for g in data.mlx_gradients().values()]
    tensors = [[mx.array(w) for _ in range(3)] for w in data.weights]
    return Other(lambda last: list(map(mx.depends, last, gradients)), tensors)


class Training(MlxRunner):
    """A whole step of a model; without an optimizer its forward and backward."""

    def __init__(self, name: str, case: Case) -> None:
        assert case.model is not None
        self.model, *self.batch = case.model()
        self.optimizer = optimizer = make_optimizer(name, case)
        self.rule = "adadelta" if optimizer else None
        gradient = nn.value_and_grad(self.model, loss)
        if "-matched" in name:
            _, gradients = gradient(self.model, *self.batch)
            weights = self.model.trainable_parameters()
            self.model.update(mlx_adadelta.match_layout(weights, gradients))
            del gradients, weights
        state = [self.model.state]
        if optimizer:
            optimizer.init(self.model.trainable_parameters())
            state.append(optimizer.state)
        mx.eval(state)
        self.state = state

        def step(x: mx.array, y: mx.array) -> Any:
            value, gradients = gradient(self.model, x, y)
            if optimizer is None:
                return value, gradients
            optimizer.update(self.model, gradients)
            return value

        self.take_step: Callable[..., Any] = step
        if name.endswith("-compiled"):
            self.take_step = mx.compile(step, inputs=state, outputs=state)

    def launch(self) -> Any:
        return [self.take_step(*self.batch), self.state]

    def result(self) -> list[tuple[Array, ...]]:
        assert self.optimizer is not None
        return results(self.model.trainable_parameters(), self.optimizer.state)


@cache
def compiled_limit() -> ctypes.CDLL:
    """Builds limit.cpp for this machine."""
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-pthread"]
    flags += ["-fno-math-errno", "-ffp-contract=off"]
    flags += ["-I", str(Path(__file__).parents[1] / "metal")]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-march=native")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "limit.so")
        source = Path(__file__).with_name("limit.cpp")
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


class Native(Runner):
    """A loop of limit.cpp: the faster of one thread and all threads."""

    rule = None
    threads = CORES

    def __init__(self, loop: Callable[..., None]) -> None:
        self.loop = loop

    def run(self, steps: int) -> None:
        self.loop(ctypes.c_size_t(self.threads), ctypes.c_size_t(steps))

    def seconds(self, steps: int) -> float:
        times = []
        for self.threads in {1, CORES}:
            times.append(super().seconds(steps))
        return min(times)


class Limit(Native):
    """The traffic of a step, for weights and state of so many bytes."""

    def __init__(self, size: int, weight: int, state: int) -> None:
        # Starts must differ modulo a page, or the streams share cache sets.
        widths = weight, weight, state, state
        spans = [(width * size + 63) // 64 * 64 + 1088 for width in widths]
        self.memory = np.ones(sum(spans) + 64, np.uint8)
        start = self.memory.ctypes.data + -self.memory.ctypes.data % 64
        arrays = (ctypes.c_void_p * 4)(*np.cumsum([start, *spans[:3]]).tolist())
        numbers = map(ctypes.c_size_t, (weight, state, size))
        super().__init__(partial(compiled_limit().traffic, arrays, *numbers))


def make_native(name: str, case: Case, size: int) -> Runner:
    """The limit or the floor of a step of so many parameters."""
    if name == "floor":
        return Native(partial(compiled_limit().arithmetic, ctypes.c_size_t(size)))
    if mx.default_device() == mx.gpu:
        # A kernel of MLX that reads half of the bytes and writes the others.
        return Other(mx.negative, mx.ones(step_bytes(name, case.dtype) * size // 8))
    weight, state = (x.size for x in kept_types(name, case.dtype))
    return Limit(size, weight, 0 if name == "limit-norm" else state)


def make_optimizer(name: str, case: Case) -> optim.Optimizer | None:
    if name in CONTEXT:
        return CONTEXT[name](CONTEXT_LR)
    if family(name) == "stock":
        return optim.AdaDelta(LR, RHO, EPS)
    if family(name) != "ours":
        return None
    weight, state = kept_types(name, case.dtype)
    options: dict[str, Any] = {"backend": "mlx"} if name == "ours-mlx" else {}
    if weight != state:
        options["state_dtype"] = state
    if name in ("ours-stochastic", "ours-state"):
        options["stochastic_rounding"] = True
    return mlx_adadelta.AdaDelta(LR, RHO, EPS, **options)


def make(name: str, case: Case, data: Data) -> Runner:
    """The contender of that name, ready to step."""
    if family(name) in ("limit", "floor"):
        return make_native(name, case, data.size)
    if family(name) == "torch" and case.model is not None:
        return TorchTraining(name, case, data)
    if family(name) == "torch":
        kind = CompiledTorch if name.endswith("-compiled") else Torch
        return kind(data, "foreach" in name)
    of_data = {"optax": Optax, "arrays": make_arrays, "ours-norm": make_norm}
    if name in of_data:
        return of_data[name](data)
    if case.model is not None:
        return Training(name, case)
    return Update(name, case, data)


def missing(name: str, quick: bool = False) -> str:
    """Why a contender cannot run here; empty where it can."""
    needed = {"torch": ("torch",), "optax": ("jax", "optax")}
    for package in needed.get(family(name), ()):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if quick and family(name) == "torch" and name.endswith("-compiled"):
        return "--quick leaves torch.compile out"
    if mx.default_device() == mx.gpu:
        if name.startswith(("optax", "floor", "torch-foreach", "torch-loop-")):
            return "does not run on this GPU"
    elif family(name) in ("limit", "floor"):
        try:
            compiled_limit()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"limit.cpp does not compile: {error}"
    return ""


def versions() -> dict[str, str]:
    """Versions of the measured packages, as far as they are installed."""
    installed = {x.name: x.version for x in importlib.metadata.distributions()}
    names = ("mlx-adadelta", "mlx", "numpy", "torch", "jax", "optax")
    return {name: installed[name] for name in names if name in installed}
