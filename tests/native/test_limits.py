"""Memory, threads and other tasks that fail, and arrays of more than 2^32 elements.

The tests are programs in C++ (host_metal/*.cpp), which can do what Python cannot: make
any single allocation fail, and map an array of 8 GiB to a few megabytes.
"""

import subprocess
import sys

import psutil
import pytest
from host_metal import build

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="tests/host_metal is built on Linux"
)


def run(name: str, *arguments: str) -> list[list[str]]:
    """The words of each line of output; fails where anything is not as it should be."""
    build.build(f"programs/{name}")
    program = build.ROOT / build.BUILD / "programs" / name
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("what", ["cpu", "metal", "errors"])
def test_every_allocation_of_an_evaluation_fails_once(what: str) -> None:
    """A clear error, nothing written, nothing lost, and evaluating again completes.
    With "errors" another task's error is reported at each allocation instead."""
    lines = run("faults", what)
    assert len(lines) == 8
    # Fewer is no fault, but some thousand have to be seen.
    assert sum(int(count) for _, count in lines) > 2500


@pytest.mark.parametrize("count", ["0", "1", "3"])
def test_a_system_that_starts_some_threads_only(count: str) -> None:
    run("threads", count)


def test_threads_without_memory() -> None:
    """A helper does not help; the stream's own thread reports it. Nobody hangs."""
    run("threads", "memory")


def test_helpers_run_ahead_of_the_stream() -> None:
    """A stream without memory then finds the group done, and reports nothing."""
    run("threads", "ahead")


def test_wrong_arguments_from_cpp() -> None:
    run("refusals")


# What Linux lends a process at once: no more than the machine has.
lent = psutil.virtual_memory().total + psutil.swap_memory().total
large = pytest.mark.skipif(lent < 9 * 2**30, reason="needs 8 GiB of addresses")


@large
def test_both_ends_of_a_large_grid() -> None:
    """Of Metal's threadgroups, those that hold the corners of the matrix."""
    run("large", "metal", "4500")


@large
@pytest.mark.long
def test_every_element_of_a_large_array() -> None:
    run("large", "cpu")
