"""Shows the effect of rho, eps and lr on scikit-learn's digits."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from rich.progress import track

from experiments.digits import (
    accuracy,
    batches,
    build_model,
    load_digits,
    loss_fn,
    markdown_table,
    prepare_out,
)
from experiments.options import Parser, positive
from mlx_adadelta import AdaDelta

RHOS = (0.9, 0.95, 0.99)
EPSILONS = (1e-8, 1e-6, 1e-4, 1e-2)
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
BATCH = 32
COLORS = ("#08306b", "#2a7ab9", "#d95f02", "#7f2704")
Setting = tuple[float, float, float]  # rho, eps, lr
# Loss over the last epoch, test error in %, and the size of every step.
Result = tuple[float, float, list[float]]
Found = dict[Setting, Result]  # medians over the seeds, and the first seed's sizes


def size_of_step(before: dict[str, Any], after: dict[str, Any]) -> mx.array:
    """The root mean square of a step's change of the weights."""
    pairs = zip(tree_flatten(before), tree_flatten(after), strict=True)
    moved = [mx.flatten(new - old) for (_, old), (_, new) in pairs]
    return mx.sqrt(mx.concatenate(moved).square().mean())


def train(setting: Setting, seed: int, epochs: int) -> Result:
    rho, eps, lr = setting
    data = load_digits()
    model = build_model(data, mx.float32, seed)
    optimizer = AdaDelta(lr, rho=rho, eps=eps)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        loss, gradients = loss_and_grad(model, x, y)
        before = model.trainable_parameters()
        optimizer.update(model, gradients)
        return loss, size_of_step(before, model.trainable_parameters())

    shuffle = np.random.default_rng(seed)
    sizes: list[float] = []
    for _ in range(epochs):
        losses = []
        for x, y in batches(data, BATCH, shuffle):
            loss, moved = step(x, y)
            mx.eval(loss, moved, state)
            losses.append(loss.item())
            sizes.append(moved.item())
    error = 100 * (1 - accuracy(model, data, mx.float32))
    return float(np.mean(losses)), error, sizes


def draw(found: Found, path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    by_eps, by_rate, steps = figure.subplots(1, 3)
    for rho, color in zip(RHOS, COLORS, strict=False):
        losses = [found[rho, eps, 1.0][0] for eps in EPSILONS]
        by_eps.plot(EPSILONS, losses, "o-", color=color, label=f"rho {rho}")
    for eps, color in zip(EPSILONS, COLORS, strict=False):
        losses = [found[0.9, eps, lr][0] for lr in RATES]
        by_rate.plot(RATES, losses, "o-", color=color, label=f"eps {eps:.0e}")
        sizes = found[0.9, eps, 1.0][2]
        smooth = [np.mean(sizes[i - i // 4 : i + 1]) for i in range(len(sizes))]
        steps.plot(smooth, color=color, label=f"eps {eps:.0e}")
    for axes in (by_eps, by_rate, steps):
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=8)
    by_eps.set(title="lr 1", xlabel="eps", ylabel="training loss, last epoch")
    by_rate.set(title="rho 0.9", xlabel="lr", ylabel="training loss, last epoch")
    steps.set(title="rho 0.9, lr 1", xlabel="step", ylabel="RMS of a step")
    figure.savefig(path)


def table(found: Found) -> str:
    """Test errors at lr 1."""
    rows = [["eps", *(f"rho {rho}" for rho in RHOS)]]
    for eps in EPSILONS:
        errors = [f"{found[rho, eps, 1.0][1]:.1f}" for rho in RHOS]
        rows.append([f"{eps:.0e}", *errors])
    return markdown_table(*rows)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="choosing", description=__doc__, allow_abbrev=False)
    parser.option("--epochs", 20, type=positive, metavar="N")
    parser.option("--seeds", 3, type=positive, metavar="N")
    out = Path("docs/choosing.png")
    parser.option("--out", out, type=Path, metavar="FILE.png")
    options, _ = parser.parse(argv, prepare_out)
    settings = [(rho, eps, 1.0) for rho in RHOS for eps in EPSILONS]
    settings += [(0.9, eps, lr) for eps in EPSILONS for lr in RATES]
    found: Found = {}
    for setting in track(dict.fromkeys(settings), ""):
        runs = [train(setting, seed, options.epochs) for seed in range(options.seeds)]
        losses, errors, sizes = zip(*runs, strict=True)
        found[setting] = float(np.median(losses)), float(np.median(errors)), sizes[0]
    draw(found, options.out)
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
