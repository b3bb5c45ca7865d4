"""Who is measured. Each holds its own parameters and state and steps them."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
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

from .cases import CONTEXT, CONTEXT_LR, EPS, LR, RHO, Array, Case, Data, loss

LABELS = {
    "limit": "limit",
    "ours": "mlx-adadelta",
    "ours-compiled": "mlx-adadelta, compiled",
    "ours-mlx": "mlx-adadelta, backend mlx",
    "ours-matched": "mlx-adadelta, matched",
    "ours-matched-compiled": "mlx-adadelta, matched, compiled",
    "ours-clip": "clip_grad_norm, mlx-adadelta",
    "ours-clip-scale": "clip_scale, mlx-adadelta",
    "ours-clip-scale-compiled": "clip_scale, mlx-adadelta, compiled",
    "stock": "MLX AdaDelta",
    "stock-compiled": "MLX AdaDelta, compiled",
    "stock-clip": "clip_grad_norm, MLX AdaDelta",
    "stock-clip-compiled": "clip_grad_norm, MLX AdaDelta, compiled",
    **{name: f"MLX {kind.__name__}" for name, kind in CONTEXT.items()},
    "torch-foreach": "PyTorch Adadelta, foreach",
    "torch-loop": "PyTorch Adadelta, for-loop",
    "optax": "optax adadelta, jax.jit",
    "no-update": "no update",
    "no-update-compiled": "no update, compiled",
}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
CORES = CORES or os.cpu_count() or 1


def family(name: str) -> str:
    return name.partition("-")[0]


class Runner:
    """Takes steps; whoever calls may rely on them being over on return."""

    rule: str | None = "adadelta"  # that results are held against, if any
    settle = 0.0  # seconds after which its threads have stopped spinning

    def step(self) -> None:
        raise NotImplementedError

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def seconds(self, steps: int) -> float:
        """The time of a step, as one of so many."""
        start = time.perf_counter()
        self.run(steps)
        return (time.perf_counter() - start) / steps

    def result(self) -> list[tuple[Array, ...]]:
        """Each tensor and its state, as NumPy arrays of their own."""
        return []


class MlxRunner(Runner):
    """A runner on MLX, whose memory and graph can be looked at."""

    def launch(self) -> Any:
        """Builds one step's graph; its arrays are not evaluated yet."""
        raise NotImplementedError

    def step(self) -> None:
        mx.eval(self.launch())

    def peak(self) -> int:
        """Bytes in one step beyond those held before it."""
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        self.step()
        return mx.get_peak_memory() - before

    def kernels(self) -> int:
        """Kernels of one step, counted in its graph."""
        leaves = [x for _, x in tree_flatten(self.launch())]
        outputs = [x for x in leaves if isinstance(x, mx.array)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "step.dot")
            mx.export_to_dot(str(path), *outputs)
            graph = path.read_text()
        mx.eval(outputs)
        return count_kernels(graph)


# Primitives that only look at memory in another way.
VIEWS = {"Broadcast", "ExpandDims", "Flatten", "Reshape", "Squeeze", "Transpose"}
VIEWS |= {"Slice", "Split", "Unflatten"}


def count_kernels(graph: str) -> int:
    """Primitives of a DOT graph that move memory.

    One AdaDeltaUpdate does several parameters, each with three outputs.
    """
    nodes = re.findall(r'(\d+) \[label ="(\w+)"', graph)
    fused = {node for node, name in nodes if name == "AdaDeltaUpdate"}
    outputs = [node for node in re.findall(r"^(\d+) -> ", graph, re.M) if node in fused]
    others = sum(name not in VIEWS for node, name in nodes if node not in fused)
    return len(outputs) // 3 + others


class Update(MlxRunner):
    """An MLX optimizer given evaluated gradients, the same each step."""

    def __init__(
        self, optimizer: optim.Optimizer, case: Case, data: Data, compiled: bool
    ) -> None:
        self.optimizer, self.gradients = optimizer, data.mlx_gradients
        weights = {f"t{i}": mx.array(w) for i, w in enumerate(data.weights)}
        if case.matched:
            weights = mlx_adadelta.match_layout(weights, self.gradients)
        optimizer.init(weights)
        mx.eval(weights, optimizer.state)
        self.weights = weights
        self.update = self.eager
        if compiled:
            # The tree must be the same object from step to step.
            state = [weights, optimizer.state]
            self.update = mx.compile(self.eager, inputs=state, outputs=state)

    def eager(self, gradients: dict[str, mx.array]) -> None:
        new = self.optimizer.apply_gradients(gradients, self.weights)
        self.weights.update(new)

    def launch(self) -> Any:
        self.update(self.gradients)
        return [self.weights, self.optimizer.state]

    def result(self) -> list[tuple[Array, ...]]:
        return results(self.weights, self.optimizer.state)


