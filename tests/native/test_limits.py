"""Memory, threads and other tasks that fail, and arrays of more than 2^32 elements.

The tests are in C++ (limits.cpp and large.cpp in host_metal), which can do what Python
cannot: make any single allocation fail, and map an array of 8 GiB to a few megabytes.
"""

import subprocess
import sys

import pytest
from host_metal import build

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="tests/host_metal is built on Linux"
)

ELEMENTS = 65537 * 65539  # more than 2^32


def run(name: str, *arguments: str) -> list[list[str]]:
    """The words of each line of output; fails where anything is not as it should be."""
    build.build(f"limits/{name}")
    program = build.ROOT / build.BUILD / "limits" / name
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("device", ["cpu", "metal"])
def test_every_allocation_of_an_evaluation_fails_once(device: str) -> None:
    """A clear error, nothing written, nothing lost, and evaluating again completes."""
    lines = run("limits", "faults", device)
    assert len(lines) == 8
    assert all(kind == "faults" for kind, *_ in lines)
    # Fewer is no fault, but some thousand have to be seen.
    assert sum(int(count) for *_, count in lines) > 2500


def test_errors_of_other_tasks_wherever_they_are_reported() -> None:
    """None is lost, and what was asked for is done once."""
    lines = run("limits", "errors")
    assert len(lines) == 8
    assert all(kind == "errors" for kind, *_ in lines)
    assert sum(int(count) for *_, count in lines) > 2500


@pytest.mark.parametrize("count", ["0", "1", "3"])
def test_a_system_that_starts_some_threads_only(count: str) -> None:
    assert run("limits", "threads", count) == [["threads", count]]


def test_threads_without_memory() -> None:
    """A helper does not help; the stream's own thread reports it. Nobody hangs."""
    assert run("limits", "helpers") == [["helpers", "pool"], ["helpers", "stream"]]


def test_wrong_arguments_from_cpp() -> None:
    assert run("limits", "refusals") == [["refusals", "15"]]


def expected(device: str) -> list[list[str]]:
    return [["large", device, kind, str(ELEMENTS)] for kind in ("linear", "transposed")]


def test_both_ends_of_a_large_grid() -> None:
    """Of Metal's threadgroups, those that hold the corners of the matrix."""
    assert run("large", "metal", "4500") == expected("metal")


@pytest.mark.long
def test_every_element_of_a_large_array() -> None:
    assert run("large", "cpu") == expected("cpu")
