"""Puts a record's figures into README.md and docs, as tables and as plots."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

from . import report

ROOT = Path(__file__).parents[1]
README = ("large", "transformer", "bf16", "lora", "small")
PEERS = {
    "stock": ("stock",),
    "stock in `mx.compile`": ("stock-compiled",),
    "PyTorch's faster": ("torch-foreach", "torch-loop"),
    "`torch.compile`": ("torch-foreach-compiled", "torch-loop-compiled"),
    "optax, `jax.jit`": ("optax",),
}
PLACE = re.compile(r"(<!-- figures -->\n).*(<!-- end of figures -->\n)", re.S)


def ratio_text(results: dict[str, dict[str, Any]], names: tuple[str, ...]) -> str:
    """The ratio of the quickest of them to this package."""
    measured = [results[x]["vs_ours"] for x in names if "vs_ours" in results.get(x, {})]
    ratios = [ratio["median"] for ratio in measured]
    return f"{min(ratios):.2f}x" if ratios else "not measured"


def table(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        ours = case["results"]["ours"]
        share = ours["of_limit"]["median"]
        row = (
            f"{case['name']}: {case['title']}",
            report.spread_text(ours["seconds"], report.time_text),
            f"{share:.2f}" if share > 0.01 else "",  # memory is no limit there
            *(ratio_text(case["results"], names) for names in PEERS.values()),
        )
        rows.append(row)
    return report.table_text(("", "this one", "of the limit", *PEERS), rows) + "\n"


def fill(text: str, figures: str) -> str:
    """Puts the figures in their place."""
    new, count = PLACE.subn(lambda m: m[1] + figures + m[2], text)
    if count != 1:
        raise ValueError(f"the page must hold {PLACE.pattern!r} once, not {count}")
    return new


def fill_in(record: dict[str, Any]) -> None:
    """Fills in both pages' tables and plots; the record must have README's cases."""
    measured = [case for case in record["cases"] if "results" in case]
    swept, others = report.split_sweep(measured)
    cases = {case["name"]: case for case in others}
    updates = [case for case in others if case["kind"] == "update"]
    details = report.body({**record, "cases": others})
    figures = {
        "README.md": table([cases[name] for name in README]),
        "docs/benchmarks.md": f"{table(updates)}\n{details}",
    }
    for name, text in figures.items():
        page = ROOT / name
        page.write_text(fill(page.read_text(), text))
    shown, drawn = ["ours", *chain(*PEERS.values())], []
    for case in map(cases.__getitem__, README):
        results = {x: case["results"][x] for x in shown if x in case["results"]}
        drawn.append({**case, "name": case["title"], "results": results})
    report.draw_bars(drawn, ".1f").savefig(ROOT / "docs" / "ratios.png", dpi=100)
    if len(swept) > 1:
        report.draw_sweep(swept).savefig(ROOT / "docs" / "sweep.png")
