"""match_layout: where parameters lie, what stays equal, what is left alone."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import mlx_adadelta
from mlx_adadelta import match_layout


def strides(x: mx.array) -> tuple[int, ...]:
    unsigned = {2: mx.uint16, 4: mx.uint32}[x.itemsize]
    return np.array(x.view(unsigned), copy=False).strides


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("axes", [(1, 0), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_lies_as_the_gradient_and_keeps_its_values(axes, dtype):
    shape = (3, 5, 7)[: len(axes)]
    w = mx.random.normal(shape).astype(dtype)
    g = mx.zeros([shape[a] for a in axes], dtype)
    g = g.transpose(np.argsort(axes).tolist())
    assert g.shape == w.shape
    laid = match_layout(w, g)
    assert strides(laid) == strides(g) != strides(w)
    assert mx.array_equal(laid, w).item()


def test_idempotent():
    w = mx.random.normal((4, 6))
    g = mx.zeros((6, 4)).T
    once = match_layout(w, g)
    assert match_layout(once, g) is once
    assert match_layout(w, mx.zeros((4, 6))) is w


@pytest.mark.parametrize(
    "gradient", [mx.zeros((8, 6))[::2], mx.broadcast_to(0.0, (4, 6))]
)
def test_a_gradient_with_gaps_moves_nothing(gradient):
    w = mx.random.normal((4, 6))
    assert match_layout(w, gradient) is w


def test_axes_of_length_one_lie_anywhere():
    w = mx.random.normal((5, 1, 3))
    g = mx.contiguous(mx.zeros((3, 1, 5))).transpose(2, 1, 0)
    laid = match_layout(w, g)
    assert strides(laid)[::2] == strides(g)[::2] != strides(w)[::2]
    assert match_layout(laid, g) is laid


def test_frozen_subsets_are_left_as_they_are():
    w = mx.random.normal((4, 6))
    g = mx.zeros((6, 4)).T
    parameters = {"a": [w, w, w], "b": {"c": w, "d": w}, "e": mx.array(1.0)}
    laid = match_layout(parameters, {"a": [None, g], "b": {"c": g}})
    moved = {path for path, x in tree_flatten(laid) if x is not w and x.ndim == 2}
    assert moved == {"a.1", "b.c"}
    assert match_layout(parameters, None) is parameters


@pytest.mark.parametrize(
    ("gradients", "error", "message"),
    [
        (mx.ones(2), TypeError, r"gradients of \(root\) must be a dict.* are array"),
        ({"a": mx.ones(2)}, TypeError, r"gradients of a must be a list.* are array"),
        ({"a": {"b": None}}, TypeError, r"gradients of a must be a list.* are dict"),
        ({"a": [None] * 3}, ValueError, r"gradient at a\.2 but no parameter"),
        ({"a": [[None]]}, TypeError, r"gradient of a\.0 must be an array"),
    ],
)
def test_names_gradients_that_are_another_tree(gradients, error, message):
    with pytest.raises(error, match=message):
        match_layout({"a": [mx.ones(2), mx.ones(2)]}, gradients)


def test_names_a_gradient_of_another_shape():
    with pytest.raises(ValueError, match=r"gradient of a\.0 .*\(4, 6\).*\(6, 4\)"):
        match_layout({"a": [mx.zeros((4, 6))]}, {"a": [mx.zeros((6, 4))]})


def _model() -> nn.Module:
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))


def _gradients(model: nn.Module) -> dict:
    x = mx.random.normal((16, 12), key=mx.random.key(1))
    return nn.value_and_grad(model, lambda m: mx.square(m(x)).mean())(model)[1]


def _train(steps: int, model: nn.Module, optimizer: optim.Optimizer) -> None:
    for _ in range(steps):
        optimizer.update(model, _gradients(model))
        mx.eval(model.parameters(), optimizer.state)


def _match(model: nn.Module) -> None:
    model.update(match_layout(model.parameters(), _gradients(model)))


@pytest.mark.skipif(mlx_adadelta.backends() == ("mlx",), reason="no native backend")
def test_the_layout_lasts_and_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    model, optimizer = _model(), mlx_adadelta.AdaDelta(1.0)
    _match(model)
    _train(3, model, optimizer)
    assert strides(model.layers[0].weight) == (4, 80)  # (20, 12), by columns
    model.save_weights(str(tmp_path / "weights.safetensors"))
    state = str(tmp_path / "state.safetensors")
    mx.save_safetensors(state, dict(tree_flatten(optimizer.state)))
    _train(3, model, optimizer)

    resumed, resumed_optimizer = _model(), mlx_adadelta.AdaDelta(1.0)
    resumed.load_weights(str(tmp_path / "weights.safetensors"))
    assert strides(resumed.layers[0].weight) == (48, 4)
    resumed_optimizer.state = tree_unflatten(list(mx.load(state).items()))
    _match(resumed)
    _train(3, resumed, resumed_optimizer)
    expected = dict(tree_flatten([model.parameters(), optimizer.state]))
    got = dict(tree_flatten([resumed.parameters(), resumed_optimizer.state]))
    assert got.keys() == expected.keys()
    for path, x in expected.items():
        assert mx.array_equal(got[path], x).item(), path
