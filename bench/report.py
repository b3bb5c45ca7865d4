"""Makes tables, Markdown and plots of a record, and compares two records."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
from matplotlib.figure import Figure

import mlx_adadelta

from .contenders import LABELS, family, versions
from .peers import CORES

Row = tuple[str, ...]
COLORS = {"ours": "#08306b", "stock": "#d95f02", "torch": "#cb181d", "optax": "#238b45"}


def output(*command: str) -> str:
    """The output of a command; empty where it is not installed."""
    if shutil.which(command[0]) is None:
        return ""
    here = Path(__file__).parent
    found = subprocess.run(command, cwd=here, stdout=subprocess.PIPE, check=False)
    return found.stdout.decode().strip()


def processor() -> str:
    if platform.system() == "Darwin":
        return output("sysctl", "-n", "machdep.cpu.brand_string")
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def conditions() -> dict[str, Any]:
    """Conditions that all figures of one record must share."""
    gpu = mx.default_device() == mx.gpu
    return {
        "commit": output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "machine": {
            "processor": processor(),
            "cores": CORES,
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(),
            "python": platform.python_version(),
            "device": mx.device_info()["device_name"] if gpu else "CPU",
        },
        "backends": list(mlx_adadelta.backends()),
        "versions": versions(),
    }


def new_record(options: dict[str, Any], missing: dict[str, str]) -> dict[str, Any]:
    load = os.getloadavg()[0]
    notes = [f"{LABELS[name]}: not measured, {why}." for name, why in missing.items()]
    if load > 0.5:
        notes.append(f"Other work was running: the load was {load:.1f} at the start.")
    if mlx_adadelta.backends() == ("mlx",):
        notes.append("mlx-adadelta has no native backend here and ran on MLX's own.")
    return {
        "format": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **conditions(),
        "options": options,
        "notes": notes,
        "cases": [],
    }


def check_conditions(kept: dict[str, Any], quick: bool) -> None:
    """Refuses a record that was measured under other conditions."""
    now = {**conditions(), "quick": quick}
    then = {**kept, "quick": kept["options"]["quick"]}
    for key, value in now.items():
        if then[key] != value:
            raise ValueError(f"--keep: {key} must be {value} but is {then[key]}")


def merge(
    kept: dict[str, Any], record: dict[str, Any], order: list[str]
) -> dict[str, Any]:
    """The new record, with the kept cases that it does not measure again."""
    cases = {case["name"]: case for case in kept["cases"] + record["cases"]}
    new = {case["name"] for case in record["cases"]}
    notes = [x for x in kept["notes"] if x.partition(":")[0] not in new]
    return {
        **record,
        "notes": list(dict.fromkeys(notes + record["notes"])),
        "cases": [cases[name] for name in order if name in cases],
    }


def closing_notes(cases: list[dict[str, Any]]) -> list[str]:
    """Notes about the measured cases."""
    notes = []
    for case in cases:
        if "took_seconds" in case:
            notes.append(f"{case['name']}: took {case['took_seconds']:.0f} s.")
        for result in case.get("results", {}).values():
            if "refused" in result:
                why = f"REFUSED: {result['refused']}"
                notes.append(f"{case['name']}: {result['label']} {why}.")
            if "compile_seconds" in result:
                took = time_text(result["compile_seconds"])
                notes.append(f"{case['name']}: {result['label']} compiled in {took}.")
    return notes


EXPLANATION = """\
A step is the median, ± half the distance of its quartiles; x this one its ratio to \
mlx-adadelta eager; of the limit the limit's time over the step's, the limit being the \
longer of the same traffic without arithmetic and the same arithmetic without traffic, \
and bound says which; GB/s counts the bytes that a parameter of such types moves \
(28 in float32); B/param is the peak \
of memory in a step above what was held before it, in bytes a parameter."""


def time_text(value: float) -> str:
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    unit = next((x for x in units if abs(value) >= units[x]), "µs")
    return f"{significant(value / units[unit])} {unit}"


def significant(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def spread_text(value: dict[str, float] | None, text: Any = significant) -> str:
    """The median, with half the distance of the quartiles in percent of it."""
    if not value:
        return ""
    half = 50 * (value["q3"] - value["q1"]) / abs(value["median"])
    return f"{text(value['median'])} ±{half:.0f}%"


TIMES = ("", "a step", "x this one")
HEADINGS = {
    "update": (*TIMES, "of the limit", "bound", "GB/s", "B/param"),
    "step": (*TIMES, "optimizer's part"),
}


def table_rows(case: dict[str, Any]) -> Iterator[Row]:
    for name, result in case["results"].items():
        if "seconds" not in result:
            yield result["label"], result.get("skipped", "REFUSED")
            continue
        row = (
            result["label"],
            spread_text(result["seconds"], time_text),
            spread_text(result.get("vs_ours")) if name != "ours" else "1",
        )
        if case["kind"] == "step":
            row += (spread_text(result.get("update_seconds"), time_text),)
        else:
            row += (spread_text(result.get("of_limit")), result.get("bound", ""))
            row += (f"{result['gb_s']:.1f}" if name != "floor" else "",)
            peak = result.get("peak_bytes")
            row += (f"{peak / case['parameters']:.1f}" if peak is not None else "n/a",)
        yield row


def table_text(headings: Row, rows: Iterable[Row]) -> str:
    """A table of Markdown with aligned columns."""
    full = [row + ("",) * (len(headings) - len(row)) for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in full]
    lines.insert(1, "|---" + "|---:" * (len(headings) - 1) + "|")
    return "\n".join(lines)


def comparison(old: dict[str, Any], record: dict[str, Any]) -> str:
    headings = ("case", "", "of the limit, then", "now", "time, x", "moved")
    rows = compare(old, record)
    moved = sum(row[-1] != "" for row in rows)
    title = f"## Against {old['commit']} of {old['date']}"
    return f"{title}\n\n{table_text(headings, rows)}\n\n{moved} of {len(rows)} moved"


def body(record: dict[str, Any]) -> str:
    """The machine, a table for each case, and the notes."""
    machine = record["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} "
        f"GiB, {machine['system']}, device {machine['device']}.",
        f"Python {machine['python']}, {versions}. {record['date']}, "
        f"commit {record['commit']}.",
        *("", EXPLANATION),
    ]
    for case in record["cases"]:
        title = f"## {case['name']}: {case['title']}"
        if "skipped" in case:
            lines += ["", title, "", f"Not measured: {case['skipped']}."]
            continue
        title += f", {case['parameters']:,} parameters in {case['tensors']:,} tensors"
        table = table_text(HEADINGS[case["kind"]], table_rows(case))
        lines += ["", title, "", table]
    lines += ["", *(f"- {note}" for note in record["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Row]:
    """A row for each contender in both records: limit over time, old and new.

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
            if "of_limit" not in result or "of_limit" not in then:
                continue
            a, b = then["of_limit"], result["of_limit"]
            change = a["median"] / b["median"]
            apart = a["q3"] < b["q1"] or b["q3"] < a["q1"]
            moved = apart and abs(change - 1) > 0.05
            word = ("slower" if change > 1 else "faster") if moved else ""
            texts = spread_text(a), spread_text(b), f"{change:.2f}", word
            rows.append((case["name"], result["label"], *texts))
    return rows


