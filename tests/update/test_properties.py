"""Properties of the update on whatever input: any shape, type, layout and value.

200 examples a test and backend, always the same ones; 5,000 new ones with
`scripts/test --long`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
from arrays import Tensors, bits, to_float64
from checks import assert_same_bits, assert_same_but_nans, is_exact, stock_step
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from reference import Float64, adadelta_step
from tables import DTYPES, FLOAT32, HALVES, LAYOUTS, TOLERANCE, Types, permuted

import mlx_adadelta
from mlx_adadelta import AdaDelta

# The fixture `backend` is set up once and holds nothing between examples.
each_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# The options that the rule itself knows; the rest is rounding and bookkeeping.
OF_THE_RULE = {"weight_decay", "decoupled_weight_decay", "maximize", "gradient_scale"}

SMALLEST = 2.0**-149  # float32's; each operation may be off by half of that
SPACING_OF_ZERO = {mx.float32: SMALLEST, mx.float16: 2.0**-24, mx.bfloat16: 2.0**-133}
LARGEST = {mx.float32: 2.0**127, mx.float16: 65504.0, mx.bfloat16: 2.0**127}

# --------------------------------- Strategies ---------------------------------

SMALL = (0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 67)
LARGE = (
    *((65537,), (131072,), (131101,), (257, 263), (3, 65536), (70001, 2)),
    *((1, 5003, 41), (3, 160, 151), (2, 3, 101, 131), (2, 3, 5, 47, 53)),
)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """0-d to 5-d, empty ones among them; one in twenty is large."""
    small = st.lists(st.sampled_from(SMALL), max_size=5).map(tuple)
    small = small.filter(lambda shape: np.prod(shape) <= 2**12)
    large = st.sampled_from(LARGE)
    return st.integers(0, 19).flatmap(lambda i: large if i == 19 else small)


ANY_TYPE = st.sampled_from((mx.float32, *HALVES))
TYPES = st.one_of(
    st.just(FLOAT32),
    st.sampled_from(DTYPES),
    st.builds(Types, ANY_TYPE, ANY_TYPE, ANY_TYPE, ANY_TYPE),
)

# Adding to its bits, as rounding does, carries into the sign.
LARGEST_NAN = np.uint64(2**63 - 1).view(np.float64)
SPECIAL = (
    LARGEST_NAN,
    *(0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 1.2e-38, 6e-8, 1e-20),
    *(65504.0, 65520.0, 1e19, -2e19, 3.4e38, -3.4e38, 1.0),
)


VALUES: dict[str, Callable[[np.random.Generator, int], Float64]] = {
    "ordinary": lambda rng, n: rng.normal(size=n),
    "of any magnitude": lambda rng, n: (
        rng.normal(size=n) * 10.0 ** rng.integers(-45, 38, n)
    ),
    "zero": lambda rng, n: np.zeros(n),
    "denormal": lambda rng, n: rng.normal(size=n) * 1e-39,
    "special": lambda rng, n: rng.choice(SPECIAL, n),
    "ordinary and special": lambda rng, n: np.where(
        rng.random(n) < 0.9, rng.normal(size=n), rng.choice(SPECIAL, n)
    ),
}
# By name, or as the order of the axes in memory, of which an array takes its own.
Layout = str | tuple[int, ...]
LAYOUT: st.SearchStrategy[Layout] = st.one_of(
    st.just("same"),
    st.sampled_from(sorted(LAYOUTS)),
    st.permutations(range(5)).map(tuple),
)
# Which operands are one array, by their places among w, g, v and u.
ALIASES = st.sampled_from(["wgvu", "wgvv", "wwvu", "wwvv", "wgwu", "wgvg", "wwww"]).map(
    lambda names: tuple(map("wgvu".index, names))
)


@dataclass(frozen=True)
class Spec:
    """What a parameter and its companions are made from."""

    shape: tuple[int, ...]
    types: Types = FLOAT32
    layouts: tuple[Layout, Layout, Layout, Layout] = ("same",) * 4
    values: tuple[str, str, str, str] = ("ordinary",) * 4
    aliases: tuple[int, ...] = (0, 1, 2, 3)
    seed: int = 0

    def make(self) -> Tensors:
        made: dict[int, mx.array] = {}
        for i in self.aliases:
            if i not in made:
                rng = np.random.default_rng([self.seed, i])
                make = VALUES[self.values[i]]
                x = make(rng, int(np.prod(self.shape))).reshape(self.shape)
                if i in self.aliases[2:]:  # averages are not negative
                    x = np.abs(x)
                with np.errstate(over="ignore"):
                    x = mx.array(x.astype(np.float32)).astype(self.types[i])
                made[i] = lay(x, self.layouts[i])
        tensors = Tensors(*(made[i] for i in self.aliases))
        mx.eval(tensors)
        return tensors


def lay(x: mx.array, layout: Layout) -> mx.array:
    if isinstance(layout, str):
        return LAYOUTS[layout](x)
    return permuted(x, tuple(axis for axis in layout if axis < x.ndim))


def specs(types: st.SearchStrategy[Types] = TYPES) -> st.SearchStrategy[Spec]:
    return st.builds(
        Spec,
        shape=shapes(),
        types=types,
        layouts=st.tuples(*[LAYOUT] * 4),
        values=st.tuples(*[st.sampled_from(sorted(VALUES))] * 4),
        aliases=ALIASES,
        seed=st.integers(0, 2**20),
    )


@dataclass(frozen=True)
class Rule:
    """The numbers of an update."""

    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    options: dict[str, Any] = field(default_factory=dict)


LRS = st.one_of(
    st.sampled_from([0.0, 1.0, 1e-30, 1e4, 1e20, 3e38]), st.floats(0.0009765625, 100)
)
RHOS = st.one_of(
    st.sampled_from([0.0, 1.0, 0.9, 0.999, 1e-8, 1 - 1e-12]), st.floats(0, 1, width=32)
)
EPSILONS = st.one_of(
    st.sampled_from([1e-38, 1e-30, 1e-6, 1.0, 1e3]),
    st.floats(-38, 3).map(lambda exponent: 10.0**exponent),
)
RULES = st.builds(Rule, LRS, RHOS, EPSILONS)

# ----------------------------------- Checks -----------------------------------


def check_float64(old: Tensors, new: tuple[mx.array, ...], rule: Rule) -> None:
    """Within the table's tolerance of float64, wherever float32 does not overflow."""
    w, g, v, u = map(to_float64, old)
    options = {k: x for k, x in rule.options.items() if k in OF_THE_RULE}
    with np.errstate(all="ignore"):
        right = adadelta_step(w, g, v, u, rule.lr, rule.rho, rule.eps, **options)
        _, new_v, new_u = right

        none = np.zeros_like(w)
        decay = options.get("weight_decay", 0.0)
        decoupled = options.get("decoupled_weight_decay", False)
        scaled = g * options.get("gradient_scale", 1.0)
        added = decay * w if decay and not decoupled else none
        taken = rule.lr * decay * w if decoupled else none
        total = (-scaled if options.get("maximize") else scaled) + added
        ratio = np.sqrt(u + rule.eps) / np.sqrt(new_v + rule.eps)
        d = ratio * total
        terms = (w, g, v, u, *right, scaled, added, taken, total, ratio, d)
        terms += (total * total, d * d, rule.lr * d, none + rule.lr * decay)

        infinite = np.isinf([w, g, v, u]).any(axis=0)
        fits = np.ones(w.shape, bool)
        for x in terms:
            fits &= ~np.isfinite(x) | (np.abs(x) <= LARGEST[mx.float32])
            # Zero in float32, and NaN times infinity.
            fits &= (x == 0) | (np.abs(x) >= SMALLEST) | ~infinite
        # Where the gradient all but cancels the decay, their errors remain.
        fits &= ~(np.abs(total) < 0.1 * (np.abs(scaled) + np.abs(added)))

        # Relative to the terms of each sum, and twice the table's tolerance: u
        # has twice the relative error of d, which it squares.
        rtol = 2 * TOLERANCE[mx.float32].rtol
        of_d = rtol * np.abs(d) + SMALLEST * (1 + np.abs(total) + ratio)
        bounds = (
            rtol * (np.abs(w) + np.abs(taken)) + rule.lr * of_d,
            rtol * new_v,
            (1 - rule.rho) * 2 * np.abs(d) * of_d + rtol * new_u,
        )
        for name, x, y, bound in zip("wvu", new, right, bounds, strict=True):
            got, largest = to_float64(x), LARGEST[x.dtype]
            rtol = 2 * TOLERANCE[x.dtype].rtol
            rounded = rtol * np.abs(y) + SPACING_OF_ZERO[x.dtype] + 4 * SMALLEST
            close = (got == y) | (np.abs(got - y) <= bound + rounded)
            close |= np.isnan(got) & np.isnan(y)
            # The largest finite number and infinity are neighbours.
            close |= np.isinf(got) & (np.abs(y) >= (1 - rtol) * largest)
            inside = ~np.isfinite(y) | (np.abs(y) <= largest)
            wrong = fits & inside & ~close
            assert not wrong.any(), (
                f"{name} of {[to_float64(x)[wrong][0] for x in old]}: "
                f"{got[wrong][0]} where {y[wrong][0]} is right"
            )


