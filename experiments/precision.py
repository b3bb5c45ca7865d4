"""What 16 bits cost, by how they are kept: weights, state and their rounding."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits

import mlx_adadelta
from bench.__main__ import Parser
from bench.report import Row, new_record, print_table, significant
from tests.reference import adadelta_step

EPS = 1e-6
Batch = tuple[mx.array, mx.array]


# ----------------------------------- Modes ----------------------------------------


@dataclass(frozen=True)
class Mode:
    """Weights of a type, and an optimizer for them; stock's where no options are."""

    name: str
    dtype: mx.Dtype
    options: dict[str, Any] | None = field(default_factory=dict)

    def optimizer(self, lr: float, rho: float, seed: int) -> optim.Optimizer:
        if self.options is None:
            return optim.AdaDelta(lr, rho, EPS)
        return mlx_adadelta.AdaDelta(lr, rho, EPS, seed=seed, **self.options)


def modes(name: str, dtype: mx.Dtype) -> list[Mode]:
    wide = {"state_dtype": mx.float32}
    stochastic = {"stochastic_rounding": True}
    return [
        Mode(f"{name}, stock", dtype, None),
        Mode(name, dtype),
        Mode(f"{name}, SR", dtype, stochastic),
        Mode(f"{name}, float32 state", dtype, wide),
        Mode(f"{name}, float32 state, SR", dtype, wide | stochastic),
    ]


FLOAT32 = Mode("float32", mx.float32)
BFLOAT16 = modes("bfloat16", mx.bfloat16)
FLOAT16 = modes("float16", mx.float16)


# ------------------------------ A constant gradient -------------------------------


@dataclass(frozen=True)
class Constant:
    """The same gradient every step, learning rate 1."""

    start: float
    g: float
    rho: float
    steps: int

    def __str__(self) -> str:
        start = f", w from {self.start:g}" if self.start else ""
        return f"rho {self.rho:g}, g {self.g:g}, {self.steps} steps{start}"


CONSTANTS = [
    Constant(0, 0.1, 0.9, 200),
    Constant(0, 0.1, 0.999, 2000),
    Constant(0, 5e-4, 0.9, 200),
    Constant(100, 0.1, 0.9, 200),
]
ELEMENTS = 4096  # each rounded by its own random bits
CONSTANT_MODES = [FLOAT32, *BFLOAT16, *FLOAT16]


def constant_reference(case: Constant) -> dict[str, list[float]]:
    wvu: tuple[Any, ...] = (case.start, 0.0, 0.0)
    for _ in range(case.steps):
        wvu = adadelta_step(wvu[0], case.g, *wvu[1:], 1.0, case.rho, EPS)
    ends = (float(wvu[0]) - case.start, float(wvu[1]), float(wvu[2]))
    return {name: [end, 0.0] for name, end in zip("wvu", ends, strict=True)}


def constant(case: Constant, mode: Mode) -> dict[str, list[float]]:
    """Mean and standard deviation over the elements: of w its way, of v and u."""
    optimizer = mode.optimizer(1.0, case.rho, seed=0)
    weights = {"w": mx.full((ELEMENTS,), case.start, mode.dtype)}
    gradients = {"w": mx.full((ELEMENTS,), case.g, mode.dtype)}
    for _ in range(case.steps):
        weights = optimizer.apply_gradients(gradients, weights)
        mx.eval(weights, optimizer.state)
    ends = {"w": weights["w"], **optimizer.state["w"]}
    result = {}
    for name, end in ends.items():
        way = np.array(end.astype(mx.float32), np.float64)
        way -= case.start if name == "w" else 0
        result[name] = [float(way.mean()), float(way.std())]
    return result


# ------------------------------------ Training ------------------------------------


