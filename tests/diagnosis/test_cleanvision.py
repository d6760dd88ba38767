"""Every kind of fault that cleanvision finds is found."""

import pytest
from benchmarks.planted_faults import CHECKS, agreement, photographs

pytest.importorskip("cleanvision")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return agreement(photographs(), tmp_path_factory.mktemp("cleanvision") / "photos", 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
def test_what_cleanvision_finds_is_found(found, kind):
    """But for images of one colour, which it takes for near duplicates of each other; they are low_information."""
    each = found[kind]
    assert each["planted_found_by_cleanvision"] >= 1, "the test shows nothing where cleanvision finds nothing"
    assert each["planted_found"] == each["planted"]
    assert [name for name in each["missed"] if "low_information" not in name] == []