def check_stock(old: Tensors, new: tuple[mx.array, ...], rule: Rule) -> None:
    """Stock's own float32 results, rounded once where the type is narrower."""
    wide = Tensors(*(x.astype(mx.float32) for x in old))
    stock = stock_step(wide, rule.lr, rule.rho, rule.eps)
    for name, x, y in zip("wvu", new, stock, strict=True):
        assert_same_but_nans(x, y.astype(x.dtype), name)


# ----------------------------------- Tests ------------------------------------


@each_backend
@given(
    chosen=st.lists(specs(), min_size=1, max_size=6),
    tied=st.booleans(),
    held=st.booleans(),
    steps=st.integers(1, 2),
    rule=RULES,
)
def test_an_update_is_right(
    backend: str,
    chosen: list[Spec],
    tied: bool,
    held: bool,
    steps: int,
    rule: Rule,
) -> None:
    """Every output of every step; the arguments survive, kept by us or not."""
    tensors = [spec.make() for spec in chosen]
    if tied:
        tensors.append(tensors[0])
    event(f"tensors {len(tensors)}, held {held}")
    for _ in range(steps):
        old = [Tensors(*(mx.array(bits(x)).view(x.dtype) for x in t)) for t in tensors]
        lists = [list(x) for x in zip(*tensors, strict=True)]
        if not held:  # the last to see them is the update, which may take them
            del tensors
        new = mlx_adadelta.adadelta_update(
            *lists, rule.lr, rule.rho, rule.eps, backend=backend
        )
        gradients = list(lists[1])
        if not held:
            del lists
        mx.eval(new)
        if held:
            for t, before in zip(tensors, old, strict=True):
                for x, y in zip(t, before, strict=True):
                    assert_same_but_nans(x, y, "an argument")
        results = list(zip(*new, strict=True))
        for before, result in zip(old, results, strict=True):
            assert [x.dtype for x in result] == [before[i].dtype for i in (0, 2, 3)]
            assert all(x.shape == before.w.shape for x in result)
            check_float64(before, result, rule)
            if is_exact(backend):
                check_stock(before, result, rule)
        tensors = [
            Tensors(w, g, v, u) for (w, v, u), g in zip(results, gradients, strict=True)
        ]
        del new, results, before, result


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "maximize": draw(st.booleans()),
        "gradient_scale": draw(st.sampled_from([None, 0.0, 1.0, 0.37, 1e-8, 65536.0])),
        "skip": draw(st.sampled_from([None, None, False, True])),
        "weight_decay": draw(st.sampled_from([0.0, 0.0, 1e-10, 0.01, 1.0, 50.0])),
        "stochastic_rounding": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "step": draw(st.sampled_from([0, 1, 2**31, 2**32 - 1])),
    }
    if chosen["weight_decay"]:
        chosen["decoupled_weight_decay"] = draw(st.booleans())
        if draw(st.booleans()):
            spared = draw(st.integers(0, 3))
            chosen["decay_filter"] = lambda path, w: path != f"[{spared}]"
    return chosen


