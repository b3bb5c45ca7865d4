"""Trains a small transformer on text with AdaDelta, Adam, AdamW and SGD."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from rich.progress import track

import mlx_adadelta
from experiments.digits import loss_fn, markdown_table, prepare_out
from experiments.options import Parser, positive
from experiments.precision import Task, text

BATCH = 8
Make = Callable[[float], optim.Optimizer]
# Each with the rates that are tried; the best one goes on to the comparison.
TRIED: dict[str, tuple[Make, tuple[float, ...]]] = {
    "AdaDelta, this one": (mlx_adadelta.AdaDelta, (1, 3, 10)),
    "AdaDelta, stock": (optim.AdaDelta, (1, 3, 10)),
    "Adam": (optim.Adam, (1e-3, 3e-3, 1e-2)),
    "AdamW": (optim.AdamW, (1e-3, 3e-3, 1e-2)),
    "SGD, momentum 0.9": (lambda lr: optim.SGD(lr, momentum=0.9), (0.1, 0.3, 1)),
}


def bytes_of(tree: object) -> int:
    return sum(x.nbytes for _, x in tree_flatten(tree))


class Run:
    """One training; the runs of a comparison take each step in turn."""

    def __init__(self, task: Task, make: Make, lr: float, seed: int) -> None:
        self.model, self.optimizer = task.model(seed), make(lr)
        self.optimizer.init(self.model.trainable_parameters())
        mx.eval(self.model.state, self.optimizer.state)
        self.loss_and_grad = nn.value_and_grad(self.model, loss_fn)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.extra = 0  # the most memory beyond parameters and state

    def step(self, x: mx.array, y: mx.array) -> None:
        mx.synchronize()
        mx.reset_peak_memory()
        before, start = mx.get_active_memory(), time.perf_counter()
        loss, gradients = self.loss_and_grad(self.model, x, y)
        self.optimizer.update(self.model, gradients)
        del gradients
        mx.eval(loss, self.model.state, self.optimizer.state)
        self.seconds.append(time.perf_counter() - start)
        self.extra = max(self.extra, mx.get_peak_memory() - before)
        self.losses.append(loss.item())


def train(task: Task, runs: list[Run], seed: int) -> None:
    data, draw = task.data, np.random.default_rng(seed)
    for _ in range(task.steps):
        rows = draw.integers(len(data.x_train), size=BATCH)
        x, y = mx.array(data.x_train[rows]), mx.array(data.y_train[rows])
        for run in runs:
            run.step(x, y)


def best_rates(task: Task) -> dict[str, float]:
    """Of seed 0, by the mean loss of the last tenth of the steps."""
    best = {}
    for name, (make, rates) in track(TRIED.items(), "rates"):
        runs = [Run(task, make, lr, 0) for lr in rates]
        train(task, runs, 0)
        ends = [np.mean(run.losses[-task.steps // 10 :]) for run in runs]
        best[name] = rates[int(np.nanargmin(ends))]
    return best


def table(task: Task, rates: dict[str, float], found: list[list[Run]]) -> str:
    rows = [
        ["", "lr", "test loss", "ms a step", "state, bytes a parameter", "peak, MB"]
    ]
    x, y = mx.array(task.data.x_test), mx.array(task.data.y_test)
    for runs in zip(*found, strict=True):
        name = list(rates)[len(rows) - 1]
        losses = [loss_fn(run.model, x, y).item() for run in runs]
        parameters = bytes_of(runs[0].model.parameters())
        state = bytes_of(runs[0].optimizer.state)
        peak = parameters + state + max(run.extra for run in runs)
        rows.append(
            [
                name,
                f"{rates[name]:g}",
                f"{np.mean(losses):.3f} ± {np.std(losses, ddof=len(losses) > 1):.3f}",
                f"{1e3 * np.median([run.seconds for run in runs]):.2f}",
                f"{4 * state / parameters:.1f}",
                f"{peak / 1e6:.2f}",
            ]
        )
    return markdown_table(*rows)


def draw(rates: dict[str, float], found: list[list[Run]], path: Path) -> None:
    """The mean loss over the seeds, smoothed, over steps and over time."""
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for name, runs in zip(rates, zip(*found, strict=True), strict=True):
        losses = np.mean([run.losses for run in runs], axis=0)
        width = max(1, len(losses) // 30)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        clock = np.cumsum(np.median([run.seconds for run in runs], axis=0))[width - 1 :]
        # Both AdaDeltas have the same losses: one line must not hide the other.
        style = "--" if "stock" in name else "-"
        by_step.plot(np.arange(len(smooth)) + width, smooth, style, label=name)
        by_time.plot(clock, smooth, style)
    by_step.set(xlabel="step", ylabel="training loss")
    by_time.set(xlabel="seconds")
    by_step.legend(fontsize=8)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="optimizers", description=__doc__, allow_abbrev=False)
    parser.option("--steps", 400, type=positive, metavar="N")
    parser.option("--seeds", 3, type=positive, metavar="N")
    out = Path("docs/optimizers.png")
    parser.option("--out", out, type=Path, metavar="FILE.png")
    options, _ = parser.parse(argv, prepare_out)
    task = text(lr=1.0, rho=0.9, steps=options.steps)
    rates, found = best_rates(task), []
    for seed in track(range(options.seeds), "seeds"):
        makes = ((TRIED[name][0], lr) for name, lr in rates.items())
        runs = [Run(task, make, lr, seed) for make, lr in makes]
        train(task, runs, seed)
        found.append(runs)
    draw(rates, found, options.out)
    print(table(task, rates, found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
