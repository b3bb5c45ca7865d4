"""Writes docs/api.md from the package's docstrings; run it in the tests' .venv."""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

import mlx_adadelta

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
# One thing is returned, and what we document has its types in the docstrings.
OPTIONS: dict[str, Any] = {
    "returns_multiple_items": False,
    "returns_named_value": False,
    "warnings": False,
}
HEAD = """\
# API reference

Made from the docstrings by `scripts/make_api_docs.py`; do not edit.

<!-- python: what the examples below start from
import mlx.core as mx
import mlx.nn as nn
from mlx_adadelta import *

model = nn.Linear(8, 4)
x, y = mx.ones((2, 8)), mx.ones((2, 4))
loss_and_grad = nn.value_and_grad(
    model, lambda model, x, y: nn.losses.mse_loss(model(x), y)
)
-->
"""


def markdown(text: str) -> str:
    """Sphinx's roles and formulas in GitHub's notation."""

    def formula(match: re.Match[str]) -> str:
        lines = inspect.cleandoc(match[1]).strip()
        if "&" in lines:
            lines = f"\\begin{{aligned}}\n{lines}\n\\end{{aligned}}"
        return f"```math\n{lines}\n```\n\n"

    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r":math:`([^`]+)`", r"$`\1`$", text)
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    return re.sub(r"^\.\. math::\n\n((?:(?: {4}.*)?\n?)+)", formula, text, flags=re.M)


def item(name: str, annotation: Any, description: str) -> str:
    kind = f" ({annotation})" if annotation else ""
    return f"- {name}{kind}: {' '.join(markdown(description).split())}"


def docstring(thing: Any) -> Iterator[str]:
    """Blocks of Markdown."""
    found = griffe.Docstring(inspect.getdoc(thing) or "").parse("google", **OPTIONS)
    for section in found:
        if section.kind == griffe.DocstringSectionKind.text:
            yield markdown(section.value).strip()
        elif section.kind == griffe.DocstringSectionKind.admonition:  # "Example:"
            code = re.sub(r"^(>>>|\.\.\.) ?", "", section.value.contents, flags=re.M)
            yield f"```python\n{code}\n```"
        elif section.kind == griffe.DocstringSectionKind.parameters:
            rows = [
                item(f"`{x.name}`", x.annotation, x.description) for x in section.value
            ]
            yield "\n".join(["**Arguments**", "", *rows])
        elif section.kind == griffe.DocstringSectionKind.returns:
            [x] = section.value
            kind = f"{x.annotation}: " if x.annotation else ""
            yield f"**Returns** {kind}" + " ".join(markdown(x.description).split())
        elif section.kind == griffe.DocstringSectionKind.raises:
            rows = [item(f"`{x.annotation}`", "", x.description) for x in section.value]
            yield "\n".join(["**Raises**", "", *rows])
        else:
            raise ValueError(f"{thing}: no rule for a section of kind {section.kind}")


def signature(name: str, function: Any) -> str:
    """Without annotations: the arguments' types are listed below it."""
    found = inspect.signature(function)
    arguments = [str(x.replace(annotation=x.empty)) for x in found.parameters.values()]
    keywords = [x.name for x in found.parameters.values() if x.kind is x.KEYWORD_ONLY]
    arguments = [x for x in arguments if x != "self"]
    if keywords:
        arguments.insert(len(arguments) - len(keywords), "*")
    lines = textwrap.wrap(", ".join(arguments), 84)
    if len(lines) > 1:
        lines = ["", *(f"    {line}" for line in lines), ""]
    return f"```text\n{name}({chr(10).join(lines)})\n```"


def page() -> str:
    blocks = [HEAD.rstrip()]
    for name in mlx_adadelta.__all__:
        thing = getattr(mlx_adadelta, name)
        if not callable(thing):
            continue
        blocks += [f"## {name}", signature(name, thing), *docstring(thing)]
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if member.startswith("_") or not inspect.getdoc(value):
                    continue
                blocks.append(f"### {name}.{member}")
                if inspect.isfunction(value):
                    blocks.append(signature(member, value))
                blocks += docstring(value)
    blocks += ["## \\_\\_version\\_\\_", "The version, a string."]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page())