class Perceptron(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(*pair) for pair in pairwise(sizes)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


class Transformer(nn.Module):
    """Predicts each next character."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.encoder = nn.TransformerEncoder(layers, width, 2, norm_first=True)
        self.head = nn.Linear(width, vocabulary)

    def __call__(self, text: mx.array) -> mx.array:
        length = text.shape[1]
        x = self.embedding(text) + self.positions(mx.arange(length))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length, x.dtype)
        return self.head(self.encoder(x, mask))


@dataclass(frozen=True)
class Task:
    """Data, a model, and how it is trained."""

    name: str
    title: str
    train: tuple[NDArray[Any], NDArray[Any]]
    test: tuple[NDArray[Any], NDArray[Any]]
    model: Callable[[], nn.Module]
    lr: float
    rho: float
    batch: int
    steps: int
    modes: list[Mode]


def digits(lr: float, rho: float, epochs: int) -> Task:
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1437], order[1437:]
    steps = epochs * (len(train) // 32)
    return Task(
        f"digits, lr {lr:g}, rho {rho:g}",
        f"scikit-learn's digits, 64-64-10, lr {lr:g}, rho {rho:g}, {steps} steps of 32",
        (x[train], y[train]),
        (x[test], y[test]),
        lambda: Perceptron(64, 64, 10),
        *(lr, rho, 32, steps, [FLOAT32, *BFLOAT16, *FLOAT16]),
    )


def mnist(path: Path, lr: float, rho: float, steps: int) -> Task:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[f"{key[0]}_{key[2:]}"] for key in MNIST_KEYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"--mnist: cannot read {path}: {error}") from error
    for key in MNIST_KEYS:
        scaled = arrays[key].reshape(len(arrays[key]), -1).astype(np.float32) / 255
        arrays[key] = scaled if key[0] == "x" else arrays[key].astype(np.int32)
    return Task(
        "MNIST",
        f"MNIST, 784-64-10, lr {lr:g}, rho {rho:g}, {steps} steps of 64",
        (arrays["x_train"], arrays["y_train"]),
        (arrays["x_test"], arrays["y_test"]),
        lambda: Perceptron(784, 64, 10),
        *(lr, rho, 64, steps, [FLOAT32, *BFLOAT16]),
    )


MNIST_KEYS = ("x_train", "y_train", "x_test", "y_test")


def text(lr: float, rho: float, steps: int, context: int = 32) -> Task:
    """Python's own documentation, as pydoc holds it."""
    whole = "\n".join(topics[key] for key in sorted(topics))
    alphabet = sorted(set(whole))
    codes = np.array([alphabet.index(c) for c in whole], np.int32)
    rows = len(codes) // (context + 1)
    windows = codes[: rows * (context + 1)].reshape(rows, -1)
    order = np.random.default_rng(0).permutation(rows)
    train, test = windows[order[256:]], windows[order[:256]]
    return Task(
        "text",
        f"Python's help text ({len(codes):,} characters, {len(alphabet)} different), "
        f"transformer of 2 layers of 32, lr {lr:g}, rho {rho:g}, {steps} steps of 8 "
        f"times {context} characters",
        (train[:, :-1], train[:, 1:]),
        (test[:, :-1], test[:, 1:]),
        lambda: Transformer(len(alphabet), context, 32, 2),
        *(lr, rho, 8, steps, [FLOAT32, *BFLOAT16]),
    )


SEEN = 8192  # predictions of the training data that the loss is taken of


def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x).astype(mx.float32), y, reduction="mean")


def batches(data: tuple[NDArray[Any], NDArray[Any]], size: int) -> Iterator[Batch]:
    for i in range(0, len(data[0]), size):
        yield mx.array(data[0][i : i + size]), mx.array(data[1][i : i + size])


