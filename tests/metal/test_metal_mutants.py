"""The table of seeded bugs in docs/metal.md is of the present code."""

from __future__ import annotations

import pytest
from host_metal import build
from host_metal.mutants import DOCUMENT, MUTANTS, RECORD, digest


@pytest.mark.parametrize("name", MUTANTS)
def test_bug_can_be_seeded(name: str) -> None:
    mutant = MUTANTS[name]
    text = (build.ROOT / mutant.file).read_text()
    assert mutant.seed(text) != text


def test_table_is_not_stale() -> None:
    record = RECORD.search((build.ROOT / DOCUMENT).read_text())
    assert record is not None
    taken_of, table = record.groups()
    rows = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert rows == list(MUTANTS)
    assert taken_of == digest(), "take it again: tests/host_metal/mutants.py --write"
