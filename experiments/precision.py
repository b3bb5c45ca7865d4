"""Measures the cost of 16 bits for weights and state, by type and rounding."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
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
    as_array,
    build_model,
    load_digits,
    load_npz,
    loss_fn,
    markdown_table,
)
from experiments.options import Parser, make_folder

EPS = 1e-6
Row = tuple[str, ...]


@dataclass(frozen=True)
class Mode:
    """Weights of a type and the options of their optimizer; None: stock's optimizer."""

    name: str
    dtype: mx.Dtype
    options: dict[str, Any] | None = field(default_factory=dict)

    def optimizer(self, lr: float, rho: float, seed: int) -> optim.Optimizer:
        if self.options is None:
            return optim.AdaDelta(lr, rho, EPS)
        return mlx_adadelta.AdaDelta(lr, rho, EPS, seed=seed, **self.options)


def both_roundings(name: str, dtype: mx.Dtype, **options: Any) -> list[Mode]:
    stochastic = options | {"stochastic_rounding": True}
    return [
        Mode(name, dtype, options),
        Mode(f"{name}, stochastic rounding", dtype, stochastic),
    ]


def modes(name: str, dtype: mx.Dtype) -> list[Mode]:
    """Weights of 16 bits."""
    wide = f"{name}, float32 state"
    return [
        Mode(f"{name}, stock", dtype, None),
        *both_roundings(name, dtype),
        *both_roundings(wide, dtype, state_dtype=mx.float32),
    ]


FLOAT64 = Mode("float64", mx.float64, None)
FLOAT32 = Mode("float32", mx.float32)
BFLOAT16 = modes("bfloat16", mx.bfloat16)
FLOAT16 = modes("float16", mx.float16)
NARROW = [  # state of 16 bits beside float32 weights
    *both_roundings("float32, bfloat16 state", mx.float32, state_dtype=mx.bfloat16),
    *both_roundings("float32, float16 state", mx.float32, state_dtype=mx.float16),
]


@dataclass(frozen=True)
class Given:
    """Given gradients at learning rate 1: all equal to g, or Gaussian of size g."""

    start: float
    g: float
    rho: float
    steps: int
    gaussian: bool = False

    def __str__(self) -> str:
        start = f", w from {self.start:g}" if self.start else ""
        return f"rho {self.rho:g}, g {self.g:g}, {self.steps} steps{start}"


ELEMENTS = 4096  # of a seed; each is rounded by its own random bits
CONSTANTS = [
    Given(0, 0.1, 0.9, 200),
    Given(0, 0.1, 0.999, 2000),
    Given(0, 5e-4, 0.9, 200),
    Given(100, 0.1, 0.9, 200),
]
# By title: cases, modes, and the arrays that its tables show.
GIVEN: dict[str, tuple[list[Given], list[Mode], str]] = {
    "A constant gradient": (CONSTANTS, [FLOAT64, FLOAT32, *BFLOAT16, *FLOAT16], "wvu")
}
for gaussian, name in enumerate(("A constant gradient", "Gaussian gradients")):
    cases = [
        Given(0, 0.1, rho, steps, bool(gaussian))
        for rho, steps in ((0.9, 500), (0.95, 500), (0.99, 2000), (0.999, 5000))
    ]
    GIVEN[f"{name}, float32 weights"] = (cases, [FLOAT64, FLOAT32, *NARROW], "u")
SUBJECTS = {"w": "w, its way from the start", "v": "v", "u": "u / eps"}


def follow(case: Given, mode: Mode, seed: int) -> dict[str, np.ndarray]:
    """Where every element ends: w as its way from the start, v, and u over eps."""
    with mx.stream(mx.cpu if mode is FLOAT64 else mx.default_device()):
        optimizer = mode.optimizer(1.0, case.rho, seed)
        weights = {"w": mx.full((ELEMENTS,), case.start, mode.dtype)}
        gradient = mx.full((ELEMENTS,), case.g, mode.dtype)
        for step in range(case.steps):
            if case.gaussian:
                key = mx.random.key(seed * case.steps + step)
                gradient = case.g * mx.random.normal((ELEMENTS,), key=key)
            gradients = {"w": gradient.astype(mode.dtype)}
            weights = optimizer.apply_gradients(gradients, weights)
            mx.eval(weights, optimizer.state)
    ends = {**weights, **optimizer.state["w"]}
    with mx.stream(mx.cpu):
        w, v, u = (np.array(ends[name].astype(mx.float64)) for name in "wvu")
    return {"w": w - case.start, "v": v, "u": u / EPS}