def train(task: Task, mode: Mode, seed: int) -> dict[str, float]:
    """The same start and the same batches for every mode."""
    mx.random.seed(seed)
    model = task.model()
    model.set_dtype(mode.dtype)
    optimizer = mode.optimizer(task.lr, task.rho, seed)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, loss)

    def cast(x: mx.array) -> mx.array:
        return x.astype(mode.dtype) if x.dtype == mx.float32 else x

    draw = np.random.default_rng(seed)
    for _ in range(task.steps):
        rows = draw.integers(len(task.train[0]), size=task.batch)
        x, y = (mx.array(part[rows]) for part in task.train)
        _, gradients = loss_and_grad(model, cast(x), y)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)

    rows = max(1, SEEN // task.train[1][0].size)
    seen = (task.train[0][:rows], task.train[1][:rows])
    losses, weight, right, count = 0.0, 0, 0, 0
    for x, y in batches(seen, 512):
        losses += loss(model, cast(x), y).item() * len(x)
        weight += len(x)
    for x, y in batches(task.test, 512):
        right += (model(cast(x)).argmax(axis=-1) == y).sum().item()
        count += y.size
    parameters = dict(tree_flatten(model.trainable_parameters()))
    state = [x for _, x in tree_flatten(optimizer.state) if x.ndim]
    return {
        "loss": losses / weight,
        "accuracy": right / count,
        "state_bytes": sum(x.nbytes for x in state)
        / sum(x.size for x in parameters.values()),
    }


# ------------------------------------ The report ----------------------------------


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}


def spread_text(value: dict[str, float], form: str) -> str:
    return f"{value['mean']:{form}} ± {value['sd']:{form.lstrip('+')}}"


def constant_tables(record: dict[str, Any]) -> Iterator[tuple[str, Row, list[Row]]]:
    subjects = {"w": "w, its way from the start", "v": "v", "u": "u"}
    for name, subject in subjects.items():
        rows = []
        for mode in record["constants"][0]["ends"]:
            row = (mode,)
            for case in record["constants"]:
                mean, deviation = case["ends"][mode][name]
                row += (f"{mean:.3g}" + (f" ± {deviation:.2g}" if deviation else ""),)
            rows.append(row)
        headings = ("", *(case["case"] for case in record["constants"]))
        yield f"A constant gradient: {subject}", headings, rows


def training_tables(record: dict[str, Any]) -> Iterator[tuple[str, Row, list[Row]]]:
    headings = ("", "loss", "above float32", "accuracy", "bytes of state")
    for task in record["tasks"]:
        rows: list[Row] = []
        for mode, result in task["results"].items():
            above = spread_text(result["above"], "+.5f")
            rows.append(
                (
                    mode,
                    spread_text(result["loss"], ".5f"),
                    "" if mode == FLOAT32.name else above,
                    spread_text(result["accuracy"], ".2%"),
                    significant(result["state_bytes"]),
                )
            )
        yield f"{task['name']}: {task['title']}", headings, rows


EXPLANATION = """\
SR is stochastic rounding, "stock" is mlx.optimizers.AdaDelta, eps is 1e-6. With a \
constant gradient: the mean over {elements} elements, ± their standard deviation. In \
training: the mean over {seeds} seeds ± the standard deviation; a seed gives every \
mode the same start and batches. The loss is that of at most {seen} predictions of the \
training data, at the end; "above float32" is its difference from float32's of the \
same seed; accuracy is that of unseen data; state is in bytes a parameter."""


