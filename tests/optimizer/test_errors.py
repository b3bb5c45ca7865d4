"""What does not fit is refused, by name, before anything has changed."""

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checks import assert_same_bits, unchanged

from mlx_adadelta import AdaDelta, adadelta_update, backends
from mlx_adadelta.backend import Backend

NAN, INF = float("nan"), float("inf")


def contains(*parts: str) -> str:
    """A pattern that finds the parts in this order."""
    return ".*".join(map(re.escape, parts))


SWITCHES = ("decoupled_weight_decay", "maximize", "stochastic_rounding")
EXPECTED = {
    "rho": "rho must be a number in [0, 1]",
    "eps": "eps must be a positive finite number (>0)",  # what stock says
    "learning_rate": "learning_rate must be a finite number that is not negative",
    "backend": "backend must be one of auto, metal, cpu, mlx",
    "weight_decay": "weight_decay must be a finite number that is not negative",
    "decay_filter": "decay_filter must be a function of a path and a parameter",
    "state_dtype": "state_dtype must be None, float32, float16 or bfloat16",
    "seed": "seed must be an integer in [0, 2**64)",
    **{name: f"{name} must be True or False" for name in SWITCHES},
}
NOT_IN_FLOAT32 = (1e-46, 1e39)  # 0 and infinite as the kernels get them
HYPER_PARAMETERS = [
    # name, value, error
    *(("eps", x, ValueError) for x in NOT_IN_FLOAT32),
    *((name, 1e39, ValueError) for name in ("learning_rate", "weight_decay")),
    *(("rho", x, ValueError) for x in (-0.1, 1.1, NAN, INF)),
    *(("rho", x, TypeError) for x in ("0.9", None, True, mx.array(0.9))),
    *(("eps", x, ValueError) for x in (0.0, -1e-6, NAN, INF)),
    *(("eps", x, TypeError) for x in ("x", None, False)),
    *(("learning_rate", x, ValueError) for x in (-1, -0.5, NAN, INF)),
    *(("learning_rate", x, TypeError) for x in ("x", None, False, [1.0])),
    *(("backend", x, ValueError) for x in ("cuda", "", None)),
    *(("weight_decay", x, ValueError) for x in (-0.1, -1, NAN)),
    *(("state_dtype", x, ValueError) for x in (mx.int32, "float32")),
    *((name, x, TypeError) for name in SWITCHES for x in (1, 0, None)),
    *(("weight_decay", "x", TypeError), ("decay_filter", 3, TypeError)),
    *(("seed", -1, ValueError), ("seed", 2**64, ValueError), ("seed", 1.5, TypeError)),
]


@pytest.mark.parametrize(("name", "value", "error"), HYPER_PARAMETERS)
def test_hyper_parameters(name: str, value: Any, error: type[Exception]) -> None:
    message = contains(EXPECTED[name], f"but is {value!r}")
    if isinstance(value, float) and value in NOT_IN_FLOAT32:
        message += r" \(.* in float32\)"
    with pytest.raises(error, match=message):
        AdaDelta(**{"learning_rate": 1.0, name: value})
    x = mx.zeros((2,))
    with pytest.raises(error, match=message):
        adadelta_update(x, x, x, x, **{"learning_rate": 1.0, name: value})
    optimizer = AdaDelta(1.0)
    before = getattr(optimizer, name)
    with pytest.raises(error, match=message):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) is before


BAD_RATES = [
    *(value for name, value, _ in HYPER_PARAMETERS if name == "learning_rate"),
    *(mx.ones((1,)), mx.ones((2, 1)), mx.array(1j)),
    *(np.array([0.5]), np.array(-1.0), np.array(True)),
]


@pytest.mark.parametrize("value", BAD_RATES, ids=repr)
def test_learning_rates(value: Any) -> None:
    for rate in (value, lambda step: value):
        with pytest.raises((TypeError, ValueError), match="learning_rate must be"):
            AdaDelta(rate)
    optimizer = AdaDelta(0.5)
    with pytest.raises((TypeError, ValueError), match="learning_rate must be"):
        optimizer.learning_rate = value
    assert optimizer.learning_rate.item() == 0.5
    x = mx.zeros((2,))
    with pytest.raises((TypeError, ValueError), match="learning_rate must be"):
        adadelta_update(x, x, x, x, value)


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        AdaDelta(1.0, 0.9, 1e-6, "cpu")
    x = mx.zeros((2,))
    with pytest.raises(TypeError, match="positional"):
        adadelta_update(x, x, x, x, 1.0, 0.9, 1e-6, "cpu")