def follow_all(case: Given, mode: Mode, seeds: range) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the elements of all seeds."""
    ends = [follow(case, mode, seed) for seed in seeds]
    return {x: spread(np.concatenate([end[x] for end in ends])) for x in "wvu"}


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
    """Data, a model made from a seed, and how it is trained."""

    name: str
    subject: str
    data: Data
    model: Callable[[int], nn.Module]
    modes: list[Mode]
    lr: float
    rho: float
    batch: int
    steps: int

    @property
    def title(self) -> str:
        rates = f"lr {self.lr:g}, rho {self.rho:g}"
        return f"{self.subject}, {rates}, {self.steps} steps of {self.batch}"


def images(name: str, data: Data, modes: list[Mode], **how: Any) -> Task:
    inputs, hidden = data.x_train.shape[1], 64
    subject = f"{data.name}, {inputs}-{hidden}-{data.y_train.max() + 1}"

    def model(seed: int) -> nn.Module:
        return build_model(data, mx.float32, seed, (hidden,))

    return Task(name, subject, data, model, modes, **how)


def digits(lr: float, rho: float, steps: int) -> Task:
    modes = [FLOAT32, *BFLOAT16, *FLOAT16, *NARROW]
    name = f"digits, lr {lr:g}, rho {rho:g}"
    return images(name, load_digits(), modes, lr=lr, rho=rho, batch=32, steps=steps)


def text(lr: float, rho: float, steps: int, context: int = 32) -> Task:
    """Python's own documentation, as pydoc holds it."""
    whole = "\n".join(topics[key] for key in sorted(topics))
    alphabet = sorted(set(whole))
    codes = np.array([alphabet.index(c) for c in whole], np.int32)
    rows = len(codes) // (context + 1)
    windows = codes[: rows * (context + 1)].reshape(rows, -1)
    order = np.random.default_rng(0).permutation(rows)
    train, test = windows[order[256:]], windows[order[:256]]

    def model(seed: int) -> nn.Module:
        mx.random.seed(seed)
        return Transformer(len(alphabet), context, 32, 2)

    subject = (
        f"Python's help text ({len(codes):,} characters, {len(alphabet)} different), "
        f"transformer of 2 layers of 32 on {context} characters"
    )
    data = Data("text", train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:])
    return Task("text", subject, data, model, [FLOAT32, *BFLOAT16], lr, rho, 8, steps)


SEEN = 8192  # predictions of the training data, for the loss


def train(task: Task, mode: Mode, seed: int) -> dict[str, float]:
    """The same start and the same batches for every mode."""
    model = task.model(seed)
    model.set_dtype(mode.dtype)
    optimizer = mode.optimizer(task.lr, task.rho, seed)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, loss_fn)

    data, draw = task.data, np.random.default_rng(seed)
    for _ in range(task.steps):
        rows = draw.integers(len(data.x_train), size=task.batch)
        x, y = as_array(data.x_train[rows], mode.dtype), mx.array(data.y_train[rows])
        _, gradients = loss_and_grad(model, x, y)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)

    seen = slice(SEEN // data.y_train[0].size)
    x, y = as_array(data.x_train[seen], mode.dtype), mx.array(data.y_train[seen])
    size = sum(x.size for _, x in tree_flatten(model.trainable_parameters()))
    state = [x.nbytes for _, x in tree_flatten(optimizer.state) if x.ndim]
    return {
        "loss": loss_fn(model, x, y).item(),
        "accuracy": accuracy(model, data, mode.dtype),
        "state_bytes": sum(state) / size,
    }


def spread(values: Any) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}


def spread_text(value: dict[str, float], form: str) -> str:
    return f"{value['mean']:{form}} ± {value['sd']:{form.lstrip('+')}}"


def rounded(x: float, digits: int) -> str:
    return f"{x:.0f}" if 10**digits <= abs(x) < 1e6 else f"{x:.{digits}g}"


def end_text(end: dict[str, float]) -> str:
    # Equal numbers have a deviation that is only rounding.
    seen = end["sd"] > 1e-9 * abs(end["mean"])
    return rounded(end["mean"], 3) + (f" ± {rounded(end['sd'], 2)}" if seen else "")