def markdown(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    machine = record["machine"]
    where = f"{platform.system()} {platform.machine()}, {machine['device']}"
    lines = [record["explanation"], "", f"{where},"]
    lines += [f"Python {machine['python']}, {versions}."]
    for tables in (constant_tables, training_tables):
        for title, headings, rows in tables(record):
            lines += ["", f"### {title}", "", f"| {' | '.join(headings)} |"]
            lines.append("|---" + "|---:" * (len(headings) - 1) + "|")
            lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def save_plot(record: dict[str, Any], path: Path) -> None:
    """The losses of every seed, a panel a task."""
    tasks = record["tasks"]
    columns = min(2, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    size = (5.5 * columns, 0.5 + 2.8 * lines)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle("Final training loss of each seed; the band is float32's")
    panels: Any = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    for task, panel in zip(tasks, panels.flat, strict=False):
        for i, (name, result) in enumerate(task["results"].items()):
            color = "#d95f02" if "stock" in name else "#08306b"
            values = result["losses"]
            panel.plot(values, [i] * len(values), "|", color=color, ms=9)
        exact = task["results"][FLOAT32.name]["losses"]
        panel.axvspan(min(exact), max(exact), color="#cccccc", alpha=0.6, lw=0)
        panel.set_yticks(range(len(task["results"])), list(task["results"]))
        panel.invert_yaxis()
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(task["name"], fontsize=10, loc="left")
    figure.savefig(path)


# ------------------------------------ The command ---------------------------------


def build_parser() -> Parser:
    parser = Parser(
        prog="experiments.precision", description=__doc__, allow_abbrev=False
    )
    keys = ", ".join(MNIST_KEYS)
    parser.add_argument("--quick", action="store_true", help="a few steps, two seeds")
    parser.add_argument("--mnist", type=Path, metavar="FILE.npz", help=keys)
    parser.add_argument(
        "--out", type=Path, default=Path("out/precision"), metavar="FOLDER"
    )
    return parser


def choose_tasks(options: argparse.Namespace) -> list[Task]:
    quick = options.quick
    tasks = [
        digits(1.0, 0.9, 1 if quick else 30),
        digits(0.1, 0.999, 1 if quick else 60),
        text(1.0, 0.9, 3 if quick else 600),
    ]
    if options.mnist is not None:
        tasks.append(mnist(options.mnist, 1.0, 0.95, 5 if quick else 938))
    return tasks


def run(tasks: list[Task], options: argparse.Namespace, console: Console) -> Any:
    seeds = range(2 if options.quick else 5)
    record = new_record({key: str(value) for key, value in vars(options).items()}, {})
    del record["cases"]
    record["explanation"] = EXPLANATION.format(
        elements=ELEMENTS, seeds=len(seeds), seen=SEEN
    )
    record |= {"constants": [], "tasks": []}
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = len(CONSTANTS) * len(CONSTANT_MODES)
        total += len(seeds) * sum(len(task.modes) for task in tasks)
        bar = progress.add_task("", total=total)
        for full in CONSTANTS:
            case = replace(full, steps=3) if options.quick else full
            ends = {"float64": constant_reference(case)}
            for mode in CONSTANT_MODES:
                progress.update(bar, description=f"{case}: {mode.name}")
                ends[mode.name] = constant(case, mode)
                progress.advance(bar)
            record["constants"].append({"case": str(case), "ends": ends})
        for task in tasks:
            results: dict[str, Any] = {}
            for mode in task.modes:
                runs = []
                for seed in seeds:
                    text = f"{task.name}: {mode.name}, seed {seed}"
                    progress.update(bar, description=text)
                    runs.append(train(task, mode, seed))
                    progress.advance(bar)
                losses = [run["loss"] for run in runs]
                exact = results.get(FLOAT32.name, {"losses": losses})["losses"]
                results[mode.name] = {
                    "losses": losses,
                    "loss": spread(losses),
                    "above": spread(list(np.subtract(losses, exact))),
                    "accuracy": spread([run["accuracy"] for run in runs]),
                    "state_bytes": runs[0]["state_bytes"],
                }
            record["tasks"].append(
                {"name": task.name, "title": task.title, "results": results}
            )
    return record


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    try:
        tasks = choose_tasks(options)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    record = run(tasks, options, console)
    path = options.out / "precision.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))
    save_plot(record, path.with_suffix(".png"))
    for tables in (constant_tables, training_tables):
        for title, headings, rows in tables(record):
            print_table(title, headings, rows, console)
    console.print(record["explanation"], soft_wrap=True)
    console.print(f"written: {path}, precision.md, precision.png", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
