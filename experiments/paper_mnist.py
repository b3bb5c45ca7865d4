"""Zeiler 2012, table 2: MNIST's test error over rho and eps, beside stock's."""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from rich.progress import track

import mlx_adadelta
from experiments.digits import (
    Data,
    accuracy,
    batches,
    build_model,
    judge_difference,
    load_data,
    loss_fn,
    markdown_table,
)
from experiments.options import Parser, add_training, make_folder

RHOS = (0.9, 0.95, 0.99)
PAPER = {  # test error in %, by eps, for each rho
    1e-2: (2.59, 2.58, 2.32),
    1e-4: (2.05, 1.99, 2.28),
    1e-6: (1.90, 1.83, 2.05),
    1e-8: (2.29, 2.13, 2.00),
}
HIDDEN = (500, 300)
OPTIMIZERS = {"stock": optim.AdaDelta, "ours": mlx_adadelta.AdaDelta}


@dataclass
class Cell:
    """Test errors in % of one rho and eps."""

    rho: float
    eps: float
    paper: float
    stock: float
    ours: float
    equal: bool  # losses, weights and state of every epoch, to the bit

    def row(self) -> tuple[str, ...]:
        errors = (f"{x:.2f}" for x in (self.paper, self.stock, self.ours))
        return f"{self.eps:.0e}", str(self.rho), *errors, ("no", "equal")[self.equal]


def train(
    optimizer: optim.Optimizer, data: Data, options: argparse.Namespace
) -> tuple[float, str]:
    """The test error in %, and a checksum of losses, weights and state by epoch."""
    model = build_model(data, mx.float32, options.seed, HIDDEN, nn.tanh)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    shuffle, checksum = np.random.default_rng(options.seed), hashlib.sha256()
    for _ in range(options.epochs):
        for x, y in batches(data, options.batch_size, shuffle):
            loss, gradients = loss_and_grad(model, x, y)
            optimizer.update(model, gradients)
            del gradients  # so that their memory can be reused
            mx.eval(loss, model.state, optimizer.state)
            checksum.update(np.array(loss).tobytes())
        for path, x in tree_flatten([model.parameters(), optimizer.state]):
            checksum.update(path.encode() + np.array(x).tobytes())
    return 100 * (1 - accuracy(model, data, mx.float32)), checksum.hexdigest()


def save_figure(cells: list[Cell], title: str, path: Path) -> None:
    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    figure.suptitle(title)
    panels: Any = figure.subplots(1, len(RHOS), sharey=True)
    for rho, axes in zip(RHOS, panels, strict=True):
        row = [cell for cell in cells if cell.rho == rho]
        eps = [cell.eps for cell in row]
        paper, stock, ours = (
            [getattr(cell, name) for cell in row] for name in ("paper", "stock", "ours")
        )
        axes.plot(eps, paper, "s--", color="#888888", label="Zeiler 2012")
        axes.plot(eps, stock, "o-", color="#9bbcdd", lw=5, ms=11, label="stock MLX")
        axes.plot(eps, ours, "o-", color="#08306b", label="mlx-adadelta")
        axes.set(xscale="log", yscale="log", xlabel="eps", title=f"rho {rho}")
        axes.set_yticks((2, 3, 5, 10, 15), labels=("2", "3", "5", "10", "15"))
        axes.minorticks_off()
    panels[0].set(ylabel="test error in %")
    panels[0].legend()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="paper_mnist", description=__doc__, allow_abbrev=False)
    keys = "MNIST with x_train, y_train, x_test and y_test"
    add_training(parser, keys, epochs=6, batch=100, required=True)
    text = "for paper.md and paper.png; "
    parser.option("--out", Path("out/paper"), text, type=Path, metavar="FOLDER")
    options, data, _ = parser.parse(argv, load_data, make_folder)
    layers = (data.x_train.shape[1], *HIDDEN)
    title = (
        f"{data.name}, {'-'.join(map(str, layers))} tanh, {options.epochs} epochs "
        f"in batches of {options.batch_size}, lr {options.lr:g}, seed {options.seed}"
    )
    cells: list[Cell] = []
    for eps, row in track(PAPER.items(), "Training"):
        for rho, paper in zip(RHOS, row, strict=True):
            stock, ours = (
                train(kind(options.lr, rho=rho, eps=eps), data, options)
                for kind in OPTIMIZERS.values()
            )
            equal = stock[1] == ours[1]
            cells.append(Cell(rho, eps, paper, stock[0], ours[0], equal))
    headings = ("eps", "rho", "paper", "stock", "mlx-adadelta", "to the bit")
    table = markdown_table(headings, *(cell.row() for cell in cells))
    (options.out / "paper.md").write_text(table)
    save_figure(cells, title, options.out / "paper.png")
    print(f"{title}, test error in %\n\n{table}")
    print(f"table and figure: {options.out}")

    differ = [f"rho {c.rho}, eps {c.eps:.0e}" for c in cells if not c.equal]
    if not differ:
        print(
            f"losses, weights and state equal stock's to the bit in {len(cells)} cells"
        )
        return 0
    print(f"losses, weights or state differ from stock's for {'; '.join(differ)}")
    return judge_difference(mx.float32)


if __name__ == "__main__":
    sys.exit(main())
