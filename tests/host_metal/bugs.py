"""The bugs that mutants.py seeds, and where docs/metal.md has their record."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = "docs/metal.md"
# What it says, and of which sources.
RECORD = re.compile(r"<!-- mutants of (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)


class Bug(NamedTuple):
    """A piece of a file, which must be there once, and its replacement.

    Spaces and line breaks of the piece need not be the file's.
    """

    old: str
    new: str

    def seed(self, text: str) -> str:
        words = re.findall(r"\w+|[^\w\s]", self.old)
        pattern = r"\s*".join(
            rf"\b{x}\b" if x[0].isalnum() else re.escape(x) for x in words
        )
        changed, count = re.subn(pattern, lambda _: self.new, text)
        if count != 1:
            raise ValueError(f"the file holds this {count} times: {self.old}")
        return changed


BUGS = {
    "metal/update.h": {
        "linear: all elements wherever one is": Bug(
            "x.whole = begin + N <= n;", "x.whole = begin < n;"
        ),
        "linear: tail left out": Bug(
            "!x.whole && at < n ? static_cast<uint>(n - at) : 0", "0"
        ),
        "linear: threads overlap": Bug(
            "lanes * N + lane * N", "lanes * N + lane * N - (lane > 0)"
        ),
        "linear: groups counted in 32 bits": Bug(
            "static_cast<uint64_t>(group) * lanes * N", "group * lanes * N"
        ),
        "linear: the tail's elements turned": Bug(
            "run[i % kRun] = from[i / kRun][i % kRun];",
            "run[i % kRun] = from[i / kRun][runs.left[i / kRun] - 1 - i % kRun];",
        ),
        "tile: no barrier": Bug(
            "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);", ""
        ),
        "tile: barrier without memory": Bug(
            "mem_flags::mem_threadgroup", "mem_flags::mem_none"
        ),
        "tile: early return": Bug(
            "x.whole = rows_left >= rows",
            "if (lane >= rows_left) return; x.whole = rows_left >= rows",
        ),
        "tile: read without turning": Bug(
            "staged[c * stride + x.runs.line[i / kRun]]",
            "staged[x.runs.line[i / kRun] * stride + c]",
        ),
        "tile: no bound check on lines": Bug("runs.line[r] < lines &&", "lines > 0 &&"),
        "tile: no bound check in a line": Bug("&& runs.start < elements", ""),
        "tile: whole by its rows alone": Bug("&& columns_left >= columns", ""),
        "tile: batch ignored": Bug("group.z * tile.batch_stride +", ""),
        "tile: gaps ignored": Bug(
            "tile.column_stride, columns_left", "tile.rows, columns_left"
        ),
        "tile: column stride of 31 bits in a tile": Bug(
            "tile.column_stride, columns_left",
            "static_cast<int32_t>(tile.column_stride), columns_left",
        ),
        "tile: column stride of 31 bits between tiles": Bug(
            "column * tile.column_stride",
            "column * static_cast<int32_t>(tile.column_stride)",
        ),
        "tile: rows counted in 32 bits": Bug(
            "group.z * uint64_t{tile.rows} + row", "group.z * tile.rows + row"
        ),
        "tile: lines counted in 32 bits": Bug(
            "line * stride + runs.start",
            "static_cast<uint>(line * stride) + runs.start",
        ),
        "tile: wider than its memory": Bug(
            "stride = kTileStride / sizeof(G)",
            "stride = kTileStride / sizeof(G) + 1",
        ),
        "tile: some of a thread's elements": Bug(
            "R = rows * columns / (kTileThreads * kRun)",
            "R = rows * columns / (kTileThreads * kRun) / 2 + 1",
        ),
        "half on the way": Bug(
            "static_cast<float>(x.u[r][k]),",
            "static_cast<float>(static_cast<half>(static_cast<float>(x.u[r][k]))),",
        ),
        "writes the old u": Bug("x.u[r][k] = static_cast<S>(next.u);", "(void)next.u;"),
        "skip ignored": Bug("else if (!given.skip)", "else"),
        "a store before the last load": Bug(
            "read<true>(given.u, x.runs, x.u);",
            "write<true>(x.w, x.runs, given.w_out); read<true>(given.u, x.runs, x.u);",
        ),
        "elements one by one": Bug(
            "write<true>(x.u, x.runs, given.u_out);",
            "for (uint i = 0; i < R * kRun; ++i) "
            "given.u_out[x.runs.begin[i / kRun] + i % kRun] = x.u[i / kRun][i % kRun];",
        ),
        "a branch on a scalar for each element": Bug(
            "const uint k = i % kRun;",
            "const uint k = i % kRun; if (given.lr == 0.0f) continue;",
        ),
        "64 bits an element": Bug(
            "hash_place(add_high(keys.place, high), low, low < begin)",
            "hash_place(keys.place, low, "
            "0 * high + static_cast<uint>((x.runs.begin[r] + k) >> 32))",
        ),
        "threadgroup memory as the device's": Bug(
            "threadgroup G* staged, uint3", "device G* staged, uint3"
        ),
        "bits: upper half of the index dropped": Bug(
            "add_high(keys.place, high)", "add_high(keys.place, 0 * high)"
        ),
        "bits: no carry into the upper half": Bug("low, low < begin", "low, 0"),
        "bits: one for all of a run": Bug("low = begin + k", "low = begin"),
        "bits: v's for u": Bug("keys.u + hash * kFactorU", "keys.v + hash * kFactorV"),
    },
    "metal/adadelta_step.h": {
        "v and u swapped": Bug(
            "{w - lr * d, new_v, new_u}", "{w - lr * d, new_u, new_v}"
        ),
        "old v under the root": Bug("(new_v + p.eps)", "(v + p.eps)"),
        "scale ignored": Bug(
            "p.sign * gradient_scale * g", "p.sign * g + 0 * gradient_scale"
        ),
        "bits: the step ignored": Bug("static_cast<uint32_t>(step),", "0,"),
    },
    "metal/adadelta.metal": {
        "two buffers with one index": Bug(
            "constant uint64_t& n [[buffer(12)]]",
            "constant uint64_t& n [[buffer(11)]]",
        ),
    },
    "metal/norm.metal": {
        "norm: all elements wherever one is": Bug(
            "begin + lanes * kNormElements <= n", "begin < n"
        ),
        "norm: the last element left out": Bug(
            "i < static_cast<uint>(n - begin)", "i + 1 < static_cast<uint>(n - begin)"
        ),
        "norm: threads overlap": Bug("(i * lanes + lane) * kRun", "i + lane"),
        "norm: groups counted in 32 bits": Bug(
            "static_cast<uint64_t>(group) * lanes * kNormElements",
            "group * lanes * kNormElements",
        ),
        "norm: no barrier after the sums": Bug(
            "= sum.low; metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);",
            "= sum.low;",
        ),
        "norm: no barrier between the pairs": Bug(
            "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup); n = kept;",
            "n = kept;",
        ),
        "norm: the odd sum of a round dropped": Bug(
            "kept = (n + 1) / 2", "kept = n / 2"
        ),
        "norm: every gradient's sums in one place": Bug(
            "sums[2 * (first + group) + 1]", "sums[2 * group + 1]"
        ),
        "norm: the two sums swapped": Bug(
            "sum.high = shared[0]; sum.low = shared[lanes];",
            "sum.high = shared[lanes]; sum.low = shared[0];",
        ),
        "norm: what is rounded off forgotten": Bug(
            "sum.low + lost.low", "sum.low + 0.0f * lost.low"
        ),
        "norm: one scale": Bug("ADADELTA_SQRT(sum.high) / kHigh", "sum.low"),
        "norm: infinities lost": Bug("sum.high <= kLargest ? 0.0f", "true ? 0.0f"),
    },
    "metal/rounding.h": {
        "bits: a round of Philox less": Bug("round < 10", "round < 9"),
        "bits: a weaker hash": Bug("hash ^ hash >> 15", "hash"),
        "rounding to bfloat16: always down": Bug(
            "(bits_of(x) + (random >> 16)) >> 16",
            "(bits_of(x) + 0 * random) >> 16",
        ),
        "rounding to float16: subnormal numbers down": Bug(
            "whole + up", "whole + 0 * up"
        ),
        "rounding to float16: no infinity": Bug(
            "rounded < 0x7C00u ?", "rounded < 0xFFFFu ?"
        ),
    },
    "csrc/eval_metal.cpp": {
        "inputs swapped": Bug("&x.v, &x.u}", "&x.u, &x.v}"),
        "outputs swapped": Bug(
            "encoder.set_output_array(outputs[j], index++)",
            "encoder.set_output_array(outputs[6 * i + 2 - j], index++)",
        ),
        "output bound as input": Bug(
            "encoder.set_output_array(outputs[j], index++)",
            "encoder.set_input_array(outputs[j], index++)",
        ),
        "buffer not bound": Bug(
            "encoder.set_input_array(scalar(inputs, j), index++);",
            "",
        ),
        "uint where 64 bits are read": Bug(
            "static_cast<uint64_t>(dispatch.size), 12",
            "static_cast<uint32_t>(dispatch.size), 12",
        ),
        "another struct": Bug(
            "encoder.set_bytes(x.tile, 12);",
            "encoder.set_bytes(params_[i], 12);",
        ),
        "wrong entry name": Bug('"adadelta_tiled_"', '"adadelta_tile_"'),
        "other types": Bug("types_name(types)", "types_name(0)"),
        "grid one short": Bug(
            "blocks(n, threads * elements)", "n / (threads * elements)"
        ),
        "grid of the tile turned": Bug(
            "blocks(tile.columns, columns), blocks(tile.rows, rows),",
            "blocks(tile.rows, rows), blocks(tile.columns, columns),",
        ),
        "tile of another type": Bug(
            "beside_g = x.g.source.itemsize()", "beside_g = x.w.source.itemsize()"
        ),
        "threadgroup too large": Bug(
            "std::min<size_t>(kThreads, kernel->maxTotalThreadsPerThreadgroup())",
            "kThreads",
        ),
        "threadgroup memory too small": Bug(
            "columns * kTileStride", "columns * kTileBytes"
        ),
        "copies not kept": Bug(
            "keep_temporary(device, stream(), std::move(copy));", "(void)copy;"
        ),
        "norm: sums of all gradients in one place": Bug(
            "first += dispatch.grid.width", "first += 0 * dispatch.grid.width"
        ),
        "norm: sums too short": Bug(
            "groups += dispatch.grid.width", "groups = dispatch.grid.width"
        ),
        "norm: sums not kept": Bug("keep(sums);", ""),
        "norm: a barrier between gradients": Bug(
            "auto context = encoder.start_concurrent();", ""
        ),
        "norm: an odd layout read as it lies": Bug(
            "make_dense(x, stream(), keep)", "x"
        ),
    },
    "csrc/metal_source.cpp.in": {
        "library without a hash": Bug(
            "mlx_adadelta_@MLX_ADADELTA_METAL_HASH@",
            "mlx_adadelta",
        ),
    },
    "CMakeLists.txt": {
        "header not embedded": Bug('"${header_source}"', '""'),
    },
    "csrc/layout.cpp": {
        "memory too small": Bug("malloc(x.nbytes())", "malloc(x.nbytes() / 2)"),
    },
    "metal/any_layout.h": {
        "road: axes merged that lie apart": Bug(
            "axes.columns.stride == next.length * next.stride",
            "axes.columns.stride >= next.length * next.stride",
        ),
        "road: four axes taken for three": Bug(
            "axes.more || axes.batch.length > 1", "axes.more"
        ),
        "road: any stride is linear": Bug("&& axes.columns.stride == 1;", ";"),
        "road: any rows are transposed": Bug(
            "axes.rows.length > 1 && axes.rows.stride == 1", "true"
        ),
        "road: a tile for each threadgroup": Bug("i += groups", "i += tiles"),
        "road: no barrier between tiles": Bug(
            "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);", ""
        ),
        "road: tiles of the batch left out": Bug(
            "down * across * axes.batch.length", "down * across"
        ),
        "road: writes behind the end": Bug("begin + r < n ? 1 : 0", "1"),
        "road: a run of the gradient for each element": Bug(
            "place_of(begin + r, shape", "r + place_of(begin, shape"
        ),
    },
    "python/mlx_adadelta/metal_road.py": {
        "road: the gradient is copied": Bug(
            "inputs=[dense[0], g,", "inputs=[dense[0], mx.contiguous(g),"
        ),
        "road: w, v and u as they lie": Bug(
            "[mx.contiguous(x) for x in (w,", "[x for x in (w,"
        ),
        "road: v and u swapped": Bug('"v", "u", "lr"', '"u", "v", "lr"'),
        "road: one threadgroup short": Bug("-(-w.size //", "(w.size //"),
        "road: a kernel for too few elements": Bug("FEWEST = 8", "FEWEST = 7"),
        "road: one name for all types": Bug(
            '("adadelta", *names, digest)', '("adadelta", digest)'
        ),
        "road: the kernel asked for its derivative": Bug(
            "(mx.stop_gradient(x) for x in inputs)", "inputs"
        ),
        "road: decay everywhere": Bug('decay if decays == "coupled"', "decay if 1"),
        "road: one tensor's random bits": Bug("seed, index),", "seed, 0),"),
    },
}

FILES = {name: file for file, bugs in BUGS.items() for name in bugs}


def digest() -> str:
    """Of the Metal code and of the bugs, comments and spaces aside."""
    text = repr(BUGS)
    for file in [*sorted((ROOT / "metal").iterdir()), ROOT / "csrc/eval_metal.cpp"]:
        text += re.sub(r"//.*|\s+", "", file.read_text())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