@each_backend
@given(
    chosen=st.lists(specs(), min_size=1, max_size=4),
    rule=st.builds(Rule, LRS, RHOS, EPSILONS, options()),
)
def test_options_are_the_same_everywhere(
    backend: str, chosen: list[Spec], rule: Rule
) -> None:
    if rule.options["stochastic_rounding"]:
        # Asks for one type of state. Bits depend on the place in memory, which for
        # backend "mlx" is the row-major index.
        chosen = [
            replace(
                s,
                types=s.types._replace(**{"wgvu"[s.aliases[3]]: s.types[s.aliases[2]]}),
                layouts=("same", *s.layouts[1:]),
            )
            for s in chosen
        ]
    tensors = [spec.make() for spec in chosen]
    lists = [list(x) for x in zip(*tensors, strict=True)]
    numbers = (rule.lr, rule.rho, rule.eps)

    def update(backend: str) -> list[tuple[mx.array, ...]]:
        new = mlx_adadelta.adadelta_update(
            *lists, *numbers, backend=backend, **rule.options
        )
        mx.eval(new)
        return list(zip(*new, strict=True))

    results = update(backend)
    reference = update("mlx")
    spares = rule.options.get("decay_filter", lambda path, w: True)
    for i, (old, result) in enumerate(zip(tensors, results, strict=True)):
        if is_exact(backend):
            for name, x, y in zip("wvu", result, reference[i], strict=True):
                assert_same_but_nans(x, y, name)
        if rule.options["skip"]:
            for x, y in zip(result, (old.w, old.v, old.u), strict=True):
                assert_same_bits(x, y)
            continue
        own = {k: x for k, x in rule.options.items() if x is not None}
        if not spares(f"[{i}]", old.w):
            own.update(weight_decay=0.0, decoupled_weight_decay=False)
        if not rule.options["stochastic_rounding"]:
            check_float64(old, result, Rule(*numbers, own))