class Clipped(Update):
    """The global norm clipped first: in a copy of the gradients, or by their scale."""

    rule = "clipped"

    def __init__(
        self,
        optimizer: optim.Optimizer,
        case: Case,
        data: Data,
        compiled: bool,
        by_scale: bool,
    ) -> None:
        super().__init__(optimizer, case, data, compiled)
        self.max_norm, self.by_scale = data.max_norm, by_scale

    def eager(self, gradients: dict[str, mx.array]) -> None:
        options = {}
        if self.by_scale:
            scale, _ = mlx_adadelta.clip_scale(gradients, self.max_norm)
            options["gradient_scale"] = scale
        else:
            gradients, _ = optim.clip_grad_norm(gradients, self.max_norm)
        new = self.optimizer.apply_gradients(gradients, self.weights, **options)
        self.weights.update(new)


def results(weights: Any, state: Any) -> list[tuple[Array, ...]]:
    flat = dict(tree_flatten(state))
    rows = []
    for path, w in tree_flatten(weights):
        averages = [flat[f"{path}.{x}"] for x in "mvu" if f"{path}.{x}" in flat]
        rows.append(tuple(map(np.array, (w, *averages))))
    return rows


class Training(MlxRunner):
    """A whole step of a model; without an optimizer its forward and backward."""

    def __init__(
        self,
        optimizer: optim.Optimizer | None,
        case: Case,
        compiled: bool,
        matched: bool = False,
    ) -> None:
        assert case.model is not None
        self.model, *self.batch = case.model()
        self.optimizer = optimizer
        self.rule = "adadelta" if optimizer else None
        gradient = nn.value_and_grad(self.model, loss)
        if matched:
            _, gradients = gradient(self.model, *self.batch)
            weights = self.model.trainable_parameters()
            self.model.update(mlx_adadelta.match_layout(weights, gradients))
            del gradients, weights
        state = [self.model.state]
        if optimizer:
            optimizer.init(self.model.trainable_parameters())
            state.append(optimizer.state)
        mx.eval(state)

        def step(x: mx.array, y: mx.array) -> Any:
            value, gradients = gradient(self.model, x, y)
            if optimizer is None:
                return value, gradients
            optimizer.update(self.model, gradients)
            return value

        self.take_step: Callable[..., Any] = step
        if compiled:
            self.take_step = mx.compile(step, inputs=state, outputs=state)

    def launch(self) -> Any:
        value = self.take_step(*self.batch)
        if self.optimizer is None:
            return value
        return [value, self.model.state, self.optimizer.state]

    def result(self) -> list[tuple[Array, ...]]:
        if self.optimizer is None:
            return []
        return results(self.model.trainable_parameters(), self.optimizer.state)


class Torch(Runner):
    settle = 0.01

    def __init__(self, data: Data, foreach: bool) -> None:
        torch = importlib.import_module("torch")
        torch.set_num_threads(CORES)
        gpu = mx.default_device() == mx.gpu
        device = "mps" if gpu else "cpu"
        self.synchronize = torch.mps.synchronize if gpu else lambda: None
        self.weights = []
        for w, g in zip(data.weights, data.gradients, strict=True):
            weight = torch.nn.Parameter(torch.tensor(w, device=device))
            weight.grad = torch.from_numpy(g).to(device)
            self.weights.append(weight)
        self.optimizer = torch.optim.Adadelta(
            self.weights, lr=LR, rho=RHO, eps=EPS, foreach=foreach
        )

    def step(self) -> None:
        self.optimizer.step()
        self.synchronize()

    def result(self) -> list[tuple[Array, ...]]:
        rows = []
        for w in self.weights:
            state = self.optimizer.state[w]
            row = (w.detach(), state["square_avg"], state["acc_delta"])
            rows.append(tuple(x.cpu().numpy().copy() for x in row))
        return rows


