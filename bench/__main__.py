"""Times an AdaDelta step of this package beside its rivals."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from . import measure, pages, report
from .cases import Case, all_cases
from .contenders import LABELS, family, limit_of, missing
from .options import build_parser

GROUPS = ("step", "sweep")


def check_names(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{flag}: {name!r} is none of {', '.join(known)}")


def choose_cases(wanted: list[str] | None, quick: bool) -> list[Case]:
    cases = all_cases(quick)
    if wanted is None:
        return list(cases.values())
    check_names("--case", wanted, [*cases, *GROUPS])
    groups = {*wanted} & {*GROUPS}
    return [x for n, x in cases.items() if n in wanted or family(n) in groups]


def read_record(flag: str, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        if record["format"] != 1:
            raise ValueError(f"its format is {record['format']}, not 1")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag}: {path} is no record of bench: {error!r}") from error
    return record


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 110)
    path = options.out / "bench.json"
    kept = old = None
    try:
        if options.device == "gpu" and not mx.is_available(mx.gpu):
            raise ValueError("--device: MLX has no gpu here")
        if options.device is not None:
            mx.set_default_device(getattr(mx, options.device))
        cases = choose_cases(options.case, options.quick)
        check_names("--contender", options.contender or (), LABELS)
        if options.compare:
            old = read_record("--compare", options.compare)
        if options.keep and path.exists():
            kept = read_record("--keep", path)
            report.check_conditions(kept, options.quick)
        names = {case.name for case in cases}
        names |= {case["name"] for case in kept["cases"]} if kept else set()
        if options.pages and (options.quick or not names >= set(pages.README)):
            needed = ", ".join(pages.README)
            raise ValueError(f"--pages: the record must hold {needed}, not --quick")
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    def save(record: dict[str, Any]) -> dict[str, Any]:
        if kept is not None:
            record = report.merge(kept, record, list(all_cases(options.quick)))
        path.write_text(json.dumps(record, indent=1, default=str) + "\n")
        return record

    record = save(run(cases, options, console, save))
    report.save_plots(record, options.out)
    text = f"# Benchmarks\n\n{report.body(record)}"
    path.with_suffix(".md").write_text(text)
    print(text)
    if old is not None:
        print(report.comparison(old, record))
    print("written:", ", ".join(map(str, sorted(options.out.iterdir()))))
    if options.pages:
        pages.fill_in(record)
    return 1 if any("REFUSED" in note for note in record["notes"]) else 0


def entered(case: Case, wanted: set[str]) -> list[str]:
    """The wanted contenders of a case, after their limits."""
    names = [name for name in case.contenders if name in wanted]
    limits = dict.fromkeys(["limit", *(limit_of(name) for name in names)])
    return [*limits, "floor", *names]


def run(
    cases: list[Case],
    options: argparse.Namespace,
    console: Console,
    save: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """Measures the cases. Saves the record, which notes what cannot run, after each."""
    effort = measure.QUICK if options.quick else measure.FULL
    effort = replace(
        effort,
        repeats=options.repeats,
        seconds=options.seconds or effort.seconds,
        compile_seconds=options.compile_seconds,
    )
    wanted = set(options.contender or LABELS) | set(measure.ANCHORS)
    entrants = {case.name: entered(case, wanted) for case in cases}
    present = {name for names in entrants.values() for name in names}
    reasons = {x: missing(x, options.quick) for x in LABELS if x in present}
    absent = {name: why for name, why in reasons.items() if why}
    record = report.new_record(vars(options), absent)
    with console.status("") as status:
        for i, case in enumerate(cases):
            able = [name for name in entrants[case.name] if name not in absent]

            def tell(text: str, at: str = f"case {i + 1} of {len(cases)}") -> None:
                status.update(f"{at}, {text}")

            record["cases"].append(measure.measure(case, able, effort, tell))
            save(record)
    record["notes"] += report.closing_notes(record["cases"])
    return record


if __name__ == "__main__":
    sys.exit(main())
