"""Backend "metal" where no extension fits the MLX that runs.

The same kernels through mx.fast.metal_kernel, which every release has. Results are
new memory and row-contiguous.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import mlx.core as mx

from . import __path__, reference
from .options import Options, StreamOrDevice, Updated, check_tensors
from .options import Path as PathOf

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


# What the extension has beside an update.
norm, nonfinite = reference.norm, reference.nonfinite


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
    words = struct.unpack("5q", struct.pack("6f4I", *numbers))
    return mx.array(list(words), mx.int64)


def run_kernel(rest: list[mx.array], *inputs: mx.array) -> list[mx.array]:
    """The new w, v and u, which keep their types."""
    # MLX would ask the kernel itself for derivatives, in spite of with_derivatives.
    w, g, v, u, *scalars = (mx.stop_gradient(x) for x in inputs)
    state = v.dtype if v.dtype == u.dtype else mx.float32
    # What is row-contiguous is not copied.
    dense = [mx.contiguous(x) for x in (w, v.astype(state), u.astype(state))]
    threads, elements = constant("kThreads"), constant("kElementsPerThread")
    new = kernel(w.dtype, g.dtype, state)(
        inputs=[dense[0], g, *dense[1:], *scalars, *rest],
        output_shapes=[w.shape] * 3,
        output_dtypes=[w.dtype, state, state],
        grid=(-(-w.size // (threads * elements)) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
    )
    return [x.astype(old.dtype) for x, old in zip(new, (w, v, u), strict=True)]


def with_derivatives(run: Update, plain: Update) -> Update:
    """A function whose derivatives are those of plain operations."""
    update = mx.custom_function(run)

    @update.vjp
    def vjp(primals: Any, cotangents: Any, _: Any) -> Any:
        return mx.vjp(plain, primals, cotangents)[1]

    @update.jvp
    def jvp(primals: Any, tangents: Any) -> Any:
        pairs = zip(primals, tangents, strict=True)
        given = [mx.zeros_like(x) if t is None else t for x, t in pairs]
        return mx.jvp(plain, primals, given)[1]

    return cast(Update, update)


def has_float64(parameters: list[Any]) -> bool:
    return any(isinstance(w, mx.array) and w.dtype == mx.float64 for w in parameters)


def no_derivative(*_: mx.array) -> list[mx.array]:
    raise ValueError(
        "stochastic rounding has no derivative; differentiate the update without it"
    )


def adadelta_update(
    parameters: list[mx.array],
    gradients: list[mx.array],
    v: list[mx.array],
    u: list[mx.array],
    learning_rate: mx.array,
    options: Options,
    *,
    path: PathOf,
    decays: list[bool],
    step: mx.array | None,
    gradient_scale: mx.array | None,
    skip: mx.array | None,
    stream: StreamOrDevice,
) -> Updated:
    """The update of a list of parameters, with the signature of the extension."""
    lists = parameters, gradients, v, u
    check_tensors(path, lists, options)
    decay = options.weight_decay
    seed = options.seed & 0xFFFFFFFF, options.seed >> 32

    def plain(index: int, *x: mx.array) -> list[mx.array]:
        results = reference.adadelta_update(
            *([x[0]], [x[1]], [x[2]], [x[3]], x[4], options),
            path=path,
            decays=decays[index : index + 1],
            step=step,
            gradient_scale=x[5],
            skip=x[6],
            stream=None,
            first=index,
        )
        return [result[0] for result in results]

    new = []
    with nullcontext() if stream is None else mx.stream(stream):
        scale = mx.array(1.0) if gradient_scale is None else gradient_scale
        scalars = [learning_rate.astype(mx.float32), scale.astype(mx.float32)]
        scalars.append(mx.array(False) if skip is None else skip)
        kept = mx.array(0, mx.uint64) if step is None else step.astype(mx.uint64)
        for i, (w, g, *state) in enumerate(zip(*lists, strict=True)):
            inputs = [w, g if g.dtype in NAMES else g.astype(mx.float32)]
            inputs += [x.astype(options.state_dtype or x.dtype) for x in state]
            own = decay if not decays or decays[i] else 0.0
            numbers = params(
                *(options.rho, 1 - options.rho, options.eps),
                -1 if options.maximize else 1,
                *((0.0, own) if options.decoupled_weight_decay else (own, 0.0)),
                *((0, 0, 0, 0) if step is None else (1, *seed, i)),
            )
            update: Update = partial(plain, i)
            if w.size >= FEWEST:
                update = with_derivatives(
                    partial(run_kernel, [kept, numbers]),
                    update if step is None else no_derivative,
                )
            new.append(update(*inputs, *scalars))
    new_w, new_v, new_u = ([results[i] for results in new] for i in range(3))
    return new_w, new_v, new_u
