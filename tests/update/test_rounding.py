"""16-bit parameters and state: types, rounding to nearest and stochastically."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from arrays import Tensors, bits, make_tensors, strides, to_float64
from checks import assert_same_bits, is_exact, stock_step
from tables import DENSE, HALVES, LAYOUTS, Types

import mlx_adadelta
from mlx_adadelta import AdaDelta, reference

# Random bits of four elements: w, v and u.
KNOWN = [
    "81aadea8 a510baba 3e113c18 25f134be",
    "14f753a9 761e8b7f 5072aef9 eebef6cb",
    "d7f15c98 623fade2 f3959848 aba5f2d6",
]
# The largest correlation at lags 1 to 65536.
NEIGHBOURS = 0.03


def update(t: Any, backend: str, **options: Any) -> tuple[mx.array, ...]:
    return mlx_adadelta.adadelta_update(
        *t, 0.7, stochastic_rounding=True, backend=backend, **options
    )


def random_bits(shape: tuple[int, ...], tensor: int, seed: int, step: Any) -> Any:
    """Those that backend "mlx" draws."""
    index, now = mx.array(tensor, mx.uint32), mx.array(step, mx.uint64)
    keys = reference.random_keys(index, seed, now)
    return reference.random_bits(keys, reference.places(shape))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_gives_the_known_answers(word, expected):
    """Those of Random123, the authors' own implementation."""
    words = reference.philox([mx.array([word], mx.uint32)] * 4, (word, word))
    assert " ".join(f"{x.item():08x}" for x in words) == expected


