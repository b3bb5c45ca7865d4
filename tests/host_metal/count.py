"""What one step asks of a GPU, counted: `python tests/host_metal/count.py`.

This package's dispatches and barriers are recorded by the mock of Metal, over the
cases' tensors made small. Stock's kernels, and how often they pass over a
parameter, are counted in the graph of one tensor.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402

from bench.cases import Tensor, all_cases  # noqa: E402
from host_metal.backend import Mock, load  # noqa: E402
from mlx_adadelta import backend  # noqa: E402
from mlx_adadelta.options import Options  # noqa: E402
from mlx_adadelta.update import update_tensors  # noqa: E402

CASES = ("large", "transformer", "lora", "small", "resnet50")
SMALL = 3  # the longest side of a stand-in
FLOAT = 4  # bytes
# Primitives that move no memory.
VIEWS = {"Broadcast", "ExpandDims", "Flatten", "Reshape", "Squeeze", "Transpose"}
VIEWS |= {"Slice", "Split", "Unflatten"}


def stand_in(tensor: Tensor) -> list[mx.array]:
    """A tensor's w, g, v and u, lying as in the case but small."""
    shape = tuple(min(side, SMALL) for side in tensor.shape)
    arrays = [mx.random.uniform(shape=shape) for _ in range(4)]
    if tensor.transposed:
        arrays[1] = mx.contiguous(arrays[1].T).T
    return arrays


def count_ours(tensors: tuple[Tensor, ...]) -> tuple[int, int, float]:
    """Dispatches, barriers, and bytes an element, of a step on the mock."""
    module = load()
    columns = [list(column) for column in zip(*map(stand_in, tensors), strict=True)]
    mx.eval(columns)
    size = sum(x.size for x in columns[0])
    mock = Mock(module)
    shipped, backend.extension = backend.extension, module
    try:
        mock.start_record()
        new = update_tensors(
            columns,
            mx.array(1.0),
            Options(backend="cpu"),
            path=str,
            step=mx.array(0),
            gradient_scale=None,
            skip=None,
        )
        mx.eval(new)
        record = mock.end_record()
    finally:
        backend.extension = shipped
    dispatches = [entry for entry in record if entry[0] == "dispatch"]
    scalars = len(dispatches) * (4 + 4 + 1 + 8)  # lr, gradient scale, skip, step
    moved = sum(int(entry[2]) for entry in dispatches) - scalars
    return len(dispatches), record.count(["barrier"]), moved / size


def graph_of_stock(compiled: bool) -> str:
    """The graph of stock's update of one matrix, as DOT."""
    w, g = mx.ones((SMALL, SMALL)), mx.ones((SMALL, SMALL))
    optimizer = optim.AdaDelta(1.0)
    tree = {"w": w}
    optimizer.init(tree)
    state = [tree, optimizer.state]

    def eager(gradient: mx.array) -> None:
        tree.update(optimizer.apply_gradients({"w": gradient}, tree))

    update: Callable[[mx.array], Any] = eager
    if compiled:
        update = mx.compile(eager, inputs=state, outputs=state)
    update(g)
    mx.eval(state)
    old = {"w": tree["w"], **optimizer.state["w"]}
    update(g)
    new = optimizer.state["w"]
    named = {"in_" + name: x for name, x in {**old, "g": g}.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step.dot")
        mx.export_to_dot(str(path), tree["w"], new["v"], new["u"], **named)
        return path.read_text()


def count_graph(graph: str) -> tuple[int, int, int]:
    """Kernels, passes over the parameter, and kernels in the longest chain."""
    names = dict(re.findall(r'(\d+) \[label ="([^"]+)"', graph))
    reads = set(re.findall(r'^"(\w+)" -> (\d+)$', graph, re.M))
    writers = {
        array: node for node, array in re.findall(r'^(\d+) -> "(\w+)"$', graph, re.M)
    }
    kernels = {node for node, name in names.items() if name not in VIEWS}
    # The other leaves are scalars, and what is broadcast is one.
    large = {array for array, node in writers.items() if node in kernels}
    large |= {f"in_{name}" for name in "wgvu"}
    inputs = sum(array in large and node in kernels for array, node in reads)
    outputs = sum(node in kernels for node in writers.values())

    def depth(node: str) -> int:
        below = [writers[a] for a, reader in reads if reader == node and a in writers]
        return (node in kernels) + max(map(depth, below), default=0)

    return len(kernels), inputs + outputs, max(map(depth, kernels))


def row(case: str, who: str, dispatches: int, moved: float, barriers: str) -> str:
    return f"| {case} | {who} | {dispatches} | {moved / 1e6:.1f} | {barriers} |"


def main() -> None:
    stock = {
        "stock": count_graph(graph_of_stock(compiled=False)),
        "stock compiled": count_graph(graph_of_stock(compiled=True)),
    }
    for name, (kernels, passes, chain) in stock.items():
        print(f"{name}: {kernels} kernels, {passes} passes, {chain} in a row")
    print("\n| case | | dispatches | MB moved | barriers |\n|---|---|---|---|---|")
    for name in CASES:
        tensors = all_cases(quick=False)[name].tensors
        size = sum(math.prod(tensor.shape) for tensor in tensors)
        for label, (kernels, passes, chain) in stock.items():
            cells = (kernels * len(tensors), passes * FLOAT * size, f">= {chain - 1}")
            print(row(name, label, *cells))
        count, barriers, element = count_ours(tensors)
        print(row(name, "this one", count, element * size, str(barriers)))


if __name__ == "__main__":
    main()
