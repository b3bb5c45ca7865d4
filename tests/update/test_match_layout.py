"""match_layout: where parameters lie, what stays equal, what is left alone."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arrays import strides
from checks import assert_same_trees
from mlx.utils import tree_flatten
from models import save_and_load, take_steps

import mlx_adadelta
from mlx_adadelta import match_layout


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
        ({"a": [mx.ones(3)]}, ValueError, r"gradient of a\.0 .*\(2,\).*\(3,\)"),
    ],
)
def test_names_gradients_that_are_another_tree(gradients, error, message):
    with pytest.raises(error, match=message):
        match_layout({"a": [mx.ones(2), mx.ones(2)]}, gradients)


def make_model() -> nn.Module:
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))


def loss(model: nn.Module) -> mx.array:
    x = mx.random.normal((16, 12), key=mx.random.key(1))
    return mx.square(model(x)).mean()


def match(model: nn.Module) -> None:
    _, gradients = nn.value_and_grad(model, loss)(model)
    model.update(match_layout(model.parameters(), gradients))


@pytest.mark.skipif(mlx_adadelta.backends() == ("mlx",), reason="no native backend")
def test_the_layout_lasts_and_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    model, optimizer = make_model(), mlx_adadelta.AdaDelta(1.0)
    match(model)
    take_steps(model, optimizer, loss)
    assert strides(model.layers[0].weight) == (1, 20)  # (20, 12), by columns
    model.save_weights(str(tmp_path / "weights.safetensors"))
    state = save_and_load(optimizer.state, tmp_path / "state.safetensors")
    take_steps(model, optimizer, loss)

    resumed, resumed_optimizer = make_model(), mlx_adadelta.AdaDelta(1.0)
    resumed.load_weights(str(tmp_path / "weights.safetensors"))
    assert strides(resumed.layers[0].weight) == (12, 1)
    resumed_optimizer.state = state
    match(resumed)
    take_steps(resumed, resumed_optimizer, loss)
    assert_same_trees(
        "cpu",
        [resumed.parameters(), resumed_optimizer.state],
        [model.parameters(), optimizer.state],
    )
