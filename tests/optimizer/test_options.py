"""Weight decay, maximize, clipping and scaling, and options that make no sense."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from arrays import make_tensors, to_float64
from checks import assert_same_trees, unchanged
from mlx.utils import tree_flatten
from torch_reference import CONFIGURATIONS, STEPS, problem, trajectory

import mlx_adadelta
from mlx_adadelta import AdaDelta, clip_scale, nonfinite


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_trajectories_are_those_of_torch(backend, configuration):
    w, gradients = problem()
    expected = trajectory(configuration)
    optimizer = AdaDelta(1.0, backend=backend, **configuration)
    parameters = {"w": mx.array(w.astype(np.float32))}
    for g in gradients:
        parameters = optimizer.apply_gradients(
            {"w": mx.array(g.astype(np.float32))}, parameters
        )
        mx.eval(parameters, optimizer.state)
    assert len(gradients) == STEPS
    # Relative to the larger of start and end: an element may pass near zero.
    size = np.maximum(np.abs(w), np.abs(expected))
    assert np.max(np.abs(to_float64(parameters["w"]) - expected) / size) < 1e-6


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_clip_scale_is_clip_grad_norm(backend, max_norm, compiled):
    t = make_tensors((40, 30), seed=1), make_tensors((7,), seed=2)
    gradients = {"a": t[0].g, "b": [t[1].g]}
    parameters = {"a": t[0].w, "b": [t[1].w]}

    ours = AdaDelta(1.0, backend=backend)
    ours.init(parameters)

    def step(gradients: Any, parameters: Any) -> Any:
        scale, norm = clip_scale(gradients, max_norm)
        return ours.apply_gradients(gradients, parameters, gradient_scale=scale), norm

    if compiled:
        step = mx.compile(step, inputs=[ours.state], outputs=[ours.state])
    new, norm = step(gradients, parameters)

    clipped, stock_norm = optim.clip_grad_norm(gradients, max_norm)
    stock = optim.AdaDelta(1.0)
    expected = stock.apply_gradients(clipped, parameters)
    assert norm.dtype == mx.float32
    assert norm.item() == pytest.approx(stock_norm.item(), rel=1e-6)
    for (path, x), (_, y) in zip(
        tree_flatten([new, ours.state]),
        tree_flatten([expected, stock.state]),
        strict=True,
    ):
        assert mx.allclose(x, y, rtol=1e-5, atol=1e-7).item(), path


def test_clip_scale_of_tiny_gradients_is_clip_grad_norm():
    """Where the 1e-6 that stock adds to the norm counts."""
    gradients = [mx.full((100,), 1e-7)]
    scale, _ = clip_scale(gradients, 1e-7)
    clipped, _ = optim.clip_grad_norm(gradients, 1e-7)
    assert mx.allclose(scale * gradients[0], clipped[0], rtol=1e-6, atol=0).item()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), "1"])
def test_clip_scale_refuses(bad):
    with pytest.raises((TypeError, ValueError), match="max_norm"):
        clip_scale([mx.ones(2)], bad)


@pytest.mark.parametrize("function", [lambda g: clip_scale(g, 1.0), nonfinite])
@pytest.mark.parametrize("bad", [None, mx.array([1, 2])], ids=["None", "integers"])
def test_what_looks_at_gradients_names_one_that_is_none(function, bad):
    with pytest.raises(
        TypeError, match=r"gradient of a\.1 must be (an array|of a real)"
    ):
        function({"a": [mx.ones(2), bad]})


@pytest.mark.parametrize(
    ("step", "error"),
    [
        *((-1, ValueError), (2**63, ValueError), (1.5, TypeError), ("1", TypeError)),
        *((mx.array(1.5), TypeError), (mx.array([1]), ValueError)),
    ],
    ids=str,
)
def test_refuses_a_step(step, error):
    w = mx.ones(2)
    for stochastic in (False, True):
        with pytest.raises(error, match="step must"):
            mlx_adadelta.adadelta_update(
                *(w, w, w, w, 1.0), step=step, stochastic_rounding=stochastic
            )


@pytest.mark.parametrize(
    "options",
    [{"decoupled_weight_decay": True}, {"decay_filter": lambda path, w: True}],
)
def test_refuses_to_say_how_to_decay_by_nothing(options):
    with pytest.raises(ValueError, match="weight_decay is 0"):
        AdaDelta(1.0, **options)
    w = mx.ones(2)
    with pytest.raises(ValueError, match="weight_decay is 0"):
        mlx_adadelta.adadelta_update(w, w, w, w, 1.0, **options)


def test_an_assigned_option_is_used(backend):
    ours, expected = AdaDelta(1.0, backend=backend), AdaDelta(1.0, 0.5, backend=backend)
    ours.rho = 0.5
    g, w = {"w": mx.ones(3)}, {"w": mx.zeros(3)}
    for _ in range(2):
        new = [o.apply_gradients(g, w) for o in (ours, expected)]
    assert_same_trees(backend, new[0], new[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gradient_scale": mx.ones(2)}, ValueError, r"gradient_scale .*\(2,\)"),
        ({"skip": mx.array([True])}, ValueError, r"skip .*\(1,\)"),
        ({"gradient_scale": float("nan")}, ValueError, "gradient_scale .* nan"),
        ({"gradient_scale": 1e39}, ValueError, r"gradient_scale must be .* 1e\+39"),
        ({"gradient_scale": "2"}, TypeError, "gradient_scale .* '2'"),
        ({"skip": mx.array(1)}, TypeError, "skip must be bool but is .*int32"),
        ({"skip": 1}, TypeError, "skip must be bool .* but is 1"),
    ],
)
def test_refuses_at_the_step_and_changes_nothing(backend, arguments, error, message):
    optimizer = AdaDelta(1.0, backend=backend)
    parameters = {"w": mx.ones(3)}
    optimizer.init(parameters)
    with unchanged(optimizer.state), pytest.raises(error, match=message):
        optimizer.apply_gradients({"w": mx.ones(3)}, parameters, **arguments)


@pytest.mark.parametrize("value", [np.array(0.5), np.float32(0.5), np.array(2)])
def test_a_learning_rate_from_numpy(value):
    optimizer, other = AdaDelta(value), AdaDelta(lambda step: value)
    number = float(value)
    for rate in (optimizer.learning_rate, other.learning_rate):
        assert rate.item() == optim.AdaDelta(value).learning_rate.item() == number
    optimizer.learning_rate = value
    w = mx.ones(2)
    new, expected = (
        mlx_adadelta.adadelta_update(w, w, w, w, x)[0] for x in (value, number)
    )
    assert mx.array_equal(new, expected).item()


def warm(step):
    return 0.5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"learning_rate": warm, "rho": 0.95, "eps": 1e-6, "backend": "mlx"},
            "AdaDelta(learning_rate=warm, rho=0.95, backend='mlx')",
        ),
        (
            {
                "learning_rate": mx.array(2.0),
                "weight_decay": 0.1,
                "decoupled_weight_decay": True,
                "decay_filter": warm,
                "maximize": True,
                "state_dtype": mx.float32,
                "stochastic_rounding": True,
                "seed": 3,
            },
            "AdaDelta(learning_rate=2.0, weight_decay=0.1, "
            "decoupled_weight_decay=True, decay_filter=warm, maximize=True, "
            "state_dtype=mlx.core.float32, stochastic_rounding=True, seed=3)",
        ),
    ],
    ids=["some", "all"],
)
def test_repr_says_what_is_not_a_default(arguments, expected):
    optimizer = AdaDelta(**arguments)
    assert repr(optimizer) == expected
    assert repr(type("Own", (AdaDelta,), {})(1.0)) == "Own(learning_rate=1.0)"


def test_repr_in_a_compiled_step():
    optimizer, seen = AdaDelta(1.0, 0.95), []

    def step(x):
        seen.append(repr(optimizer))
        return x

    mx.compile(step, inputs=optimizer.state)(mx.array(1.0))
    assert seen == ["AdaDelta(learning_rate=(traced), rho=0.95)"]
