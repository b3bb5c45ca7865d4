"""Train one small classifier three times: stock AdaDelta, ours, ours compiled."""

import argparse
import gc
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NoReturn

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn import datasets
from sklearn.model_selection import train_test_split

import mlx_adadelta

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
HIDDEN = (128, 64)
MAX_CLASSES = 1000
CAPTION = """times: medians; in the optimizer: eager, gradients are evaluated \
first and the update is timed alone; compiled, the whole step less its forward \
and backward compiled alone"""

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


@dataclass
class Result:
    """What one training run left behind; times are medians over its steps."""

    name: str
    losses: np.ndarray
    weights: dict[str, np.ndarray]
    accuracy: float
    step_ms: float
    optimizer_ms: float
    peak_bytes: int


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            if low <= (value := kind(text)) <= high:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(
            f"expected {kind.__name__} from {low:.10g} to {high:.10g}, got {text!r}"
        )

    return parse


def build_parser() -> Parser:
    parser = Parser(prog="train", description=__doc__, allow_abbrev=False)

    def add(flag: str, default: object, text: str = "", **how: object) -> None:
        text += "" if default is None else "default: %(default)s"
        parser.add_argument(flag, default=default, help=text, **how)

    count, rate, seed = number(int, 1, 1e6), number(float, 1e-9, 1e9), 2**32 - 1
    keys = "x_train, y_train, x_test, y_test; default: scikit-learn's digits"
    add("--data", None, keys, type=Path, metavar="FILE.npz")
    add("--epochs", 30, type=count, metavar="N")
    add("--batch-size", 32, type=count, metavar="N")
    add("--lr", 1.0, type=rate, metavar="X")
    add("--dtype", "float32", choices=DTYPES)
    add("--seed", 0, type=number(int, 0, seed), metavar="N")
    add("--out", Path("train.png"), "the figure; ", type=Path, metavar="FILE.png")
    return parser


def load_digits() -> Data:
    x, y = datasets.load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    split = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = split
    return Data("load_digits", x_train, y_train, x_test, y_test)


def load_npz(path: Path) -> Data:
    """Read a file in MNIST's usual form; a ValueError says what is wrong with it."""
    arrays = {}
    try:
        with path.open("rb") as file:
            npz = np.load(file, allow_pickle=False)
            for key in ("x_train", "y_train", "x_test", "y_test"):
                if key not in getattr(npz, "files", ()):
                    raise ValueError(f"it holds no {key}")
                arrays[key] = npz[key]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error

    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.ndim < 2 or x.size == 0 or x.dtype.kind not in "buif":
            form = f"{x.dtype} of shape {x.shape}"
            raise ValueError(f"{path}: x_{split}: expected images of reals, got {form}")
        if not np.isfinite(x).all():
            raise ValueError(f"{path}: x_{split}: values must be finite")
        if y.shape != x.shape[:1] or y.dtype.kind not in "ui":
            form = f"{len(x)} integers, got {y.dtype} of shape {y.shape}"
            raise ValueError(f"{path}: y_{split}: expected {form}")
        if y.min() < 0 or y.max() >= MAX_CLASSES:
            form = f"labels from 0 to {MAX_CLASSES - 1}, got {y.min()} to {y.max()}"
            raise ValueError(f"{path}: y_{split}: expected {form}")
    x_train, x_test = arrays["x_train"], arrays["x_test"]
    if x_train.shape[1:] != x_test.shape[1:]:
        form = f"{x_train.shape[1:]} in x_train, {x_test.shape[1:]} in x_test"
        raise ValueError(f"{path}: images differ in shape: {form}")

    scale = np.abs(x_train.astype(np.float32)).max() or np.float32(1)
    x_train, x_test = (
        x.reshape(len(x), -1).astype(np.float32) / scale for x in (x_train, x_test)
    )
    y_train, y_test = (arrays[key].astype(np.int32) for key in ("y_train", "y_test"))
    return Data(path.name, x_train, y_train, x_test, y_test)


def prepare_out(path: Path) -> None:
    """Open the figure for writing now: who wants to learn of a typo afterwards."""
    if path.suffix != ".png":
        raise ValueError(f"--out: expected a .png file, got {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise ValueError(f"--out: cannot write the figure: {error}") from error


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


def eager_step(model: nn.Module, optimizer: optim.Optimizer) -> Step:
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    def step(x: mx.array, y: mx.array) -> tuple[mx.array, float, float]:
        mx.reset_peak_memory()
        start = perf_counter()
        loss, gradients = loss_and_grad(model, x, y)
        mx.eval(loss, gradients)
        forward = perf_counter() - start
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
        return loss, forward, perf_counter() - start

    return step


def compiled_step(model: nn.Module, optimizer: optim.Optimizer) -> Step:
    """One graph cannot be timed in parts: forward and backward also run alone."""
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=model.state, outputs=model.state)
    def forward_backward(x: mx.array, y: mx.array) -> tuple[mx.array, dict]:
        return loss_and_grad(model, x, y)

    @partial(mx.compile, inputs=state, outputs=state)
    def whole(x: mx.array, y: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(model, x, y)
        optimizer.update(model, gradients)
        return loss

    def step(x: mx.array, y: mx.array) -> tuple[mx.array, float, float]:
        start = perf_counter()
        mx.eval(forward_backward(x, y))
        forward = perf_counter() - start
        mx.reset_peak_memory()
        start = perf_counter()
        loss = whole(x, y)
        mx.eval(loss, state)
        return loss, forward, perf_counter() - start

    return step


RUNS = (
    ("stock AdaDelta", optim.AdaDelta, eager_step),
    ("mlx-adadelta", mlx_adadelta.AdaDelta, eager_step),
    ("mlx-adadelta, compiled", mlx_adadelta.AdaDelta, compiled_step),
)


def train(
    run: tuple[str, type[optim.Optimizer], Callable[..., Step]],
    data: Data,
    options: argparse.Namespace,
    report: Callable[[str], None],
) -> Result:
    name, optimizer_class, make_step = run
    gc.collect()
    mx.clear_cache()
    dtype = DTYPES[options.dtype]
    model = build_model(data, dtype, options.seed)
    optimizer = optimizer_class(options.lr)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.state, optimizer.state)
    step = make_step(model, optimizer)

    shuffle = np.random.default_rng(options.seed)
    losses, times, peak = [], [], 0
    for _ in range(options.epochs):
        order = shuffle.permutation(len(data.x_train))
        for end in range(options.batch_size, len(order) + 1, options.batch_size):
            rows = order[end - options.batch_size : end]
            x, y = mx.array(data.x_train[rows], dtype), mx.array(data.y_train[rows])
            mx.eval(x, y)
            loss, forward, whole = step(x, y)
            peak = max(peak, mx.get_peak_memory())
            losses.append(loss.item())
            times.append((whole * 1e3, (whole - forward) * 1e3))
            report(f"{name}, loss {losses[-1]:.4f}")

    weights = tree_flatten(model.parameters())
    return Result(
        name,
        np.array(losses, np.float32),
        {path: np.array(weight.astype(mx.float32)) for path, weight in weights},
        accuracy(model, data, dtype),
        *np.median(times, axis=0),
        peak,
    )


