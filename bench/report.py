"""What was measured, for people: tables, Markdown, plots, and what moved."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import mlx_adadelta

from .contenders import CORES, LABELS, family, versions

Row = tuple[str, ...]
COLORS = {"ours": "#08306b", "stock": "#d95f02", "torch": "#cb181d", "optax": "#238b45"}


# ------------------------------- The record --------------------------------


def output(*command: str) -> str:
    """What a command prints, or nothing where it does not run."""
    try:
        found = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            check=False,
            capture_output=True,
            text=True,
        )
    except OSError:
        return ""
    return found.stdout.strip()


def processor() -> str:
    if platform.system() == "Darwin":
        return output("sysctl", "-n", "machdep.cpu.brand_string")
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def reference_blas() -> bool:
    """Whether MLX's matrix products run on Netlib's reference BLAS."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    libraries = {Path(line.split()[-1]).name for line in maps.read_text().splitlines()}
    quick = ("libopenblas", "libmkl", "libblis")
    reference = any(name.startswith("libblas") for name in libraries)
    return reference and not any(name.startswith(quick) for name in libraries)


def new_record(options: dict[str, Any], missing: dict[str, str]) -> dict[str, Any]:
    gpu = mx.default_device() == mx.gpu
    load = os.getloadavg()[0]
    notes = [f"{LABELS[name]}: not measured, {why}." for name, why in missing.items()]
    if load > 0.5:
        notes.append(f"Other work was running: the load was {load:.1f} at the start.")
    if mlx_adadelta.backends() == ("mlx",):
        notes.append("mlx-adadelta has no native backend here and ran on MLX's own.")
    return {
        "format": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "options": options,
        "machine": {
            "processor": processor(),
            "cores": CORES,
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(),
            "python": platform.python_version(),
            "device": mx.device_info()["device_name"] if gpu else "CPU",
        },
        "backends": mlx_adadelta.backends(),
        "versions": versions(),
        "notes": notes,
        "cases": [],
    }


def closing_notes(cases: list[dict[str, Any]]) -> list[str]:
    """What can be said only once the cases have been measured."""
    notes = []
    for case in cases:
        for result in case.get("results", {}).values():
            if "refused" in result:
                why = f"REFUSED: {result['refused']}"
                notes.append(f"{case['name']}: {result['label']} {why}.")
    if any(case.get("kind") == "step" for case in cases) and reference_blas():
        notes.append(
            "Whole steps: MLX's matrix products run on the reference BLAS here, many "
            "times slower than they need be. Debian's libopenblas0-pthread takes its "
            "place if preloaded: LD_PRELOAD=/usr/lib/x86_64-linux-gnu/"
            "openblas-pthread/libopenblas.so.0 scripts/bench ..."
        )
    return notes


EXPLANATION = """\
A step is the median, ± half the distance of its quartiles; x this one its ratio to \
mlx-adadelta eager; of the limit the limit's time over the step's, the limit being the \
same traffic without arithmetic; GB/s counts 28 bytes a parameter; B/param is the peak \
of memory in a step above what was held before it, in bytes a parameter; kernels are \
those of a step, counted in its graph."""


# --------------------------------- Tables ----------------------------------


