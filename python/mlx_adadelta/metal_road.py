"""Backend "metal" where no extension fits the MLX that runs.

The same kernels through mx.fast.metal_kernel, which every release has. Results are
new memory and row-contiguous.
"""

import hashlib
import re
import struct
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import mlx.core as mx

from . import __path__, reference

# MLX passes fewer elements as `constant`, which the kernels do not read.
FEWEST = 8
# The types as Metal calls them.
NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}
Update: TypeAlias = Callable[..., list[mx.array]]
# MLX writes the function's arguments: the arrays and what else the body names.
INPUTS = ["w", "g", "v", "u", "lr", "gradient_scale", "skip", "step", "params"]
BODY = """
  using namespace mlx_adadelta;
  threadgroup {g} staged
      [tile_side(sizeof({w}), sizeof({s})) * kTileStride / sizeof({g})];
  const Arguments<{w}, {g}, {s}> given = {{
      w, g, v, u, w_out, v_out, u_out,
      lr, gradient_scale, skip, step, (constant AdaDeltaParams*)params}};
  update_any(
      given, g_shape, g_strides, g_ndim, staged,
      threadgroup_position_in_grid.x, threadgroups_per_grid.x,
      thread_position_in_threadgroup.x);
"""


@cache
def folder() -> Path | None:
    """metal/: in an installation, or beside a checkout's python/."""
    places = [*map(Path, __path__), *Path(__file__).resolve().parents[2:3]]
    return next((x / "metal" for x in places if (x / "metal").exists()), None)


@cache
def source(name: str = "any_layout.h") -> str:
    """A file of metal/ with its headers in place of their #include."""
    text = (folder() or Path("metal")).joinpath(name).read_text()
    return re.sub(r'#include "(.+)"\n', lambda match: source(match[1]), text)


@cache
def constant(name: str) -> int:
    """A number that the source says."""
    return int(re.findall(rf"\b{name} = (\d+);", source())[0])


@cache
def kernel(w: mx.Dtype, g: mx.Dtype, state: mx.Dtype) -> Update:
    """One for each set of types: MLX looks up what it has compiled by the name."""
    names = NAMES[w], NAMES[g], NAMES[state]
    digest = hashlib.sha256(source().encode()).hexdigest()[:16]
    run = mx.fast.metal_kernel(
        name="_".join(("adadelta", *names, digest)),
        input_names=INPUTS,
        output_names=["w_out", "v_out", "u_out"],
        source=BODY.format(w=names[0], g=names[1], s=names[2]),
        header=source(),
        ensure_row_contiguous=False,  # of g
    )
    return cast(Update, run)


@lru_cache(maxsize=1024)
def params(*numbers: float) -> mx.array:
    """An AdaDeltaParams. In five elements, so that MLX passes it as `constant`."""
    words = struct.unpack("5q", struct.pack("<6fIQI", *numbers))
    return mx.array(list(words), mx.int64)


def run_kernel(*inputs: mx.array) -> list[mx.array]:
    """The new w, v and u, which keep their types, given what INPUTS names."""
    # MLX would ask the kernel itself for derivatives, in spite of with_derivatives.
    w, g, v, u, *rest = (mx.stop_gradient(x) for x in inputs)
    state = v.dtype if v.dtype == u.dtype else mx.float32
    # What is row-contiguous is not copied.
    dense = [mx.contiguous(x) for x in (w, v.astype(state), u.astype(state))]
    threads, elements = constant("kThreads"), constant("kElementsPerThread")
    new = kernel(w.dtype, g.dtype, state)(
        inputs=[dense[0], g, *dense[1:], *rest],
        output_shapes=[w.shape] * 3,
        output_dtypes=[w.dtype, state, state],
        grid=(-(-w.size // (threads * elements)) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
    )
    return [x.astype(old.dtype) for x, old in zip(new, (w, v, u), strict=True)]


@lru_cache(maxsize=64)
def with_derivatives(
    numbers: tuple[float, ...], decays: str | None, maximize: bool, stochastic: bool
) -> Update:
    """run_kernel; its derivatives are those of plain operations with these options."""
    update = mx.custom_function(run_kernel)

    def plain(*inputs: mx.array) -> list[mx.array]:
        if stochastic:
            raise ValueError(
                "stochastic rounding has no derivative; differentiate the update "
                "without it"
            )
        arrays = reference.arrays(numbers, mx.float32)
        scalars = inputs[4], inputs[5], inputs[6]
        return reference.update_one(inputs[:4], scalars, arrays, None, decays, maximize)

    @update.vjp
    def vjp(primals: Any, cotangents: Any, _: Any) -> Any:
        return mx.vjp(plain, primals, cotangents)[1]

    @update.jvp
    def jvp(primals: Any, tangents: Any) -> Any:
        pairs = zip(primals, tangents, strict=True)
        given = [mx.zeros_like(x) if t is None else t for x, t in pairs]
        return mx.jvp(plain, primals, given)[1]

    return cast(Update, update)


def run_one(
    tensors: tuple[mx.array, ...],
    scalars: tuple[mx.array, mx.array | None, mx.array | None],
    numbers: tuple[float, ...],
    seeds: tuple[int, mx.array, int] | None,
    decays: str | None,
    maximize: bool,
) -> list[mx.array] | None:
    """The new w, v and u of one parameter, unless it is too small for the kernel.

    Takes what reference.update_one does, but numbers that are no arrays, and the
    seed, the step and the parameter's index in place of random keys.
    """
    w, g, v, u = tensors
    if w.size < FEWEST:
        return None
    lr, scale, skip = scalars
    *others, decay = numbers
    seed, step, index = seeds or (0, mx.array(0, mx.uint64), 0)
    update = with_derivatives(numbers, decays, maximize, seeds is not None)
    return update(
        *(w, g if g.dtype in NAMES else g.astype(mx.float32), v, u),
        lr.astype(mx.float32),
        mx.array(1.0) if scale is None else scale.astype(mx.float32),
        mx.array(False) if skip is None else skip,
        step,
        params(
            *(*others, -1 if maximize else 1),
            decay if decays == "coupled" else 0.0,
            decay if decays == "decoupled" else 0.0,
            *(seeds is not None, seed, index),
        ),
    )


# What the extension has.
adadelta_update = partial(reference.adadelta_update, kernel=run_one)
norm, nonfinite = reference.norm, reference.nonfinite


def has_float64(parameters: list[Any]) -> bool:
    return any(isinstance(w, mx.array) and w.dtype == mx.float64 for w in parameters)