def trees(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["weight", "bias", "layers", "a", "b"])
    below = st.recursive(
        leaf,
        lambda child: st.one_of(
            st.lists(child, max_size=3),
            st.lists(child, max_size=3).map(tuple),
            st.dictionaries(names, child, max_size=3),
        ),
        max_leaves=8,
    )
    return st.dictionaries(names, below, min_size=1, max_size=3)


def prune(tree: Any, keep: Callable[[], bool]) -> Any:
    """The tree without some of the entries of its dictionaries."""
    if isinstance(tree, dict):
        return {key: prune(child, keep) for key, child in tree.items() if keep()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(prune(child, keep) for child in tree)
    return tree


@each_backend
@given(
    tree=trees(specs(st.just(FLOAT32)).filter(lambda s: np.prod(s.shape) < 2**12)),
    tied=st.booleans(),
    rule=RULES,
    schedule=st.sampled_from(["number", "array", "callable", "float"]),
    compiled=st.booleans(),
    prepared=st.booleans(),
    frozen=st.randoms(use_true_random=False),
)
def test_trees_are_trained_as_by_stock(
    backend: str,
    tree: Any,
    tied: bool,
    rule: Rule,
    schedule: str,
    compiled: bool,
    prepared: bool,
    frozen: Any,
) -> None:
    """Parameters, state, step and learning rate over two steps, to the last bit."""
    made = tree_map(lambda spec: spec.make(), tree)
    if tied:
        leaves = [leaf for _, leaf in tree_flatten(tree)]
        if leaves:
            made["tied"] = leaves[0].make()
    parameters, grown = (
        tree_map(part, made, is_leaf=lambda x: isinstance(x, Tensors))
        for part in (lambda t: t.w, lambda t: t.g)
    )
    gradients = prune(grown, lambda: frozen.random() < 0.8)
    rate: Any = {
        "number": rule.lr,
        "array": mx.array(rule.lr),
        "callable": lambda step: mx.array(rule.lr) / (1 + step),
        "float": lambda step: rule.lr * 0.5 ** step.item(),
    }[schedule]
    stocks_rate = (lambda step: mx.array(rate(step))) if callable(rate) else rate

    def train(optimizer: Any, compiled: bool) -> Any:
        if prepared:
            optimizer.init(parameters)
        new = parameters

        def step(new: Any, gradients: Any) -> Any:
            return optimizer.apply_gradients(gradients, new)

        if compiled and prepared:
            step = mx.compile(step, inputs=[optimizer.state], outputs=[optimizer.state])
        for _ in range(2):
            new = step(new, gradients)
            mx.eval(new, optimizer.state)
        return {"parameters": new, "state": optimizer.state}

    # Plain operations are contracted when they are compiled.
    compiled = compiled and backend != "mlx" and not callable(rate)
    ours = train(AdaDelta(rate, rule.rho, rule.eps, backend=backend), compiled)
    stock = train(mlx.optimizers.AdaDelta(stocks_rate, rule.rho, rule.eps), False)
    ours, stock = tree_flatten(ours), tree_flatten(stock)
    assert [path for path, _ in ours] == [path for path, _ in stock]
    for (path, x), (_, y) in zip(ours, stock, strict=True):
        if is_exact(backend):
            assert_same_but_nans(x, y, path)