@pytest.mark.parametrize(("backend", "device"), [("metal", mx.cpu), ("cpu", mx.gpu)])
def test_a_backend_on_the_wrong_device(backend: Backend, device: mx.DeviceType) -> None:
    x = mx.zeros((2,))
    with pytest.raises((ValueError, RuntimeError), match=f"'{backend}' cannot run"):
        adadelta_update(x, x, x, x, 1.0, backend=backend, stream=device)


def test_a_backend_that_is_not_here() -> None:
    for backend in {"metal", "cpu"} - set(backends()):
        with pytest.raises(RuntimeError, match=f"'{backend}' cannot run here: MLX has"):
            AdaDelta(1.0, backend=backend)


# ----------------------------------- Arrays -----------------------------------


@pytest.mark.parametrize("role", ["gradient", "v", "u"])
@pytest.mark.parametrize(
    ("wrong", "error", "got"),
    [
        (mx.zeros((3, 2)), ValueError, "(2, 3) but has (3, 2)"),
        (mx.zeros((2, 3, 1)), ValueError, "(2, 3) but has (2, 3, 1)"),
        (mx.zeros(()), ValueError, "(2, 3) but has ()"),
        (mx.zeros((2, 3), mx.int32), TypeError, "int32"),
        (mx.zeros((2, 3), mx.bool_), TypeError, "bool"),
        (mx.zeros((2, 3), mx.complex64), TypeError, "complex64"),
        (None, TypeError, "NoneType"),
        (np.zeros((2, 3)), TypeError, "ndarray"),
    ],
    ids=["turned", "3-D", "0-D", "int32", "bool", "complex64", "None", "NumPy"],
)
def test_companions_of_a_parameter(
    backend: Backend, role: str, wrong: Any, error: type[Exception], got: str
) -> None:
    good = mx.zeros((2, 3))
    tensors = {"gradient": [good, good], "v": [good, good], "u": [good, good]}
    tensors[role] = [good, wrong]
    with pytest.raises(error, match=contains(f"{role} of [1]", got)):
        adadelta_update([good, good], *tensors.values(), 1.0, backend=backend)


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint8, mx.bool_, mx.complex64])
def test_parameters_that_are_not_real(backend: Backend, dtype: mx.Dtype) -> None:
    w, x = mx.zeros((2,), dtype), mx.zeros((2,))
    name = str(dtype).rpartition(".")[-1]
    with pytest.raises(TypeError, match=contains("parameter must", "real", name)):
        adadelta_update(w, x, x, x, 1.0, backend=backend)
    with pytest.raises(TypeError, match=contains("parameter [1]", "real", name)):
        adadelta_update([x, w], *[[x, x]] * 3, 1.0, backend=backend)
    optimizer = AdaDelta(1.0, backend=backend)
    with pytest.raises(TypeError, match=contains("parameter a.b", "real", name)):
        optimizer.apply_gradients({"a": {"b": x}}, {"a": {"b": w}})
    with pytest.raises(TypeError, match=contains("parameter a.b", "real", name)):
        optimizer.init({"a": {"b": w}})
    assert optimizer.state.keys() == {"step", "learning_rate"}


def test_lists_of_different_lengths(backend: Backend) -> None:
    x = mx.zeros((2,))
    for i in range(4):
        lists = [[x, x] if i == j else [x, x, x] for j in range(4)]
        lengths = ", ".join(str(len(xs)) for xs in lists)
        with pytest.raises(ValueError, match=contains("equally long", lengths)):
            adadelta_update(*lists, 1.0, backend=backend)


def test_float64_has_no_kernel(native: Backend) -> None:
    """Lazy initialisation comes after everything that may be refused."""
    with mx.stream(mx.cpu):
        x = mx.zeros((2,), mx.float64)
    message = contains(native, "float64", "'mlx'")
    with pytest.raises(TypeError, match=message):
        adadelta_update(x, x, x, x, 1.0, backend=native)
    optimizer = AdaDelta(1.0, backend=native)
    with pytest.raises(TypeError, match=message):
        optimizer.apply_gradients({"w": mx.ones((2,))}, {"w": x})
    assert optimizer.state.keys() == {"step", "learning_rate"}


