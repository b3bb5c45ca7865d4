"""Times an AdaDelta step of this package beside those it stands in for."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import measure, report
from .cases import Case, all_cases
from .contenders import LABELS, family, limit_of, missing

GROUPS = ("step", "sweep")
THREADS = "threads"
THREADED = ["small", "lora", "large"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def build_parser() -> Parser:
    parser = Parser(
        prog="bench",
        description=__doc__,
        epilog="scripts/bench --install-others installs PyTorch, JAX and optax first",
        allow_abbrev=False,
    )
    add = parser.add_argument
    several = {"type": names, "action": "extend", "metavar": "NAME[,NAME...]"}
    add("--quick", action="store_true", help="smaller cases, two minutes at most")
    add("--case", help='only these; "sweep" and "step" stand for all such', **several)
    add("--contender", help="only these, the limit and this package", **several)
    add("--device", choices=("cpu", "gpu"), help="default: MLX's own default")
    add("--repeats", type=positive, metavar="N", help="default: as time allows")
    add("--out", type=Path, default=Path("out/bench"), metavar="FOLDER")
    add("--compare", type=Path, metavar="OLD.json", help="print what moved since")
    add("--list", action="store_true", help="name cases and contenders, and stop")
    return parser


def choose_cases(wanted: list[str] | None, quick: bool) -> list[Case | str]:
    cases: dict[str, Case | str] = {**all_cases(quick)}
    if sys.platform == "linux":
        cases[THREADS] = THREADS
    if wanted is None:
        return list(cases.values())
    chosen = []
    for name in wanted:
        found = [known for known in cases if name == known]
        if name in GROUPS:
            found = [known for known in cases if family(known) == name]
        if not found:
            known_names = ", ".join([*cases, *GROUPS])
            raise ValueError(f"--case: {name!r} is none of {known_names}")
        chosen += [cases[known] for known in found]
    return list(dict.fromkeys(chosen))


def choose_device(device: str | None) -> None:
    if device is None:
        return
    if device == "gpu" and not mx.is_available(mx.gpu):
        raise ValueError("--device: MLX has no gpu here")
    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)


def read_old(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        old = json.loads(path.read_text())
        if old["format"] != 1:
            raise ValueError(f"its format is {old['format']}, not 1")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--compare: {path} is no record of this suite: {error!r}"
        ) from error
    return old


def print_list(cases: list[Case | str], console: Console) -> None:
    for case in cases:
        name, title = THREADS, "this package by the number of cores"
        if isinstance(case, Case):
            name, title = case.name, case.title
        console.print(f"case       {name:26}{title}", soft_wrap=True)
    for name, label in LABELS.items():
        why = missing(name)
        console.print(f"contender  {name:26}{label}{f' ({why})' if why else ''}")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    try:
        choose_device(options.device)
        cases = choose_cases(options.case, options.quick)
        for name in options.contender or ():
            if name not in LABELS:
                known = ", ".join(LABELS)
                raise ValueError(f"--contender: {name!r} is none of {known}")
        old = read_old(options.compare)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.list:
        print_list(cases, console)
        return 0

    record = run(cases, options, console)
    plots = report.save_plots(record, options.out)
    (options.out / "bench.json").write_text(
        json.dumps(record, indent=1, default=str) + "\n"
    )
    text = report.markdown(record, plots)
    (options.out / "bench.md").write_text(text)
    print(text)
    if old is not None:
        print(report.comparison(old, record))
    print("written:", ", ".join(map(str, sorted(options.out.iterdir()))))
    return 1 if any("REFUSED" in note for note in record["notes"]) else 0


def entered(case: Case, wanted: set[str]) -> list[str]:
    """The case's contenders that are wanted, behind their limits."""
    names = [name for name in case.contenders if name in wanted]
    limits = dict.fromkeys(["limit", *(limit_of(name) for name in names)])
    return [*limits, "floor", *names]


def run(
    cases: list[Case | str], options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Measures the cases; what cannot run here is named in the notes."""
    effort = measure.QUICK if options.quick else measure.FULL
    effort = replace(effort, repeats=options.repeats)
    wanted = set(options.contender or LABELS) | set(measure.ANCHORS)
    entrants = {
        case.name: entered(case, wanted) for case in cases if isinstance(case, Case)
    }
    present = {name for names in entrants.values() for name in names}
    absent = {name: missing(name) for name in LABELS if name in present}
    if options.quick:
        slow = [x for x in present if family(x) == "torch" and x.endswith("-compiled")]
        absent |= dict.fromkeys(slow, "--quick leaves torch.compile out")
    absent = {name: why for name, why in absent.items() if why}
    settings = {key: value for key, value in vars(options).items() if key != "list"}
    record = report.new_record(settings, absent)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))

        def tell(text: str, advance: float) -> None:
            progress.update(task, advance=advance, description=text or None)

        for case in cases:
            if isinstance(case, str):
                tell(THREADS, 0)
                arguments = ["--quick"] if options.quick else []
                record["cases"].append(measure.measure_threads(THREADED, arguments))
                tell("", 1)
                continue
            able = [name for name in entrants[case.name] if name not in absent]
            record["cases"].append(measure.measure(case, able, effort, tell))
        progress.update(task, completed=len(cases))
    record["notes"] += report.closing_notes(record["cases"])
    return record


if __name__ == "__main__":
    sys.exit(main())
