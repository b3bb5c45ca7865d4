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
from sklearn.utils import check_X_y

import mlx_adadelta
from experiments.options import build_parser

HIDDEN = (128, 64)


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
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as file:
            npz = np.load(file, allow_pickle=False)
            x_train, y_train, x_test, y_test = (npz[name] for name in names)
        x_test = x_test.reshape(len(x_test), *x_train.shape[1:])
        (x_train, y_train), (x_test, y_test) = (
            check_X_y(x.reshape(len(x), -1), y, dtype=np.float32)
            for x, y in ((x_train, y_train), (x_test, y_test))
        )
    except (OSError, EOFError, LookupError, ValueError, BadZipFile, error) as why:
        raise ValueError(f"cannot read {path}: {why}") from why
    scale = np.abs(x_train).max() or 1
    y_train, y_test = y_train.astype(np.int32), y_test.astype(np.int32)
    return Data(path.name, x_train / scale, y_train, x_test / scale, y_test)


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


RUNS = {
    "stock AdaDelta": (optim.AdaDelta, False),
    "mlx-adadelta": (mlx_adadelta.AdaDelta, False),
    "stock AdaDelta, compiled": (optim.AdaDelta, True),
    "mlx-adadelta, compiled": (mlx_adadelta.AdaDelta, True),
}


class Run:
    """A model in training, and its measurements."""

    def __init__(self, name: str, data: Data, options: argparse.Namespace) -> None:
        make_optimizer, compiled = RUNS[name]
        self.name = name
        self.model = build_model(data, getattr(mx, options.dtype), options.seed)
        loss_and_grad = nn.value_and_grad(self.model, loss_fn)
        optimizer = make_optimizer(options.lr)
        optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, optimizer.state]
        mx.eval(self.state)

        def take_step(x: mx.array, y: mx.array) -> mx.array:
            loss, gradients = loss_and_grad(self.model, x, y)
            optimizer.update(self.model, gradients)
            return loss

        if compiled:
            take_step = mx.compile(take_step, self.state, self.state)
        self.take_step = take_step
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, x: mx.array, y: mx.array) -> None:
        start = perf_counter()
        loss = self.take_step(x, y)
        mx.eval(loss, self.state)
        self.seconds.append(perf_counter() - start)
        self.losses.append(loss.item())

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
    return runs


def markdown_table(*rows: Sequence[str]) -> str:
    """The first row is the heading."""
    marks = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = (rows[0], marks, *rows[1:])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(runs: list[Run], data: Data, dtype: mx.Dtype) -> str:
    rows = [("", "test accuracy", "ms a step, median")]
    for run in runs:
        right = accuracy(run.model, data, dtype)
        rows.append((run.name, f"{right:.2%}", f"{1e3 * np.median(run.seconds):.3f}"))
    return markdown_table(*rows)


def save_figure(runs: list[Run], title: str, path: Path) -> None:
    figure = Figure(figsize=(6, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    window = max(1, len(runs[0].losses) // 40)
    colors = ("#9bbcdd", "#08306b", "#238b45", "#d95f02")
    for i, (run, color) in enumerate(zip(runs, colors, strict=True)):
        mean = np.convolve(run.losses, np.full(window, 1 / window), "valid")
        steps = np.arange(len(mean)) + window
        axes.plot(steps, mean, color=color, lw=7 - 2 * i, label=run.name)
    axes.set(title=title, xlabel="step", yscale="log")
    axes.set(ylabel=f"training loss, mean of {window} steps")
    axes.legend()
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
    dtype = getattr(mx, options.dtype)
    print(f"{title}\n\n{table(runs, data, dtype)}")
    save_figure(runs, title, options.out)
    print(f"figure: {options.out}")

    equal, difference = compare(stock, ours)
    if equal:
        print(f"losses and final weights bit for bit equal over {steps} steps")
        return 0
    print(f"losses and final weights differ by up to {difference:.3g}")
    return judge_difference(dtype)


if __name__ == "__main__":
    sys.exit(main())
