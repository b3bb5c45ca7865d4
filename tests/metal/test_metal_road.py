"""The kernels through mx.fast.metal_kernel, which the host has a stand-in for.

Most is tested where the other backends are, as "host-metal-road". Here: bits, the text
that MLX would compile, and how the road is chosen. See host_metal/custom_kernel.py.
"""

import functools
import re
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import mlx.core as mx
import pytest
from arrays import Tensors, make_tensors
from checks import assert_same_bits
from host_metal import build, custom_kernel, dialect
from host_metal.language import complaints
from tables import LAYOUTS, Types

from mlx_adadelta import AdaDelta, adadelta_update, metal_road, reference
from mlx_adadelta import backend as chooser

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac runs the kernels on its GPU"
)

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Around a run, a threadgroup and the tiles' sides; a batch, and merged axes.
SHAPES = [(8,), (1025,), (33, 65), (4, 300), (300, 4), (3, 31, 33), (2, 65, 3, 20)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "maximize": True, "gradient_scale": 0.5},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "filtered": {"weight_decay": 0.1, "decay_filter": lambda path, w: path == "[1]"},
    "skipped": {"skip": mx.array(True), "stochastic_rounding": True},
    "not skipped": {"skip": mx.array(False), "learning_rate": mx.array(0.5)},
    "stochastic": {"stochastic_rounding": True, "seed": 2**63 + 9, "step": 2**33},
    "float32 state": {"state_dtype": mx.float32},
}


@pytest.fixture(autouse=True)
def road(monkeypatch: pytest.MonkeyPatch, on_the_cpu: None) -> None:
    monkeypatch.setattr("mlx.core.fast.metal_kernel", custom_kernel.metal_kernel)
    monkeypatch.setattr("mlx_adadelta.reference.compiles_exactly", lambda _: False)


Update = Callable[..., Any]


@pytest.fixture
def update(monkeypatch: pytest.MonkeyPatch) -> Update:
    """adadelta_update of lists of tensors, on the road or in plain operations."""

    def run(backend: str, tensors: list[Tensors], **options: Any) -> list[mx.array]:
        lists = [[getattr(t, x) for t in tensors] for x in "wgvu"]
        options = {"learning_rate": 0.75, **options, "backend": backend}
        with monkeypatch.context() as patch:
            name = "mlx_adadelta.backend.extension"
            patch.setattr(name, custom_kernel.EXTENSION)
            return [x for xs in adadelta_update(*lists, **options) for x in xs]

    return run


def check(update: Update, tensors: list[Tensors], **options: Any) -> None:
    expected = update("mlx", tensors, **options)
    for i, x in enumerate(update("cpu", tensors, **options)):
        assert_same_bits(x, expected[i], f"{'wvu'[i // len(tensors)]}, {options}")


# ---------------------------------- Results -----------------------------------


