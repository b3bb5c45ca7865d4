"""Other frameworks as contenders."""

import importlib
import os
import signal
import time
import warnings
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .cases import EPS, LR, RHO, Array, Case, Data

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
CORES = CORES or os.cpu_count() or 1


class Runner:
    """Takes steps; they are finished when `run` returns."""

    rule: str | None = "adadelta"  # the rule that results must follow, if any
    settle = 0.0  # seconds after which its threads have stopped spinning

    def step(self) -> None:
        raise NotImplementedError

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def seconds(self, steps: int) -> float:
        """The mean time of so many steps."""
        start = time.perf_counter()
        self.run(steps)
        return (time.perf_counter() - start) / steps

    def result(self) -> list[tuple[Array, ...]]:
        """Each tensor and its state, as NumPy arrays of their own."""
        return []


class Torch(Runner):
    settle = 0.01

    def __init__(self, data: Data, foreach: bool) -> None:
        torch = importlib.import_module("torch")
        torch.set_num_threads(CORES)
        gpu = mx.default_device() == mx.gpu
        kind = getattr(torch, str(data.case.dtype).rpartition(".")[2])
        self.device = "mps" if gpu else "cpu"
        where = {"device": self.device, "dtype": kind}
        self.synchronize = torch.mps.synchronize if gpu else lambda: None
        self.weights = []
        for w, g in zip(data.weights, data.gradients, strict=True):
            weight = torch.nn.Parameter(torch.tensor(w, **where))
            weight.grad = torch.from_numpy(g).to(**where, copy=True)
            self.weights.append(weight)
        self.optimizer = torch.optim.Adadelta(
            self.weights, lr=LR, rho=RHO, eps=EPS, foreach=foreach
        )
        self.take_step = self.optimizer.step

    def step(self) -> None:
        self.take_step()
        self.synchronize()

    def result(self) -> list[tuple[Array, ...]]:
        rows = []
        for w in self.weights:
            state = self.optimizer.state[w]
            row = (w.detach(), state["square_avg"], state["acc_delta"])
            rows.append(tuple(x.cpu().float().numpy().copy() for x in row))
        return rows


class NotCompiledError(BaseException):
    """torch.compile took too long. PyTorch would wrap an Exception in its own."""


class CompiledTorch(Torch):
    """Compiles in its first steps, and times those apart."""

    most_seconds = 300  # for compiling
    compile_seconds = 0.0

    def __init__(self, data: Data, foreach: bool) -> None:
        super().__init__(data, foreach)
        torch = importlib.import_module("torch")
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")  # on purpose
        torch.compiler.reset()
        self.take_step = torch.compile(self.take_step, fullgraph=False)

    def run(self, steps: int) -> None:
        if self.compile_seconds:
            super().run(steps)
            return

        def give_up(*_: Any) -> None:
            raise NotCompiledError(f"not compiled within {self.most_seconds} s")

        start = time.perf_counter()
        before = signal.signal(signal.SIGALRM, give_up)
        signal.alarm(self.most_seconds)
        try:
            super().run(steps)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        self.compile_seconds = time.perf_counter() - start


class TorchTraining(Torch):
    """A whole step of the same model from the same weights, as `Training` has it."""

    def __init__(self, name: str, case: Case, data: Data) -> None:
        super().__init__(data, foreach=True)
        assert case.model is not None
        torch = importlib.import_module("torch")
        model, *batch = case.model()
        floats = [x.astype(mx.float32) if x.dtype == case.dtype else x for x in batch]
        x, y = (torch.from_numpy(np.array(array)).to(self.device) for array in floats)
        x, y = x.to(self.weights[0].dtype) if x.is_floating_point() else x, y.long()
        paths = [path for path, _ in tree_flatten(model.trainable_parameters())]
        weights = dict(zip(paths, self.weights, strict=True))
        forward = mlp_in_torch if isinstance(model, nn.Sequential) else gpt2_in_torch
        updates = "no-update" not in name
        # In 16 bits two frameworks' gradients differ by more than an update does;
        # the same code is checked in float32.
        if not updates or case.dtype != mx.float32:
            self.rule = None

        def take_step() -> None:
            self.optimizer.zero_grad()
            logits = forward(torch.nn.functional, weights, x)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())
            loss.backward()
            if updates:
                self.optimizer.step()

        self.take_step = take_step


def mlp_in_torch(functional: Any, weights: dict[str, Any], x: Any) -> Any:
    names = [path.removesuffix(".weight") for path in weights if ".weight" in path]
    for i, name in enumerate(names):
        x = functional.relu(x) if i else x
        x = functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
    return x


def gpt2_in_torch(functional: Any, weights: dict[str, Any], text: Any) -> Any:
    def pair(name: str) -> tuple[Any, Any]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, *pair(name))

    def norm(x: Any, i: int) -> Any:
        return functional.layer_norm(x, x.shape[-1:], *pair(f"norms.{i}"))

    table = weights["embedding.weight"]
    x = functional.embedding(text, table)
    y = norm(x, 0)
    parts = (
        linear(y, f"attention.{name}_proj").unflatten(-1, (12, -1)).transpose(-2, -3)
        for name in ("query", "key", "value")
    )
    y = functional.scaled_dot_product_attention(*parts, is_causal=True)
    x = x + linear(y.transpose(-2, -3).flatten(-2), "attention.out_proj")
    y = functional.gelu(linear(norm(x, 1), "up"), approximate="tanh")
    return functional.linear(norm(x + linear(y, "down"), 2), table)


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