def accuracy(model: nn.Module, data: Data, dtype: mx.Dtype) -> float:
    right = 0
    for start in range(0, len(data.x_test), 1000):
        rows = slice(start, start + 1000)
        chosen = model(mx.array(data.x_test[rows], dtype)).argmax(axis=1)
        right += mx.sum(chosen == mx.array(data.y_test[rows])).item()
    return right / len(data.x_test)


def train_all(
    data: Data, options: argparse.Namespace, console: Console
) -> list[Result]:
    steps = options.epochs * (len(data.x_train) // options.batch_size)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(RUNS) * steps)

        def report(text: str) -> None:
            progress.update(task, advance=1, description=text)

        return [train(run, data, options, report) for run in RUNS]


def markdown_table(*rows: Sequence[str]) -> str:
    """The first row is the heading."""
    marks = ["---", *["---:"] * (len(rows[0]) - 1)]
    lines = (rows[0], marks, *rows[1:])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(results: list[Result]) -> str:
    heading = ("", "test accuracy", "ms a step", "ms in the optimizer", "peak memory")
    rows = [
        (
            result.name,
            f"{result.accuracy:.2%}",
            f"{result.step_ms:.3f}",
            f"{result.optimizer_ms:.3f}",
            f"{result.peak_bytes / 2**20:.2f} MiB",
        )
        for result in results
    ]
    return markdown_table(heading, *rows)


def save_figure(results: list[Result], title: str, path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title)
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))

    window = max(1, len(results[0].losses) // 40)
    styles = (("#9bbcdd", "-", 4.5), ("#08306b", "--", 1.5), ("#d95f02", ":", 1.5))
    for result, (color, line, width) in zip(results, styles, strict=True):
        mean = np.convolve(result.losses, np.full(window, 1 / window), "valid")
        steps = np.arange(len(mean)) + window
        curves.plot(steps, mean, line, color=color, lw=width, label=result.name)
    curves.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
    curves.set_yscale("log")
    curves.legend(frameon=False)

    names = [result.name.replace(", ", ",\n") for result in results]
    whole = np.array([result.step_ms for result in results])
    optimizer = np.clip([result.optimizer_ms for result in results], 0, whole)
    rest = whole - optimizer
    bars.bar(names, rest, 0.6, color="#cccccc", label="forward, backward")
    drawn = bars.bar(names, optimizer, 0.6, rest, color="#08306b", label="optimizer")
    labels = [f"{r.step_ms:.2f}\n({r.optimizer_ms:.2f})" for r in results]
    bars.bar_label(drawn, labels, padding=2)
    bars.margins(y=0.2)
    bars.set(ylabel="ms a step (in the optimizer)")
    bars.legend(frameon=False)

    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def compare(first: Result, second: Result) -> tuple[bool, float]:
    """Whether losses and final weights agree in every bit, and how far they do not.

    Bytes decide: as values two NaNs would differ, and 0 equal -0.
    """
    pairs = [(first.losses, second.losses)]
    pairs += [(w, second.weights[path]) for path, w in first.weights.items()]
    equal = all(a.tobytes() == b.tobytes() for a, b in pairs)
    return equal, np.max([np.abs(a - b).max() for a, b in pairs])


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        data = load_npz(options.data) if options.data else load_digits()
        if options.batch_size > (images := len(data.x_train)):
            raise ValueError(
                f"--batch-size: expected at most {images}, the training images, "
                f"got {options.batch_size}"
            )
        prepare_out(options.out)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))

    console = Console()
    results = train_all(data, options, console)
    stock, ours, _ = results
    steps = len(stock.losses)
    title = f"{data.name}, {options.dtype}, {steps} steps of {options.batch_size}"
    print(f"{title}\n\n{table(results)}\n{CAPTION}")
    save_figure(results, title, options.out)
    console.print(f"figure: {options.out}", soft_wrap=True)

    equal, difference = compare(stock, ours)
    if equal:
        print(f"losses and final weights bit for bit equal over {steps} steps")
        return 0
    exact = options.dtype == "float32" and mx.default_device() == mx.cpu
    why = "" if exact else " (equality is promised for float32 on the CPU)"
    print(f"losses and final weights differ by up to {difference:.3g}{why}")
    return 1 if exact else 0


if __name__ == "__main__":
    sys.exit(main())
