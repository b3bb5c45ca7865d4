"""An evaluation that throws leaves everything as it was; the next one completes."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from arrays import make_tensors
from checks import LR, assert_same_trees, check_update

from mlx_adadelta import adadelta_update


def evaluate_elsewhere(x: mx.array) -> None:
    """Streams belong to their threads: MLX throws as a primitive asks for its own."""
    with mx.stream(mx.new_stream(mx.cpu)):
        mx.eval(x)


@pytest.mark.parametrize("layout", ["same", "transposed", "sliced"])
@pytest.mark.parametrize("first", range(3))
def test_evaluation_completes_after_a_throw(first: int, layout: str) -> None:
    with mx.stream(mx.cpu):
        layouts = ("same", layout, "same", "same")
        tensors = [make_tensors((3, 5), layouts=layouts, seed=i) for i in range(3)]
        lists = [list(xs) for xs in zip(*tensors, strict=True)]
        expected = adadelta_update(*lists, LR, backend="mlx")
        new = adadelta_update(*lists, LR, backend="cpu")
    with ThreadPoolExecutor() as pool, pytest.raises(RuntimeError, match="Stream"):
        pool.submit(evaluate_elsewhere, new[0][0]).result()
    # First another output than the one the failed evaluation went through.
    mx.eval(new[first][2])
    assert_same_trees("cpu", new, expected)
    with mx.stream(mx.cpu):
        check_update("cpu", tensors)  # the arguments are as they were
