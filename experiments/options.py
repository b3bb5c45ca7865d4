"""The options of `scripts/train`. This module needs no package, so help is instant."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def make_folder(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse(self, argv: list[str] | None, *steps: Callable[..., Any]) -> list[Any]:
        """The options, and the result of each step for them."""
        options = self.parse_args(argv)
        try:
            return [options, *(step(options) for step in steps)]
        except (OSError, ValueError) as error:
            self.error(str(error))

    def option(self, flag: str, default: object, text: str = "", **how: Any) -> None:
        """Adds an option whose help ends with its default, unless that is None."""
        text += "" if default is None else "default: %(default)s"
        self.add_argument(flag, default=default, help=text, **how)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def add_training(
    parser: Parser, data_help: str, epochs: int, batch: int, **how_data: Any
) -> None:
    """The options that every training shares."""
    parser.option("--data", None, data_help, type=Path, metavar="FILE.npz", **how_data)
    parser.option("--epochs", epochs, type=positive, metavar="N")
    parser.option("--batch-size", batch, type=positive, metavar="N")
    parser.option("--lr", 1.0, type=float, metavar="X")
    parser.option("--seed", 0, type=int, metavar="N")


def build_parser() -> Parser:
    text = "Train one small classifier with stock AdaDelta and ours, eager and compiled"
    parser = Parser(prog="train", description=text, allow_abbrev=False)
    keys = "x_train, y_train, x_test, y_test; default: scikit-learn's digits"
    add_training(parser, keys, epochs=30, batch=32)
    parser.option("--dtype", "float32", choices=("float32", "bfloat16", "float16"))
    out = Path("train.png")
    parser.option("--out", out, "the figure; ", type=Path, metavar="FILE.png")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()