def test_random_bits_give_the_known_answers():
    """Pinned: a resumed run must draw what the uninterrupted one draws."""
    words = random_bits((2, 2), 5, 2**40 + 3, 2**33 + 11)
    drawn = [" ".join(f"{x:08x}" for x in word.flatten().tolist()) for word in words]
    assert drawn == KNOWN


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("state", ["half", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_backend_draws_the_same_bits(backend, layout, state, half, request):
    """As far as contraction is off, which it is on the CPU and the host. The
    extension alone goes by a parameter's order in memory where it is not the
    rows'; plain operations are given the parameter in that order."""
    if backend == "metal":
        pytest.skip("a GPU contracts a*b+c: its float32 results differ first")
    dtype = half if state == "half" else mx.float32
    types = Types(half, half, dtype, dtype)
    t = make_tensors((3, 20, 33), types, (layout, "same", "transposed", layout))
    options = {"seed": 2**40 + 3, "step": 2**32 + 11}
    order = range(3)
    named = request.node.callspec.params["backend"]
    if layout in DENSE and not named.endswith(("metal-road", "mlx")):
        order = sorted(order, key=lambda axis: -strides(t.w)[axis])
    back = sorted(range(3), key=lambda axis: order[axis])
    in_order = [x.transpose(order) for x in t]
    for got, expected in zip(
        update(t, backend, **options), update(in_order, "mlx", **options), strict=True
    ):
        assert_same_bits(got, expected.transpose(back))


def test_bits_depend_on_seed_step_tensor_and_element_alone(native):
    t = [make_tensors((50,), Types(*[mx.bfloat16] * 4)) for _ in range(9)]
    lists = [list(x) for x in zip(*t, strict=True)]
    many = update(lists, native)[0]
    assert_same_bits(many[0], update(t[0], native)[0])  # however they are grouped
    drawn = {bits(w).tobytes() for w in many}
    drawn |= {bits(update(t[0], native, step=s)[0]).tobytes() for s in (1, 2)}
    drawn |= {bits(update(t[0], native, seed=s)[0]).tobytes() for s in (1, 2**32)}
    assert len(drawn) == 9 + 2 + 2


def uniform(shape: tuple[int, ...], tensor: int, seed: int, step: Any) -> Any:
    """The random bits as float64 of mean 0 and variance 1."""
    words = random_bits(shape, tensor, seed, step)
    return [(np.array(x) + 0.5) * (12**0.5 / 2**32) - 3**0.5 for x in words]


def test_each_element_is_uniform_and_independent_over_the_steps():
    """A mean of n draws, or of n products of two, of variance 1 has a standard
    deviation of 1 / sqrt(n); 6 of them is the bound, for 15,000 of them one
    false alarm in 34,000."""
    steps = np.arange(1000)[:, None]
    drawn = np.stack(uniform((1000,), 0, 7, steps))
    for means in (
        drawn.mean(axis=1),
        (drawn**2 - 1).mean(axis=1) / 0.8**0.5,  # the variance of a square is 4/5
        (drawn[[0, 0, 1]] * drawn[[1, 2, 2]]).mean(axis=1),
        (drawn[:, 1:] * drawn[:, :-1]).mean(axis=1) * (999 / 1000) ** 0.5,
    ):
        assert np.abs(means).max() < 6 / 1000**0.5


def test_tensors_seeds_steps_w_v_and_u_are_independent():
    """Bounds as above, over a tensor's 2**20 elements; the squares in 8**3
    cells add up to 511 +- 32 (chi-square), so 6 of them here, too."""
    n = 2**20
    drawn = [
        words
        for tensor, seed, step in (
            *((0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 1, 0), (0, 2**32, 0)),
            *((0, 0, 1), (0, 0, 2), (0, 0, 2**32), (1, 1, 1)),
        )
        for words in uniform((n,), tensor, seed, step)
    ]
    products = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(np.mean(drawn, axis=1)).max() < 6 / n**0.5
    assert np.abs(products).max() < 6 / n**0.5
    for first in range(0, len(drawn), 3):
        cells, _ = np.histogramdd(drawn[first : first + 3], 8)
        assert abs(((cells - n / 512) ** 2).sum() / (n / 512) - 511) < 6 * 1022**0.5


def test_neighbours_hardly_correlate():
    """Independent draws would stay below 6 / sqrt(n) = 0.006 at every lag. The
    hash's one multiplication leaves 0.022 at the worst of 24 seeds, and at half
    of them no more than 0.0065."""
    n = 2**20
    for x in uniform((n,), 0, 0, 0):
        spectrum = np.abs(np.fft.rfft(x, 2 * n)) ** 2
        correlation = np.fft.irfft(spectrum)[1 : 2**16 + 1] / n
        assert np.abs(correlation).max() < NEIGHBOURS


@pytest.mark.parametrize(
    ("half", "value"),
    [
        *((half, x) for half in HALVES for x in (1.001, -0.3, 1.9999, -3.9999)),
        # Subnormal and its edge, then the edge of overflow.
        *((mx.float16, x) for x in (6.1e-5, -2.3e-7, 1e-8, -1e-10)),
        *((mx.float16, x) for x in (65500.0, -65519.0, 65520.0)),
        *((mx.bfloat16, x) for x in (1e-30, -3.38e38, 3.395e38)),
    ],
)
def test_unbiased(native, half, value):
    """Of n draws that go up with probability p, n p do so with a standard
    deviation of sqrt(n p (1 - p)); 6 of them is the bound."""
    n = 10**6
    # v' = 1 and u = 1, so that d = g = -1 or 1 and w' = -lr g is exact.
    t = (
        mx.zeros((n,), half),
        mx.full((n,), -math.copysign(1, value)),
        mx.ones(n),
        mx.ones(n),
    )
    new = mlx_adadelta.adadelta_update(
        *t, abs(value), rho=1.0, stochastic_rounding=True, backend=native
    )
    lower, upper = np.unique(bits(new[0])).tolist()  # of the magnitude
    assert upper - lower == 1
    below, above = to_float64(mx.array([lower, upper], mx.uint16).view(half))
    if math.isinf(above):  # stands for the power of two where numbers end
        above = math.copysign(2.0 ** math.ceil(math.log2(abs(below))), below)
    p = (float(np.float32(value)) - below) / (above - below)
    ups = np.mean(bits(new[0]) == upper)
    assert abs(ups - p) <= 6 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("half", HALVES)
def test_special_values_stay_themselves(backend, half):
    w = mx.array([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0], half)
    zero = mx.zeros(6)
    new = update((w, zero, zero, zero), backend)[0]
    assert_same_bits(new[mx.array([0, 1, 3, 4, 5])], w[mx.array([0, 1, 3, 4, 5])])
    assert math.isnan(new[2].item())


def test_v_and_u_of_two_types_are_refused_or_converted(backend):
    t = make_tensors((5,), Types(mx.float32, mx.float32, mx.float16, mx.float32))
    message = r"v and u must be of one type .*float16 and .*float32"
    with pytest.raises(TypeError, match=message):
        update(t, backend)
    for x in update(t, backend, state_dtype=mx.float32):
        assert x.dtype == mx.float32


def test_state_dtype_must_fit_the_parameter(backend):
    optimizer = AdaDelta(1.0, state_dtype=mx.bfloat16, backend=backend)
    w = mx.ones(2, mx.float16)
    with pytest.raises(ValueError, match=r"a\.w .*float16"):
        optimizer.init({"a": {"w": w}})
    for dtype in (mx.bfloat16, mx.float32):
        optimizer.init({"a": {"w": mx.ones(2, dtype)}})
    message = (
        r"state_dtype must be float32 or .* parameter \(.*float16\) but is .*bfloat"
    )
    with pytest.raises(ValueError, match=message):
        mlx_adadelta.adadelta_update(
            *(w, w, w, w, 1.0), state_dtype=mx.bfloat16, backend=backend
        )


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("layout", ["same", "transposed"])
def test_sixteen_bit_state_beside_float32(backend, layout, stochastic, half):
    """The state as float32 would be, rounded once; the parameter keeps its bits."""
    wide = make_tensors((33, 65), layouts=("same", layout, "same", "same"))
    t = wide._replace(v=wide.v.astype(half), u=wide.u.astype(half))
    options: Any = {"stochastic_rounding": stochastic, "backend": backend}
    exact = stock_step(Tensors(*(x.astype(mx.float32) for x in t)), 0.7)
    # Whether the state comes in that type or is converted at its first use.
    for given in (t, wide):
        new = mlx_adadelta.adadelta_update(*given, 0.7, state_dtype=half, **options)
        assert [x.dtype for x in new] == [mx.float32, half, half]
        if is_exact(backend):
            assert_same_bits(new[0], exact[0])
        for got, expected in zip(new[1:], exact[1:], strict=True):
            if not stochastic and is_exact(backend):
                assert_same_bits(got, expected.astype(half))
            step = 2.0 ** (-7 if half == mx.bfloat16 else -10)  # between neighbours
            difference = np.abs(to_float64(got) - to_float64(expected))
            assert np.all(difference <= step * to_float64(expected) + 2**-24)