class Optax(Runner):
    settle = 0.01

    def __init__(self, data: Data) -> None:
        jax = importlib.import_module("jax")
        jax.config.update("jax_platforms", "cpu")
        optax = importlib.import_module("optax")
        optimizer = optax.adadelta(LR, rho=RHO, eps=EPS)
        self.weights = [jax.numpy.array(w) for w in data.weights]
        self.gradients = [jax.numpy.array(g) for g in data.gradients]
        self.state = optimizer.init(self.weights)

        @partial(jax.jit, donate_argnums=(0, 1))
        def update(weights: Any, state: Any, gradients: Any) -> Any:
            changes, state = optimizer.update(gradients, state, weights)
            return optax.apply_updates(weights, changes), state

        self.update, self.wait = update, jax.block_until_ready

    def step(self) -> None:
        self.weights, self.state = self.update(self.weights, self.state, self.gradients)
        self.wait((self.weights, self.state))

    def result(self) -> list[tuple[Array, ...]]:
        averages = next(part for part in self.state if hasattr(part, "e_g"))
        columns = (self.weights, averages.e_g, averages.e_x)
        return [tuple(map(np.array, row)) for row in zip(*columns, strict=True)]


@cache
def compiled_limit() -> ctypes.CDLL:
    """Builds limit.cpp for this very machine."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-pthread"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-march=native")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "limit.so")
        source = Path(__file__).with_name("limit.cpp")
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        return ctypes.CDLL(str(library))


class Limit(Runner):
    """The traffic of a step, with one thread or all: whichever is quicker."""

    rule = None

    def __init__(self, data: Data) -> None:
        # Starts that differ modulo a page: the streams would share cache sets.
        span = (data.size + 15) // 16 * 16 + 272
        self.memory = np.full(4 * span + 16, 1e-9, np.float32)
        start = self.memory.ctypes.data + -self.memory.ctypes.data % 64
        streams = [ctypes.c_void_p(start + 4 * span * i) for i in range(4)]
        size = ctypes.c_size_t(data.size)
        self.traffic = partial(compiled_limit().traffic, *streams, size)
        self.threads = CORES

    def run(self, steps: int) -> None:
        self.traffic(ctypes.c_size_t(self.threads), ctypes.c_size_t(steps))

    def seconds(self, steps: int) -> float:
        times = []
        for self.threads in {1, CORES}:
            times.append(super().seconds(steps))
        return min(times)


class DeviceLimit(MlxRunner):
    """On a GPU: a kernel of MLX that moves as many bytes, half of them out."""

    rule = None

    def __init__(self, data: Data) -> None:
        self.x = mx.ones(7 * data.size // 2)
        mx.eval(self.x)

    def launch(self) -> Any:
        self.x = -self.x
        return self.x


def make(name: str, case: Case, data: Data) -> Runner:
    """The contender of that name, ready to step."""
    if name == "limit":
        return DeviceLimit(data) if mx.default_device() == mx.gpu else Limit(data)
    if name.startswith("torch"):
        return Torch(data, foreach=name == "torch-foreach")
    if name == "optax":
        return Optax(data)
    compiled = name.endswith("-compiled")
    optimizer: optim.Optimizer | None = None
    if name.startswith("ours"):
        backend = "mlx" if name == "ours-mlx" else "auto"
        optimizer = mlx_adadelta.AdaDelta(LR, RHO, EPS, backend=backend)
    elif name.startswith("stock"):
        optimizer = optim.AdaDelta(LR, RHO, EPS)
    elif name in CONTEXT:
        optimizer = CONTEXT[name](CONTEXT_LR)
    if case.model is not None:
        return Training(optimizer, case, compiled, "matched" in name)
    assert optimizer is not None
    if "-clip" in name:
        return Clipped(optimizer, case, data, compiled, by_scale="-scale" in name)
    runner = Update(optimizer, case, data, compiled)
    runner.rule = name if name in CONTEXT else "adadelta"
    return runner


def missing(name: str) -> str:
    """Why a contender cannot run here; empty where it can."""
    needed = {"torch": ("torch",), "optax": ("jax", "optax")}
    for package in needed.get(family(name), ()):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if mx.default_device() == mx.gpu and name in ("optax", "torch-foreach"):
        return "does not run on this GPU"
    if name == "limit" and mx.default_device() == mx.cpu:
        try:
            compiled_limit()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"limit.cpp does not compile: {error}"
    return ""


def versions() -> dict[str, str]:
    """Of the packages that were measured, where they are installed."""
    found = {}
    for package in ("mlx-adadelta", "mlx", "numpy", "torch", "jax", "optax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
