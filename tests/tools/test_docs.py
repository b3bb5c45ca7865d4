"""README and docs: code runs as written, links lead somewhere."""

import contextlib
import doctest
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlparse

import mlx.core as mx
import mlx.nn as nn
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import mlx_adadelta
from bench import pages as figures

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SHELLS = {"sh", "shell", "bash", "console"}

# Commands that are not run, and why.
NOT_RUN = {
    r"pip install .*": "takes minutes; .ci/run installs the package the same way",
    r"apt-get install .*": "changes the machine",
    r"xcode-select --install": "exists on macOS only",
    r"\.ci/run": "runs these tests",
    r"pre-commit install": "changes the checkout",
    r"mlx\.launch .* examples/\w+\.py": "test_distributed.py runs them",
    r"python -m mlx_adadelta\.mlx_lm .*": "test_mlx_lm.py runs it",
    r"python tests/host_metal/mutants\.py": "takes minutes",
}


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def pages(pattern: str, but: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Parametrizes a test over the pages that have a block of such a language."""
    found = [
        name
        for name, page in zip(NAMES, PAGES, strict=True)
        if name not in but
        and any(re.fullmatch(pattern, lang) for lang, *_ in blocks(page))
    ]
    return pytest.mark.parametrize("name", found)


def blocks(page: Path) -> Iterator[tuple[str, int, str, str | None]]:
    """Language, line, text, and the output shown below the block, if any."""
    found = tokens(page)
    for i, token in enumerate(found):
        if token.type == "fence":
            below = found[i + 1] if i + 1 < len(found) else None
            shown = below and below.type == "fence" and below.info == "text"
            output = below.content if shown else None
            yield token.info, token.map[0] + 1, token.content, output


@pytest.mark.parametrize("name", NAMES)
def test_blocks_say_their_language(name: str) -> None:
    known = {"python", "text", "math", "cpp", "cmake", "toml", *SHELLS}
    for language, line, *_ in blocks(ROOT / name):
        assert language in known, f"{name}:{line}"
    assert not [t for t in tokens(ROOT / name) if t.type == "code_block"], (
        "an indented block would not be run"
    )


@pages("python", but=["docs/mlx_lm.md"])  # test_mlx_lm.py runs it
def test_python(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top to bottom in one fresh namespace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLX_ADADELTA_BACKEND", raising=False)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    namespace = {"__name__": "__main__"}
    try:
        for language, line, text, output in blocks(ROOT / name):
            if language != "python":
                continue
            code = compile("\n" * line + text, ROOT / name, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            if output is not None:
                assert printed.getvalue() == output, f"{name}:{line}"
    finally:
        mx.set_default_device(device)


def commands(page: Path) -> Iterator[str]:
    for language, _, text, _ in blocks(page):
        if language not in SHELLS:
            continue
        lines = text.replace("\\\n", " ").splitlines()
        if language == "console":  # the rest is output
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            for command in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line)):
                words = shlex.split(command)
                while words and re.match(r"\w+=", words[0]):
                    words.pop(0)
                if words:
                    words[0] = words[0].removeprefix(".venv/bin/")
                    yield shlex.join(words)


def program(command: str) -> tuple[str, ...] | None:
    """The program of this project that a command runs."""
    if found := re.match(r"python (-m [\w.]+|[\w./]+\.py)", command):
        return sys.executable, *found[1].split()
    if found := re.match(r"scripts/\w+(?!\S)", command):
        return (found[0],)
    return None


@cache
def help_of(program: tuple[str, ...]) -> str:
    """The help of a program; an error where it does not start."""
    return subprocess.run(
        [*program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pages("|".join(SHELLS))
def test_commands(name: str) -> None:
    """Each command starts and knows its flags, or is excused by name."""
    for command in commands(ROOT / name):
        check_paths(command)
        if any(re.fullmatch(pattern, command) for pattern in NOT_RUN):
            continue
        run = program(command)
        assert run, f"{command}: neither run nor excused"
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", command):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(run)), command
        help_of(run)


def test_readme_names_what_a_fresh_machine_needs() -> None:
    """README and the CI job in a bare Debian list the packages of _setup.sh."""
    setup = (ROOT / "scripts/_setup.sh").read_text()
    [needs] = re.findall(r'^debian_needs="(.*)"$', setup, re.M)
    packages = set(needs.split())
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    for text, more in (
        ((ROOT / "README.md").read_text(), set()),
        (workflow, {"ca-certificates"}),
    ):
        [named] = re.findall(r"apt-get install (?:-y )?([a-z+0-9 -]+)", text)
        assert set(named.split()) == packages | more


def test_contributing_names_the_programs_of_scripts() -> None:
    """And the extras that bring them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("## Programs")[2].partition("\n## ")[0]
    files = [x for x in (ROOT / "scripts").iterdir() if x.is_file()]
    scripts = "".join(x.read_text() for x in [*files, ROOT / ".ci/run"])
    used = re.findall(r"\$(?:venv/|env/)?bin/([\w-]+)", scripts)
    used += re.findall(r'"\$python" -m (\w+)', scripts)
    for needed in re.findall(r"^.*?\bneed ([a-z+ ]+)(?:$| #)", scripts, re.M):
        used += needed.split()
    assert {"git", "g++", "ninja", "cmake", "sphinx", "ruff"} <= set(used)
    ours = {"python", "pip", "pytest", "bench"}
    assert set(used) - ours <= set(re.findall(r"`([\w+-]+)`", table))
    declared = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"extra `(.+?)`", table):
        assert re.search(rf"^{extra} = \[", declared, re.M), extra


