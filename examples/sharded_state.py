"""Data-parallel training with each rank keeping the state of its tensors alone.

    mlx.launch -n 2 --backend ring examples/sharded_state.py

Every rank updates its share of the tensors, then the ranks exchange the new
weights. They end as those of data_parallel.py, to the bit: an update of one
tensor does not look at another. With stochastic rounding give each rank its own
seed; the weights are then another draw than without sharding, as good a one.
"""

import mlx.core as mx
import mlx.nn as nn
from data_parallel import (
    BATCH,
    STEPS,
    loss_fn,
    make_batch,
    make_model,
    parse_arguments,
    report,
    watch,
)
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adadelta import AdaDelta

Arrays = dict[str, mx.array]  # by path


def split(parameters: Arrays, size: int) -> list[list[str]]:
    """The paths each rank updates: the largest first, to who has least so far."""
    shares: list[list[str]] = [[] for _ in range(size)]
    bytes_of = [0] * size
    for path in sorted(parameters, key=lambda path: (-parameters[path].nbytes, path)):
        rank = bytes_of.index(min(bytes_of))
        shares[rank].append(path)
        bytes_of[rank] += parameters[path].nbytes
    return shares


def exchange(mine: Arrays, parameters: Arrays, shares: list[list[str]]) -> Arrays:
    """Everybody's new tensors, of one type, from one's own: one all_gather."""
    lengths = [sum(parameters[path].size for path in share) for share in shares]
    row = mx.concatenate([w.reshape(-1) for w in mine.values()])
    row = mx.pad(row, (0, max(lengths) - row.size))
    rows = mx.distributed.all_gather(row[None])
    new = {}
    for share, row in zip(shares, rows, strict=True):
        start = 0
        for path in share:
            w = parameters[path]
            new[path] = row[start : start + w.size].reshape(w.shape)
            start += w.size
    return new


def main() -> None:
    options = parse_arguments(__doc__)
    watch(options)
    group = mx.distributed.init()
    rank, size = group.rank(), group.size()
    part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)

    model = make_model()
    shares = split(dict(tree_flatten(model.trainable_parameters())), size)
    optimizer = AdaDelta(learning_rate=1.0)  # its state is made at the first step
    loss_and_grad = nn.value_and_grad(model, loss_fn)
    for step in range(STEPS):
        watch(options)
        x, y = make_batch(step)
        loss, gradients = loss_and_grad(model, x[part], y[part])
        flat = dict(tree_flatten(nn.average_gradients(gradients)))
        parameters = dict(tree_flatten(model.trainable_parameters()))
        mine = {path: flat[path] for path in shares[rank]}
        mine = optimizer.apply_gradients(mine, parameters)
        new = exchange(mine, parameters, shares)
        model.update(tree_unflatten(list(new.items())))
        mx.eval(loss, model.state, optimizer.state)
    report(group, loss, model, optimizer, options.save)


if __name__ == "__main__":
    main()