@pytest.mark.parametrize("g_layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_layouts(update: Update, shape: tuple[int, ...], g_layout: str) -> None:
    halves = Types(mx.bfloat16, mx.float32, mx.bfloat16, mx.bfloat16)
    for types in (Types(*[mx.float32] * 4), halves):
        for others in ("same", "transposed", "strided"):
            layouts = others, g_layout, "same", others
            check(update, [make_tensors(shape, types, layouts)])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("types", [*product(FLOATS, repeat=3)], ids=str)
def test_bits_of_types_and_options(
    update: Update, types: tuple[mx.Dtype, ...], name: str
) -> None:
    tensors = [
        make_tensors(shape, Types(*types, types[2]), ("same", layout, "same", "same"))
        for shape, layout in (((3,), "same"), ((33, 65), "transposed"), ((70,), "same"))
    ]
    options = OPTIONS[name]
    both = types[0] != types[2] != mx.float32 != types[0]
    if both and "state_dtype" not in options and types[0] != types[2]:
        options = {**options, "state_dtype": mx.float32}
    check(update, tensors, **options)


def test_states_of_two_types(update: Update) -> None:
    types = Types(mx.float16, mx.float16, mx.float32, mx.float16)
    check(update, [make_tensors((33, 65), types)])


def test_several_steps_in_one_compiled_function(update: Update) -> None:
    t = make_tensors((33, 65), layouts=("same", "transposed", "same", "same"))

    def steps(backend: str, *wgvu: mx.array) -> list[mx.array]:
        w, g, v, u = wgvu
        for _ in range(3):
            w, v, u = update(backend, [Tensors(w, g, v, u)])
        return [w, v, u]

    compiled = mx.compile(functools.partial(steps, "cpu"))
    for x, y in zip(compiled(*t), steps("mlx", *t), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("layout", ["same", "transposed", "strided"])
def test_memory_is_that_of_three_results(update: Update, layout: str) -> None:
    """No copy of w, v, u or g, which lie in memory as they did before."""
    t = make_tensors((512, 512), layouts=("same", layout, "same", "same"))
    mx.eval(update("cpu", [make_tensors((512, 512))]))  # compiled
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(update("cpu", [t]))
    assert mx.get_peak_memory() - before < 3.1 * t.w.nbytes


# ------------------------------- What is refused ------------------------------


def test_vmap_is_refused(update: Update) -> None:
    """MLX asks the kernel itself, whatever mx.custom_function is given."""
    t = make_tensors((3, 20))
    with pytest.raises(ValueError, match="Not implemented for CustomKernel"):
        mx.vmap(lambda *x: update("cpu", [Tensors(*x)]))(*t)


def test_compiling_for_any_shape_is_refused(update: Update) -> None:
    compiled = mx.compile(lambda *x: update("cpu", [Tensors(*x)]), shapeless=True)
    with pytest.raises(ValueError, match="CustomKernel cannot infer output shapes"):
        compiled(*make_tensors((3, 20)))


def test_stochastic_rounding_has_no_derivative(update: Update) -> None:
    t = make_tensors((20,), Types(*[mx.bfloat16] * 4))

    def loss(w: mx.array) -> mx.array:
        new = update("cpu", [t._replace(w=w)], stochastic_rounding=True)
        return sum(x.sum() for x in new)

    with pytest.raises(ValueError, match="stochastic rounding has no derivative"):
        mx.grad(loss)(t.w)


# -------------------------------- The text itself -----------------------------


def composed(types: Types) -> str:
    """What MLX would compile, but for its own preamble."""
    t = make_tensors((20, 20), types)
    scalars = mx.array(1.0), mx.array(1.0), mx.array(False), mx.array(0, mx.uint64)
    numbers = metal_road.params(*[0.0] * 6, *[0] * 3)
    texts: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custom_kernel, "texts", texts)
        metal_road.run_kernel(*t, *scalars, numbers)
    [text] = texts.values()
    return text


@pytest.mark.parametrize("types", [FLOATS, FLOATS[1:] + FLOATS[:1]], ids=str)
def test_text_is_legal_metal(types: tuple[mx.Dtype, ...]) -> None:
    text = "#include <metal_stdlib>\ntypedef half float16_t;\n"
    text += "typedef bfloat bfloat16_t;\n" + composed(Types(*types, types[2]))
    assert complaints(text) == []


def test_text_is_the_extensions() -> None:
    """Which test_metal_dispatch.py compares with what CMake embeds."""
    assert metal_road.source("update.h") in build.metal_source("adadelta.metal")
    assert metal_road.source("update.h") in composed(Types(*[mx.float32] * 4))


def test_names_do_not_meet_those_of_mlx() -> None:
    """MLX puts its utils.h, and a `using namespace metal`, before the text."""
    names = ("utils", "bf16", "bf16_math", "complex", "defines", "logging")
    theirs = "".join(dialect.kernels_of_mlx()[f"{name}.h"] for name in names)
    ours = metal_road.source()
    macros = set(re.findall(r"#\s*define (\w+)", theirs))
    assert len(macros) > 5
    assert macros & set(re.findall(r"\w+", ours)) == set()
    # What the body takes out of our namespace.
    used = set(re.findall(r"\w+", metal_road.BODY))
    kinds = r"\b(struct|inline void|(constexpr|ADADELTA_CONSTANT) uint32_t)"
    declared = {x for x in used if re.search(rf"{kinds} {x}\b", ours)}
    assert {"Arguments", "AdaDeltaParams", "update_any", "kTileStride"} <= declared
    assert declared & set(re.findall(r"\w+", theirs)) == set()


# --------------------------------- Being chosen -------------------------------


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac on which no extension fits."""
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    monkeypatch.setattr("mlx_adadelta.backend.extension", None)
    monkeypatch.setattr("mlx_adadelta.backend.why_not", "it was built for another")


@pytest.mark.usefixtures("metal")
def test_road_is_taken_where_no_extension_fits() -> None:
    assert chooser.backends() == ("metal", "mlx")
    assert chooser.resolve_backend("auto", mx.gpu) == "metal"
    assert chooser.resolve_backend("auto", mx.cpu) == "mlx"
    for name, stream in (("metal", None), ("auto", mx.gpu)):
        run, where = chooser.choose(name, stream, [])
        assert run is metal_road
        assert where == mx.gpu
    with pytest.raises(RuntimeError, match="'cpu' cannot run here: it was built for"):
        AdaDelta(1.0, backend="cpu")


@pytest.mark.usefixtures("metal")
def test_float64_goes_to_plain_operations() -> None:
    x = [mx.array([1.0], mx.float64)]
    assert chooser.choose("auto", mx.gpu, x)[0] is reference
    with pytest.raises(TypeError, match="backend 'metal' has no float64"):
        chooser.choose("metal", None, x)


def test_small_tensors_take_plain_operations(
    update: Update, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    make = metal_road.with_derivatives

    def noted(*choices: Any) -> Update:
        def run(*inputs: mx.array) -> Any:
            sizes.append(inputs[0].size)
            return make(*choices)(*inputs)

        return run

    monkeypatch.setattr(metal_road, "with_derivatives", noted)
    shapes = [(), (0,), (7,), (8,), (2, 3), (3, 3)]
    check(update, [make_tensors(shape) for shape in shapes])
    assert sizes == [8, 9]
