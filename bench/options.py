"""The options of `scripts/bench`. This module needs no package, so help is instant."""

import argparse
from pathlib import Path
from typing import NoReturn


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
        description="Times an AdaDelta step of this package beside its rivals.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "install PyTorch, JAX and optax first, gigabytes of CUDA among them on Linux"
    add("--install-others", action="store_true", help=text)
    several = {"type": names, "action": "extend", "metavar": "NAME[,NAME...]"}
    add("--quick", action="store_true", help="smaller cases, two minutes at most")
    add("--case", help='only these; "sweep" and "step" stand for all such', **several)
    add("--contender", help="only these, the limit and this package", **several)
    add("--device", choices=("cpu", "gpu"), help="default: MLX's own default")
    add("--repeats", type=positive, metavar="N", help="default: as time allows")
    seconds = {"type": positive, "metavar": "SECONDS"}
    add("--seconds", help="for the repeats of a case, if 7 fit in", **seconds)
    text = "torch.compile gets this long for each contender; default: %(default)s"
    add("--compile-seconds", default=300, help=text, **seconds)
    add("--out", type=Path, default=Path("out/bench"), metavar="FOLDER")
    text = "add to FOLDER's record, so that cases can be measured one by one"
    add("--keep", action="store_true", help=text)
    text = "fill in the tables and plots of README.md and docs/benchmarks.md"
    add("--pages", action="store_true", help=text)
    add("--compare", type=Path, metavar="OLD.json", help="print what moved since")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()