def tables(record: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows, the headings first."""
    for title, cases in record["given"].items():
        for name in GIVEN[title][2]:
            rows: list[Row] = [("", *(case["case"] for case in cases))]
            for mode in cases[0]["ends"]:
                ends = (end_text(case["ends"][mode][name]) for case in cases)
                rows.append((mode, *ends))
            yield f"{title}: {SUBJECTS[name]}", rows
    for task in record["tasks"]:
        rows = [("", "loss", "above float32", "accuracy", "bytes of state")]
        for mode, result in task["results"].items():
            texts = (
                spread_text(result["loss"], ".5f"),
                spread_text(result["above"], "+.5f") if mode != FLOAT32.name else "",
                spread_text(result["accuracy"], ".2%"),
            )
            rows.append((mode, *texts, f"{result['state_bytes']:.2f}"))
        yield f"{task['name']}: {task['title']}", rows


EXPLANATION = """\
"stock" is mlx.optimizers.AdaDelta, eps is 1e-6. Under given gradients: the mean over \
{elements} elements for each of {seeds} seeds, ± their standard deviation. In \
training: the mean over {seeds} seeds ± the standard deviation; a seed gives every \
mode the same start and batches. The loss is that of at most {seen} predictions of the \
training data, at the end; "above float32" is its difference from float32's of the \
same seed; accuracy is that of unseen data; state is in bytes a parameter."""


def markdown(record: dict[str, Any]) -> str:
    lines = [record["explanation"], "", record["where"]]
    for title, rows in tables(record):
        lines += ["", f"### {title}", "", markdown_table(*rows).rstrip()]
    return "\n".join(lines) + "\n"


def save_plot(record: dict[str, Any], path: Path) -> None:
    """The losses of every seed, a panel a task."""
    tasks = record["tasks"]
    size = (6.5, 0.5 + 2.8 * len(tasks))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle("Final training loss of each seed; the band is float32's")
    for task, panel in zip(tasks, figure.subplots(len(tasks)), strict=True):
        for i, (name, result) in enumerate(task["results"].items()):
            color = "#d95f02" if "stock" in name else "#08306b"
            values = result["losses"]
            panel.plot(values, [i] * len(values), "|", color=color, ms=9)
        exact = task["results"][FLOAT32.name]["losses"]
        panel.axvspan(min(exact), max(exact), color="#cccccc", alpha=0.6, lw=0)
        panel.set_yticks(range(len(task["results"])), list(task["results"]))
        panel.invert_yaxis()
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)
        panel.set_title(task["name"], fontsize=10, loc="left")
    figure.savefig(path)


def choose_tasks(options: argparse.Namespace) -> list[Task]:
    quick = options.quick
    tasks = [
        digits(1.0, 0.9, 44 if quick else 1320),
        digits(0.1, 0.999, 44 if quick else 2640),
        text(1.0, 0.9, 3 if quick else 600),
    ]
    if options.mnist is not None:
        data, modes = load_npz(options.mnist), [FLOAT32, *BFLOAT16]
        how = {"lr": 1.0, "rho": 0.95, "batch": 64, "steps": 5 if quick else 938}
        tasks.append(images("MNIST", data, modes, **how))
    return tasks


def run(tasks: list[Task], quick: bool) -> dict[str, Any]:
    seeds = range(2 if quick else 5)
    versions = ", ".join(f"{x} {version(x)}" for x in ("mlx-adadelta", "mlx", "numpy"))
    device = "GPU" if mx.default_device() == mx.gpu else "CPU"
    explanation = EXPLANATION.format(elements=ELEMENTS, seeds=len(seeds), seen=SEEN)
    record: dict[str, Any] = {
        "where": f"{platform.system()} {platform.machine()}, {device},\nPython "
        f"{platform.python_version()}, {versions}.",
        "explanation": explanation,
        "given": {},
        "tasks": [],
    }
    for title, (cases, modes, _) in GIVEN.items():
        record["given"][title] = []
        for full in cases:
            case = replace(full, steps=3) if quick else full
            ends = {
                mode.name: follow_all(case, mode, seeds)
                for mode in track(modes, f"{title}: {case}")
            }
            record["given"][title].append({"case": str(case), "ends": ends})
    for task in tasks:
        results: dict[str, Any] = {}
        for mode in track(task.modes, task.name):
            runs = [train(task, mode, seed) for seed in seeds]
            losses = [run["loss"] for run in runs]
            exact = results.get(FLOAT32.name, {"losses": losses})["losses"]
            results[mode.name] = {
                "losses": losses,
                "loss": spread(losses),
                "above": spread(np.subtract(losses, exact)),
                "accuracy": spread([run["accuracy"] for run in runs]),
                "state_bytes": runs[0]["state_bytes"],
            }
        names = {"name": task.name, "title": task.title}
        record["tasks"].append({**names, "results": results})
    return record


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="precision", description=__doc__, allow_abbrev=False)
    keys = "x_train, y_train, x_test, y_test"
    parser.add_argument("--quick", action="store_true", help="a few steps, two seeds")
    parser.option("--mnist", None, keys, type=Path, metavar="FILE.npz")
    parser.option("--out", Path("out/precision"), type=Path, metavar="FOLDER")
    options, tasks, _ = parser.parse(argv, choose_tasks, make_folder)
    record = run(tasks, options.quick)
    path = options.out / "precision.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))
    save_plot(record, path.with_suffix(".png"))
    print(markdown(record))
    print(f"written: {path}, precision.md, precision.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
