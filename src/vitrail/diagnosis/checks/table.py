"""THE table of checks. To add one: a function in diagnosis/checks/ and a row here."""

from collections.abc import Callable

from vitrail.diagnosis.checks import copies, files, labels, pixels
from vitrail.diagnosis.findings import Evidence, Finding

Check = Callable[[Evidence], list[Finding]]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("unreadable", files.unreadable),
    ("unreadable", files.suspicious),
    ("exact_duplicate", copies.exact_duplicate),
    ("near_duplicate", copies.near_duplicate),
    ("leak", copies.leak),
    ("conflicting_label", copies.conflicting_label),
    ("suspect_label", labels.suspect_label),
    ("odd_size", pixels.odd_size),
    ("dark", pixels.dark),
    ("bright", pixels.bright),
    ("blurry", pixels.blurry),
    ("low_information", pixels.low_information),
    ("low_information", pixels.grey_among_colour),
    ("imbalance", labels.imbalance),
    ("tiny_class", labels.tiny_class),
)
