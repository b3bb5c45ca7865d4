"""Trains one small classifier with stock AdaDelta and ours, eager and compiled."""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from zipfile import BadZipFile
from zlib import error

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from rich.progress import track
from sklearn import datasets
from sklearn.model_selection import train_test_split

import mlx_adadelta
from experiments.options import build_parser

HIDDEN = (128, 64)
CAPTION = """times: medians and half the distance of their quartiles; the four runs \
take each step in turn; in the optimizer: the whole step less its forward and backward \
alone"""

# (images, labels) -> (loss, seconds of forward and backward, seconds of the step)
Step = Callable[[mx.array, mx.array], tuple[mx.array, float, float]]


@dataclass
class Data:
    """Images as float32 rows within [-1, 1], labels as int32."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_digits() -> Data:
    x, y = datasets.load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    split = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = split
    return Data("load_digits", x_train, y_train, x_test, y_test)


def load_npz(path: Path) -> Data:
    """Reads a file in MNIST's usual form; a ValueError says what is wrong with it."""
    try:
        with path.open("rb") as file:
            npz = np.load(file, allow_pickle=False)
            arrays = [npz[x] for x in ("x_train", "y_train", "x_test", "y_test")]
    except (OSError, EOFError, LookupError, ValueError, BadZipFile, error) as why:
        raise ValueError(f"cannot read {path}: {why}") from why
    x_train, y_train, x_test, y_test = arrays
    for x, y in ((x_train, y_train), (x_test, y_test)):
        fine = x.ndim > 1 and x.size > 0 and x.dtype.kind in "buif"
        fine = fine and np.isfinite(x).all() and x.shape[1:] == x_train.shape[1:]
        fine = fine and y.shape == x.shape[:1] and y.dtype.kind in "ui"
        if not fine or y.min() < 0 or y.max() > 999:
            raise ValueError(
                f"{path} must hold finite images of one shape in x_train and x_test, "
                "and for each one a label from 0 to 999 in y_train and y_test"
            )
    scale = np.abs(x_train.astype(np.float32)).max() or np.float32(1)
    x_train, x_test = (
        x.reshape(len(x), -1).astype(np.float32) / scale for x in (x_train, x_test)
    )
    return Data(
        path.name, x_train, y_train.astype(np.int32), x_test, y_test.astype(np.int32)
    )


def load_data(options: argparse.Namespace) -> Data:
    """The data that `--data` names, or the digits; checks the other options."""
    np.random.default_rng(options.seed)
    mlx_adadelta.AdaDelta(options.lr)
    data = load_npz(options.data) if options.data else load_digits()
    if options.batch_size > (images := len(data.x_train)):
        raise ValueError(
            f"--batch-size: expected at most {images}, the training images, "
            f"got {options.batch_size}"
        )
    return data