def check_paths(command: str) -> None:
    """Files and extras that a command names exist."""
    for word in re.findall(
        r"(?:scripts|examples|bench|experiments|tests|\.ci)/[\w./]+", command
    ):
        assert (ROOT / word).exists(), f"{command}: there is no {word}"
    for word in re.findall(r"\.\[([\w,-]+)\]", command):
        for extra in word.split(","):
            declared = (ROOT / "pyproject.toml").read_text()
            assert re.search(rf"^{extra} = \[", declared, re.M), command


def slugs(page: Path) -> set[str]:
    """The anchors GitHub makes of a page's headings."""
    found: set[str] = set()
    for token, text in zip(tokens(page), tokens(page)[1:], strict=False):
        if token.type != "heading_open":
            continue
        shown = "".join(child.content for child in text.children or ())
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = sum(
            x == slug or re.fullmatch(rf"{slug}-\d+", x) is not None for x in found
        )
        found.add(f"{slug}-{count}" if count else slug)
    return found


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                yield str(target)


def broken(page: Path) -> Iterator[str]:
    for link in links(page):
        url = urlparse(link)
        if url.scheme:
            if url.scheme != "https" or "." not in url.netloc:
                yield f"{link}: not a well-formed https address"
            continue
        target = (page.parent / unquote(url.path)).resolve() if url.path else page
        if not target.exists() or ROOT not in target.parents:
            yield f"{link}: there is no such file"
        elif url.fragment and url.fragment not in slugs(target):
            yield f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("name", NAMES)
def test_links(name: str) -> None:
    assert list(broken(ROOT / name)) == []


def test_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    listed = {(index.parent / link).resolve() for link in links(index)}
    found = {x for x in index.parent.iterdir() if x.suffix in {".md", ".rst"}}
    assert found - listed == {index}


def test_examples_of_docstrings() -> None:
    model, x, y = nn.Linear(8, 4), mx.ones((2, 8)), mx.ones((2, 4))
    loss_and_grad = nn.value_and_grad(
        model, lambda model, x, y: nn.losses.mse_loss(model(x), y)
    )
    names = {**vars(mlx_adadelta), **locals()}
    examples = [
        example
        for name in mlx_adadelta.__all__
        for test in doctest.DocTestFinder().find(getattr(mlx_adadelta, name), name)
        for example in test.examples
    ]
    assert examples
    for example in examples:
        exec(example.source, names)


def test_the_projects_address_is_the_same_everywhere() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    [address] = re.findall(r'^Repository = "(.+)"', declared, re.M)
    texts = [declared, *(page.read_text() for page in PAGES)]
    found = re.findall(r"https://github\.com/[\w-]+/mlx-adadelta\b", "".join(texts))
    assert len(found) > 5 and set(found) == {address}


def test_the_walk_is_short_and_leads_somewhere() -> None:
    """docs/architecture.md names at most seven places, each a function in a file."""
    page = (ROOT / "docs/architecture.md").read_text()
    steps = re.findall(r"^\d\. (.*?)(?=^\d\.|^\n)", page.split("## ")[1], re.M | re.S)
    assert 1 < len(steps) <= 7
    for step in steps:
        places = re.findall(r"`([\w/.]+)`, ((?:`\w+`(?: or )?)+)", step)
        assert places, step
        for path, names in places:
            for name in re.findall(r"`(\w+)`", names):
                defined = rf"\b{name}\(|\b{name} *=|def {name}\b"
                assert re.search(defined, (ROOT / path).read_text()), (path, name)


def test_the_table_of_figures() -> None:
    def result(ratio: float) -> dict[str, dict[str, float]]:
        return {
            "seconds": {"median": 0.029, "q1": 0.028, "q3": 0.03},
            "of_limit": {"median": 0.925},
            "vs_ours": {"median": ratio},
        }

    names = ("ours", "stock", "stock-compiled", "torch-foreach", "torch-loop")
    results = {name: result(1.04 + i) for i, name in enumerate(names)}
    cases = [{"name": x, "title": "a title", "results": results} for x in "ab"]
    table = figures.table(cases)
    for name in "ab":
        row = next(x for x in table.splitlines() if x.startswith(f"| {name}: a title"))
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        assert cells[:5] == ["29.0 ms ±3%", "0.93", "2.04x", "3.04x", "4.04x"]
        assert cells[5:] == ["not measured"] * 2


def test_pre_commit_has_the_versions_of_the_lint_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    [extra] = re.findall(r"^lint = (\[.*\])$", text, re.M)
    wanted = set(re.findall(r'"([^"]+)"', extra))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = set(re.findall(r"[\w-]+==[\w.]+", hooks))
    assert {x for x in found if not x.startswith("mlx==")} == wanted
    assert {x for x in found if x.startswith("mlx==")} <= set(
        re.findall(r'"(mlx==[\w.]+);', text)
    )