# ------------------------------------ Trees -----------------------------------

W = mx.zeros((2, 3))


def spoil(tree: Any, place: str, value: Any) -> None:
    """Sets one entry, or deletes it."""
    *keys, last = [int(k) if k.isdigit() else k for k in place.split(".")]
    for key in keys:
        tree = tree[key]
    if value is None:
        del tree[last]
    else:
        tree[last] = value


INT8, UINT32 = mx.ones((2, 3), mx.int8), mx.zeros((3,), mx.uint32)
BOTH = (TypeError, ValueError)
# What is spoiled of gradients, parameters and state, what the error says, in this
# order, and its type.
TREES = [
    ("g.layers.1.w", W.T, "gradient of layers.1.w .. (2, 3) .. (3, 2)", ValueError),
    ("g.layers.1.w", INT8, "gradient of layers.1.w .. int8", TypeError),
    ("g.layers.1.w", 3.0, "gradient of layers.1.w .. float", TypeError),
    ("g.layers.1.more", W, "gradient at layers.1.more .. no parameter", ValueError),
    ("g.more", W, "gradient at more .. no parameter", ValueError),
    ("g.layers.1.w", {"deep": W}, "layers.1.w.deep .. no parameter", ValueError),
    ("g.layers.1.w", [W[0], W[1]], "layers.1.w.0 .. no parameter", ValueError),
    ("g.layers", W, "layers .. list", BOTH),
    ("p.layers.1", None, "gradient at layers.1 .. no parameter", ValueError),
    ("p.layers.1.b", None, "gradient at layers.1.b .. no parameter", ValueError),
    ("p.layers.1.b", UINT32, "parameter layers.1.b .. uint32", TypeError),
    ("p.layers.1.b", {"deep": W}, "parameter layers.1.b .. dict", TypeError),
    ("s.layers.1.b.v", W[0, :2], "v of layers.1.b .. (3,) .. (2,)", ValueError),
    ("s.layers.1.b.u", W[:1], "u of layers.1.b .. (3,) .. (1, 3)", ValueError),
    ("s.layers.1.b.u", UINT32, "u of layers.1.b .. uint32", TypeError),
    ("s.layers.1.b.u", None, "state of layers.1.b .. 'v' and 'u' .. ['v']", ValueError),
    ("s.layers.1.b", W[0], "state of layers.1.b .. array", ValueError),
    ("s.layers.1.b.w", W[0], "state of layers.1.b .. ['u', 'v', 'w']", ValueError),
    ("s.layers", [], "layers.0 .. no state", ValueError),
    ("s.layers", None, "layers .. no state", ValueError),
]


@pytest.mark.parametrize(
    ("place", "value", "message", "error"),
    TREES,
    ids=[f"{place}-{i}" for i, (place, *_) in enumerate(TREES)],
)
def test_trees(
    backend: Backend, place: str, value: Any, message: str, error: Any
) -> None:
    optimizer = AdaDelta(lambda step: 1 / (1 + step), backend=backend)
    gradients = {"layers": [{"w": W + 1}, {"w": W + 1, "b": W[0] + 1}]}
    parameters = optimizer.apply_gradients(gradients, gradients)
    spoil({"g": gradients, "p": parameters, "s": optimizer.state}, place, value)
    message = contains(*message.split(" .. "))
    with (
        unchanged(parameters, optimizer.state),
        pytest.raises(error, match=message),
    ):
        optimizer.apply_gradients(gradients, parameters)
    assert optimizer.step.item() == 1
    assert optimizer.learning_rate.item() == 1.0


def test_a_refused_first_update_can_be_made_good(backend: Backend) -> None:
    optimizer, alone = (AdaDelta(1.0, backend=backend) for _ in range(2))
    one: Any = {"w": mx.ones((3,))}
    wrong: Any = "x"
    with pytest.raises(TypeError, match="gradient_scale"):
        optimizer.apply_gradients(one, one, gradient_scale=wrong)
    new, expected = (o.apply_gradients(one, one) for o in (optimizer, alone))
    assert_same_bits(new["w"], expected["w"])