def time_text(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= scale or unit == "µs":
            return f"{significant(value / scale)} {unit}"
    raise AssertionError("unreachable")


def significant(value: float) -> str:
    """Three digits, and none beyond the fifth decimal."""
    for decimals in range(5):
        if abs(value) >= 10 ** (2 - decimals):
            return f"{value:.{decimals}f}"
    return f"{value:.5f}"


def spread_text(value: dict[str, float] | None, text: Any = significant) -> str:
    """The median, and half the distance of the quartiles in percent of it."""
    if not value:
        return ""
    half = 50 * (value["q3"] - value["q1"]) / abs(value["median"])
    return f"{text(value['median'])} ±{half:.0f}%"


TIMES = ("", "a step", "x this one")
HEADINGS = {
    "update": (*TIMES, "of the limit", "GB/s", "B/param", "kernels"),
    "step": (*TIMES, "optimizer's part"),
}


def table_rows(case: dict[str, Any]) -> Iterator[Row]:
    for name, result in case["results"].items():
        if "refused" in result:
            yield result["label"], "REFUSED"
            continue
        row = (
            result["label"],
            spread_text(result["seconds"], time_text),
            spread_text(result.get("vs_ours")) if name != "ours" else "1",
        )
        if case["kind"] == "step":
            row += (spread_text(result.get("update_seconds"), time_text),)
        else:
            of_limit = spread_text(result.get("of_limit")) if name != "limit" else "1"
            row += (of_limit, f"{result['gb_s']:.1f}")
            if (peak := result.get("peak_bytes")) is None:
                row += ("n/a", "n/a")
            else:
                row += (f"{peak / case['parameters']:.1f}", str(result["kernels"]))
        yield row


def case_title(case: dict[str, Any]) -> str:
    if "parameters" not in case:
        return f"{case['name']}: {case['title']}"
    size = f"{case['parameters']:,} parameters in {case['tensors']:,} tensors"
    return f"{case['name']}: {case['title']}, {size}"


def all_tables(record: dict[str, Any]) -> Iterator[tuple[str, Row, list[Row]]]:
    """Title, headings and rows of every table; the sweep and threads are one each."""
    sweep = [case for case in record["cases"] if case.get("kind") == "sweep"]
    for case in record["cases"]:
        if "skipped" in case:
            yield case_title(case), ("", ""), [("not measured", case["skipped"])]
        elif case["kind"] == "threads":
            for name, curve in case["curves"].items():
                rows = [(str(x["cores"]), spread_text(x, time_text)) for x in curve]
                yield f"{name} by cores", ("cores", "a step"), rows
        elif case["kind"] != "sweep":
            yield case_title(case), HEADINGS[case["kind"]], list(table_rows(case))
        elif case is sweep[0]:
            names = list(case["results"])
            rows = []
            for swept in sweep:
                row = (f"2^{swept['parameters'].bit_length() - 1}",)
                for name in names:
                    result = swept["results"].get(name, {})
                    times = result.get("seconds")
                    row += (time_text(times["median"]) if times else "REFUSED",)
                rows.append(row)
            yield "sweep: one tensor, a step", ("", *map(LABELS.get, names)), rows


def print_tables(
    record: dict[str, Any], old: dict[str, Any] | None, console: Console
) -> None:
    for title, headings, rows in all_tables(record):
        print_table(title, headings, rows, console)
    for note in (EXPLANATION, *record["notes"]):
        console.print(note, soft_wrap=True)
    if old is not None:
        title = f"against {old['commit']} of {old['date']}"
        headings = ("case", "", "of the limit, then", "now", "time, x", "moved")
        rows = compare(old, record)
        print_table(title, headings, rows, console)
        moved = sum(row[-1] != "" for row in rows)
        console.print(f"{moved} of {len(rows)} moved")


def print_table(title: str, headings: Row, rows: list[Row], console: Console) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(record: dict[str, Any], plots: list[Path]) -> str:
    machine = record["machine"]
    lines = [
        "# Benchmarks",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} "
        f"GiB, {machine['system']}, device {machine['device']}.",
        f"Python {machine['python']}, "
        + ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        + f". {record['date']}, commit {record['commit']}.",
        "",
        EXPLANATION,
    ]
    for title, headings, rows in all_tables(record):
        lines += ["", f"## {title}", "", "| " + " | ".join(headings) + " |"]
        lines.append("|---" + "|---:" * (len(headings) - 1) + "|")
        for row in rows:
            cells = row + ("",) * (len(headings) - len(row))
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {note}" for note in record["notes"]), ""]
    for plot in plots:
        lines += [f"![{plot.stem}]({plot.name})", ""]
    return "\n".join(lines).rstrip() + "\n"


