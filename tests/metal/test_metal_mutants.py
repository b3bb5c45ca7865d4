"""What docs/metal.md says of the seeded bugs is said of the present code."""

import pytest
from host_metal.bugs import BUGS, DOCUMENT, FILES, RECORD, ROOT, digest


@pytest.mark.parametrize("name", FILES)
def test_bug_can_be_seeded(name: str) -> None:
    text = (ROOT / FILES[name]).read_text()
    assert BUGS[FILES[name]][name].seed(text) != text


def test_record_is_not_stale() -> None:
    record = RECORD.search((ROOT / DOCUMENT).read_text())
    assert record is not None
    assert record[1] == digest(), "take it again: tests/host_metal/mutants.py"
    assert record[2].startswith(f"All {len(FILES)} are seen.")