def test_a_schedule_that_goes_wrong_changes_nothing(backend: Backend) -> None:
    rates = [1.0, 0.5, -1.0, 0.25]
    optimizer = AdaDelta(lambda step: rates[int(step.item()) + 1], backend=backend)
    w = {"w": mx.zeros((2,))}
    g = {"w": mx.ones((2,))}
    optimizer.state["learning_rate"] = mx.array(rates[0])
    w = optimizer.apply_gradients(g, w)
    message = contains("learning_rate", "-1.0")
    with unchanged(optimizer.state), pytest.raises(ValueError, match=message):
        optimizer.apply_gradients(g, w)


def test_apply_single(backend: Backend) -> None:
    optimizer = AdaDelta(1.0, backend=backend)
    w, state = mx.zeros((2,)), {"v": mx.zeros((2,)), "u": mx.zeros((3,))}
    for name, n, got in (("u", 2, "(3,)"), ("gradient", 1, "(1,)")):
        message = contains(f"{name} must", "(2,)", got)
        with unchanged(state), pytest.raises(ValueError, match=message):
            optimizer.apply_single(mx.ones((n,)), w, state)


# -------------------------------- First attempts ------------------------------


def refusal(call: Callable[[], Any]) -> str:
    """The message of what is refused, which a screen holds."""
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    message = str(raised.value)
    assert len(message) < 300
    return message


BIG = [nn.Linear(40, 40).parameters(), [1.0] * 1000, "x" * 1000, 10**1000]


@pytest.mark.parametrize("big", BIG, ids=["dict", "list", "str", "int"])
def test_messages_about_wrong_arguments_are_short(big: Any) -> None:
    x = mx.zeros((2,))
    for name in (*EXPECTED, "step", "gradient_scale", "skip"):
        arguments = {"learning_rate": 1.0, name: big}
        message = refusal(lambda a=arguments: adadelta_update(x, x, x, x, **a))
        assert re.search(f"{name} must be .* but is {type(big).__name__}", message)


@pytest.mark.parametrize(
    "given",
    [nn.Linear(40, 40), nn.Linear(40, 40).parameters(), [mx.zeros((40, 40))] * 9],
    ids=["model", "parameters", "list"],
)
def test_parameters_in_place_of_the_learning_rate(given: Any) -> None:
    message = refusal(lambda: AdaDelta(given))
    assert re.match("learning_rate must be .* or a schedule but is", message)
    assert "optimizer.init(model.trainable_parameters())" in message


def test_init_of_a_quantized_model_names_the_trainable_parameters() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    nn.quantize(model)
    optimizer = AdaDelta(1.0)
    message = refusal(lambda: optimizer.init(model.parameters()))
    assert "parameter layers.0.weight" in message
    assert "model.trainable_parameters()" in message
    assert optimizer.state.keys() == {"step", "learning_rate"}


# What may be the first to see a tree.
FIRST: dict[str, Callable[[AdaDelta, Any], Any]] = {
    "init": lambda optimizer, tree: optimizer.init(tree),
    "update": lambda optimizer, tree: optimizer.apply_gradients(tree, tree),
}


@pytest.mark.parametrize("name", ["step", "learning_rate"])
@pytest.mark.parametrize("first", FIRST)
def test_a_parameter_with_a_name_of_the_states(name: str, first: str) -> None:
    tree = {"a": W, name: W, "z": W}
    optimizer = AdaDelta(1.0)
    for _ in range(2):
        message = refusal(lambda: FIRST[first](optimizer, tree))
        assert f"parameter {name} must have another name" in message
        assert optimizer.state.keys() == {"step", "learning_rate"}
        assert optimizer.step.item() == 0
    optimizer.init({"deeper": tree})


@pytest.mark.parametrize(
    "tree", [[W, W], (W,), W, None], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("first", FIRST)
def test_a_tree_without_names_at_its_root(tree: Any, first: str) -> None:
    optimizer = AdaDelta(1.0)
    for _ in range(2):
        message = refusal(lambda: FIRST[first](optimizer, tree))
        assert re.match(
            f".* \\(root\\) must be a dict, .* but is {type(tree).__name__}", message
        )
        assert optimizer.state.keys() == {"step", "learning_rate"}
