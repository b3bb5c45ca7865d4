"""Data-parallel training: every rank a part of each batch, the gradients averaged.

    mlx.launch -n 2 --backend ring examples/data_parallel.py

Also runs alone, on the joined batches, and ends with the same weights within
rounding. `--save FOLDER` writes each rank's weights there as rank<N>.safetensors.
"""

import argparse
import faulthandler
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_adadelta import AdaDelta

BATCH, STEPS = 64, 50


def parse_arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--save", type=Path, metavar="FOLDER")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    return parser.parse_args()


def watch(options: argparse.Namespace) -> None:
    """Ends this process unless it is called again in time.

    A rank that is gone is an error, but MLX waits for ever for one that hangs.
    """
    faulthandler.dump_traceback_later(options.timeout, exit=True)


def make_model() -> nn.Module:
    mx.random.seed(0)  # every rank starts from the same weights
    return nn.Sequential(
        *(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    )


def make_batch(step: int) -> tuple[mx.array, mx.array]:
    """The joined batch of a step; a real loader would read this rank's part alone."""
    x = mx.random.normal((BATCH, 32), key=mx.random.key(step))
    return x, mx.argmax(x[:, :4], axis=1)


def loss_fn(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def main() -> None:
    options = parse_arguments(__doc__)
    watch(options)
    group = mx.distributed.init()
    rank, size = group.rank(), group.size()
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)

    model = make_model()
    optimizer = AdaDelta(learning_rate=1.0)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    for step in range(STEPS):
        watch(options)
        x, y = make_batch(step)
        loss, gradients = loss_and_grad(model, x[mine], y[mine])
        # The same sums on every rank, hence the same weights, to the bit.
        gradients = nn.average_gradients(gradients)
        optimizer.update(model, gradients)
        mx.eval(loss, model.state, optimizer.state)

    report(group, loss, model, optimizer, options.save)


def report(
    group: mx.distributed.Group,
    loss: mx.array,
    model: nn.Module,
    optimizer: AdaDelta,
    folder: Path | None,
) -> None:
    state = sum(x.nbytes for _, x in tree_flatten(optimizer.state) if x.ndim)
    rank = f"rank {group.rank()} of {group.size()}"
    print(f"{rank}: loss {loss.item():.4f}, {state} bytes of state", flush=True)
    if folder:
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(folder / f"rank{group.rank()}.safetensors"), weights)


if __name__ == "__main__":
    main()