def as_array(x: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Real numbers as dtype, integers as they are."""
    return mx.array(x, dtype if x.dtype.kind == "f" else None)


def batches(
    data: Data, size: int, shuffle: np.random.Generator, dtype: mx.Dtype = mx.float32
) -> Iterator[tuple[mx.array, mx.array]]:
    """An epoch in a new order, less the images that do not fill a batch."""
    order = shuffle.permutation(len(data.x_train))
    for end in range(size, len(order) + 1, size):
        rows = order[end - size : end]
        yield as_array(data.x_train[rows], dtype), mx.array(data.y_train[rows])


def prepare_out(options: argparse.Namespace) -> None:
    """Opens the figure for writing, so that a wrong path fails before the training."""
    if options.out.suffix != ".png":
        raise ValueError(f"--out: expected a .png file, got {options.out}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.open("ab").close()


def build_model(
    data: Data,
    dtype: mx.Dtype,
    seed: int,
    hidden: tuple[int, ...] = HIDDEN,
    activation: Callable[[mx.array], mx.array] = nn.relu,
) -> nn.Module:
    mx.random.seed(seed)
    classes = int(max(data.y_train.max(), data.y_test.max())) + 1
    sizes = (data.x_train.shape[1], *hidden, classes)
    layers: list[Callable] = [nn.Linear(sizes[0], sizes[1])]
    for i in range(1, len(sizes) - 1):
        layers += [activation, nn.Linear(sizes[i], sizes[i + 1])]
    model = nn.Sequential(*layers)
    model.set_dtype(dtype)
    return model


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    logits = model(x).astype(mx.float32)
    return nn.losses.cross_entropy(logits, y, reduction="mean")


def make_step(model: nn.Module, optimizer: optim.Optimizer, compiled: bool) -> Step:
    """Forward and backward also run alone: one graph cannot be timed in parts."""
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state]

    def forward_backward(x: mx.array, y: mx.array) -> tuple[mx.array, dict]:
        return loss_and_grad(model, x, y)

    def whole(x: mx.array, y: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(model, x, y)
        optimizer.update(model, gradients)
        return loss

    if compiled:
        forward_backward = mx.compile(forward_backward, model.state, model.state)
        whole = mx.compile(whole, state, state)

    def step(x: mx.array, y: mx.array) -> tuple[mx.array, float, float]:
        start = perf_counter()
        mx.eval(forward_backward(x, y))
        middle = perf_counter()
        loss = whole(x, y)
        mx.eval(loss, model.state, optimizer.state)
        return loss, middle - start, perf_counter() - middle

    return step


RUNS = {
    "stock AdaDelta": (optim.AdaDelta, False),
    "mlx-adadelta": (mlx_adadelta.AdaDelta, False),
    "stock AdaDelta, compiled": (optim.AdaDelta, True),
    "mlx-adadelta, compiled": (mlx_adadelta.AdaDelta, True),
}


class Run:
    """A model in training, and its measurements."""

    def __init__(self, name: str, data: Data, options: argparse.Namespace) -> None:
        optimizer_class, compiled = RUNS[name]
        self.name = name
        self.model = build_model(data, getattr(mx, options.dtype), options.seed)
        optimizer = optimizer_class(options.lr)
        optimizer.init(self.model.trainable_parameters())
        mx.eval(self.model.state, optimizer.state)
        self.take_step = make_step(self.model, optimizer, compiled)
        self.losses: list[float] = []
        self.times: list[tuple[float, float]] = []  # forward and backward, whole step

    def step(self, x: mx.array, y: mx.array) -> None:
        loss, *seconds = self.take_step(x, y)
        self.losses.append(loss.item())
        self.times.append((seconds[0], seconds[1]))

    def finish(self, data: Data, dtype: mx.Dtype) -> None:
        """Tests the model, and takes the quartiles of the times."""
        self.accuracy = accuracy(self.model, data, dtype)
        forward, whole = 1e3 * np.transpose(self.times)
        self.step_ms = np.percentile(whole, (25, 50, 75))
        self.optimizer_ms = np.percentile(whole - forward, (25, 50, 75))

    def results(self) -> list[np.ndarray]:
        """The losses and the final weights."""
        weights = tree_flatten(self.model.parameters())
        found = [np.array(w.astype(mx.float32)) for _, w in weights]
        return [np.array(self.losses), *found]


def accuracy(model: nn.Module, data: Data, dtype: mx.Dtype) -> float:
    right = 0
    for start in range(0, len(data.x_test), 1000):
        rows = slice(start, start + 1000)
        chosen = model(as_array(data.x_test[rows], dtype)).argmax(axis=-1)
        right += mx.sum(chosen == mx.array(data.y_test[rows])).item()
    return right / data.y_test.size


def train_all(data: Data, options: argparse.Namespace) -> list[Run]:
    """Every run takes each step, in an order that changes from step to step."""
    dtype = getattr(mx, options.dtype)
    runs = [Run(name, data, options) for name in RUNS]
    shuffle, order = np.random.default_rng(options.seed), random.Random(0)
    for _ in track(range(options.epochs), "Training"):
        for x, y in batches(data, options.batch_size, shuffle, dtype):
            mx.eval(x, y)
            for run in order.sample(runs, len(runs)):
                run.step(x, y)
    for run in runs:
        run.finish(data, dtype)
    return runs


def markdown_table(*rows: Sequence[str]) -> str:
    """The first row is the heading."""
    marks = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = (rows[0], marks, *rows[1:])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread_text(quartiles: np.ndarray) -> str:
    low, median, high = quartiles
    return f"{median:.3f} ±{(high - low) / 2:.3f}"


def table(runs: list[Run]) -> str:
    heading = ("", "test accuracy", "ms a step", "ms in the optimizer")
    rows = [
        (
            run.name,
            f"{run.accuracy:.2%}",
            spread_text(run.step_ms),
            spread_text(run.optimizer_ms),
        )
        for run in runs
    ]
    return markdown_table(heading, *rows)


def save_figure(runs: list[Run], title: str, path: Path) -> None:
    figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title)
    curves, bars = figure.subplots(1, 2)

    window = max(1, len(runs[0].losses) // 40)
    colors = ("#9bbcdd", "#08306b", "#238b45", "#d95f02")
    for i, (run, color) in enumerate(zip(runs, colors, strict=True)):
        mean = np.convolve(run.losses, np.full(window, 1 / window), "valid")
        steps = np.arange(len(mean)) + window
        curves.plot(steps, mean, color=color, lw=7 - 2 * i, label=run.name)
    curves.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
    curves.set_yscale("log")
    curves.legend()

    whole = np.array([run.step_ms[1] for run in runs])
    optimizer = np.clip([run.optimizer_ms[1] for run in runs], 0, whole)
    names = [run.name.replace(", ", "\n") for run in runs]
    bars.bar(names, whole - optimizer, color="#cccccc", label="forward, backward")
    drawn = bars.bar(names, optimizer, bottom=whole - optimizer, label="optimizer")
    bars.bar_label(drawn, fmt="%.2f")
    bars.margins(y=0.2)
    bars.set(ylabel="ms a step")
    bars.tick_params(axis="x", labelsize=8)
    bars.legend()
    figure.savefig(path)


def compare(first: Run, second: Run) -> tuple[bool, float]:
    """Whether losses and final weights have the same bits, and how far they differ.

    Bytes decide: as values two NaNs would differ, and 0 would equal -0.
    """
    pairs = list(zip(first.results(), second.results(), strict=True))
    equal = all(a.tobytes() == b.tobytes() for a, b in pairs)
    return equal, np.max([np.abs(a - b).max() for a, b in pairs])


def judge_difference(dtype: mx.Dtype) -> int:
    """The exit status where results are not stock's."""
    if dtype == mx.float32 and mx.default_device() == mx.cpu:
        return 1
    print("equality is promised for float32 on the CPU")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options, data, _ = parser.parse(argv, load_data, prepare_out)
    runs = train_all(data, options)
    stock, ours, *_ = runs
    steps = len(stock.losses)
    title = f"{data.name}, {options.dtype}, {steps} steps of {options.batch_size}"
    print(f"{title}\n\n{table(runs)}\n{CAPTION}")
    save_figure(runs, title, options.out)
    print(f"figure: {options.out}")

    equal, difference = compare(stock, ours)
    if equal:
        print(f"losses and final weights bit for bit equal over {steps} steps")
        return 0
    print(f"losses and final weights differ by up to {difference:.3g}")
    return judge_difference(getattr(mx, options.dtype))


if __name__ == "__main__":
    sys.exit(main())