def color(name: str) -> str:
    return COLORS.get(family(name), "#888888")


def style(name: str) -> dict[str, Any]:
    if name in ("limit", "floor"):
        return {"color": "black", "ls": "--", "lw": 1.2}
    dashed = name.endswith(("-compiled", "-loop"))
    return {"color": color(name), "ls": ":" if dashed else "-", "marker": "o", "ms": 3}


def split_sweep(cases: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], ...]:
    """The cases of the sweep, and the others."""
    swept = [case for case in cases if family(case["name"]) == "sweep"]
    return swept, [case for case in cases if case not in swept]


def save_plots(record: dict[str, Any], folder: Path) -> None:
    """Draws what the record has figures for."""
    cases = [case for case in record["cases"] if case.get("results")]
    sweep, others = split_sweep(cases)
    figures = {}
    if len(sweep) > 1:
        figures["sweep"] = draw_sweep(sweep)
    if others:
        figures["ratios"] = draw_bars(others, ".2f")
    machine = record["machine"]
    subject = f"{machine['processor']}, {machine['cores']} cores, {record['date'][:10]}"
    for name, figure in figures.items():
        figure.supxlabel(subject, fontsize=8)
        figure.savefig(folder / f"{name}.png")


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
    axes.set(xlabel="parameters in one tensor", ylabel="ms a step", yscale="log")
    axes.set_title("One AdaDelta step against the memory's limit")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def draw_bars(cases: list[dict[str, Any]], form: str) -> Figure:
    """A panel a case: the medians of the ratios to this package."""
    columns, lines = min(2, len(cases)), (len(cases) + 1) // 2
    most = max(len(case["results"]) for case in cases)
    size = (5.5 * columns, 0.8 + lines * (0.6 + 0.2 * most))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle("Time of a step over that of mlx-adadelta (less is better)")
    panels: Any = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for case, panel in zip(cases, panels.flat, strict=False):
        found = {
            name: result["vs_ours"]["median"]
            for name, result in case["results"].items()
            if "vs_ours" in result
        }
        labels, colors = [LABELS[n] for n in found], [color(n) for n in found]
        drawn = panel.barh(labels, list(found.values()), color=colors)
        panel.bar_label(drawn, fmt=f"{{:{form}}}", padding=3, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(case["name"], fontsize=10, loc="left")
    return figure
