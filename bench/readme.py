"""Puts a benchmark's figures into README.md, and draws docs/ratios.png of them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from .report import draw_bars, spread_text, time_text

ROOT = Path(__file__).parents[1]
CASES = {
    "large": "2 matrices 4096x4096",
    "transformer": "GPT-2's 148 tensors, transposed gradients",
    "lora": "300 LoRA tensors 16x1024",
    "small": "500 tensors of 64",
}
OTHERS = {
    "stock": ("stock",),
    "stock in `mx.compile`": ("stock-compiled",),
    "PyTorch's faster": ("torch-foreach", "torch-loop"),
    "optax, `jax.jit`": ("optax",),
}
MARKS = "<!-- figures -->\n", "<!-- end of figures -->\n"


def table(cases: dict[str, dict[str, Any]]) -> str:
    rows = [["", "this one", "of the limit", *OTHERS]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for name, title in CASES.items():
        results = cases[name]["results"]
        ours = results["ours"]
        row = [title, spread_text(ours["seconds"], time_text)]
        share = ours["of_limit"]["median"]
        row.append(f"{share:.2f}" if share > 0.01 else "")  # memory is no limit there
        for names in OTHERS.values():
            measured = [results[x]["vs_ours"]["median"] for x in names if x in results]
            row.append(f"{min(measured):.1f}x" if measured else "not measured")
        rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def fill(text: str, figures: str) -> str:
    """Puts the figures between the marks."""
    start, end = map(re.escape, MARKS)
    pattern = f"({start}).*({end})"
    new, count = re.subn(pattern, lambda m: m[1] + figures + m[2], text, flags=re.S)
    if count != 1:
        raise ValueError(f"README.md must hold {MARKS} once")
    return new


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.readme", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, metavar="BENCH.json")
    cases: dict[str, dict[str, Any]] = {}
    for path in parser.parse_args(argv).records:
        record = json.loads(path.read_text())
        if record["options"]["quick"]:
            raise ValueError(f"{path} is of a quick run")
        cases |= {case["name"]: case for case in record["cases"]}
    if missing := CASES.keys() - cases.keys():
        parser.error(f"there is no {', '.join(missing)}")
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(), table(cases)))
    drawn = []
    for name, title in CASES.items():
        results = cases[name]["results"]
        names = [x for x in ("ours", *chain(*OTHERS.values())) if x in results]
        shown = {x: results[x] for x in names}
        drawn.append({**cases[name], "name": title, "results": shown})
    draw_bars(drawn, ".1f").savefig(ROOT / "docs" / "ratios.png", dpi=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