# -------------------------------- Comparing --------------------------------


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Row]:
    """Rows of what both records measured: time over the limit's, then and now.

    A figure moved if it changed by more than 5 % and the quartiles of old and
    new do not meet.
    """
    before = {case["name"]: case for case in old["cases"]}
    rows: list[Row] = []
    for case in new["cases"]:
        past = before.get(case["name"])
        if past is None or "results" not in case or "results" not in past:
            continue
        if any(past[key] != case[key] for key in ("title", "parameters")):
            rows.append((case["name"], "", "other shapes: not comparable", "", "", ""))
            continue
        for name, result in case["results"].items():
            then = past["results"].get(name, {})
            if name == "limit" or "of_limit" not in result or "of_limit" not in then:
                continue
            a, b = then["of_limit"], result["of_limit"]
            change = a["median"] / b["median"]
            apart = a["q3"] < b["q1"] or b["q3"] < a["q1"]
            moved = apart and abs(change - 1) > 0.05
            word = ("slower" if change > 1 else "faster") if moved else ""
            texts = spread_text(a), spread_text(b), f"{change:.2f}", word
            rows.append((case["name"], result["label"], *texts))
    return rows


# ---------------------------------- Plots ----------------------------------


def color(name: str) -> str:
    return COLORS.get(family(name), "#888888")


def style(name: str) -> dict[str, Any]:
    if name == "limit":
        return {"color": "black", "ls": "--", "lw": 1.2}
    dashed = name.endswith(("-compiled", "-loop"))
    return {"color": color(name), "ls": ":" if dashed else "-", "marker": "o", "ms": 3}


def save_plots(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the record has figures for."""
    cases = [case for case in record["cases"] if case.get("results")]
    sweep = [case for case in cases if case["kind"] == "sweep"]
    others = [case for case in cases if case["kind"] != "sweep"]
    updates = [case for case in others if case["kind"] == "update"]
    figures = {}
    if len(sweep) > 1:
        figures["sweep"] = draw_sweep(sweep)
    if others:
        title = "Time of a step over that of mlx-adadelta (less is better)"
        figures["ratios"] = draw_bars(others, title, "vs_ours", ".2f")
    if updates:
        title = "Peak memory in a step above what was held, bytes a parameter"
        figures["memory"] = draw_bars(updates, title, "peak_bytes", ".1f")
    machine = record["machine"]
    subject = f"{machine['processor']}, {machine['cores']} cores, {record['date'][:10]}"
    for name, figure in figures.items():
        figure.supxlabel(subject, fontsize=8)
        figure.savefig(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def draw_sweep(sweep: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    axes: Any = figure.subplots()
    for name in sweep[0]["results"]:
        points = []
        for case in sweep:
            if times := case["results"].get(name, {}).get("seconds"):
                row = (times["median"], times["q1"], times["q3"])
                points.append((case["parameters"], *(1e3 * x for x in row)))
        sizes, medians, low, high = zip(*points, strict=True)
        axes.plot(sizes, medians, label=LABELS[name], **style(name))
        axes.fill_between(sizes, low, high, color=color(name), alpha=0.15, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="parameters in one tensor", ylabel="ms a step")
    axes.set_title("One AdaDelta step against the memory's limit")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def draw_bars(cases: list[dict[str, Any]], title: str, key: str, form: str) -> Figure:
    """A panel a case: the medians of a ratio, or bytes over parameters."""
    columns = min(2, len(cases))
    bars = [
        {n: r[key] for n, r in case["results"].items() if key in r} for case in cases
    ]
    heights = [
        0.6 + 0.2 * max(map(len, bars[i : i + 2])) for i in range(0, len(bars), 2)
    ]
    size = (5.5 * columns, 0.8 + sum(heights))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(title)
    grid: Any = {"squeeze": False, "height_ratios": heights}
    panels: Any = figure.subplots(len(heights), columns, **grid)
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for case, found, panel in zip(cases, bars, panels.flat, strict=False):
        if key == "peak_bytes":
            values = [value / case["parameters"] for value in found.values()]
        else:
            values = [value["median"] for value in found.values()]
        labels, colors = [LABELS[n] for n in found], [color(n) for n in found]
        drawn = panel.barh(labels, values, color=colors)
        texts = [format(value, form) for value in values]
        panel.bar_label(drawn, texts, padding=3, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(case["name"], fontsize=10, loc="left")
    return figure
