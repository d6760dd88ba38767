"""Copies: within a split, across splits, and under two labels."""

from vitrail.diagnosis.findings import Evidence, Finding, of_groups


def exact_duplicate(evidence: Evidence) -> list[Finding]:
    """Equal files, or files with equal pixels."""
    advice = "The same image several times: it counts several times in training and in every figure. Keep one of each."
    return of_groups(evidence.scan, "exact_duplicate", "warning", evidence.duplicates.exact, advice)


def near_duplicate(evidence: Evidence) -> list[Finding]:
    """Images that were resized, recompressed, mirrored, turned or cropped."""
    advice = (
        "Copies that were resized, recompressed, mirrored, turned or cropped. Keep one of each, or keep a group on one "
        "side of a split: group_duplicates=true does so where the split is drawn."
    )
    return of_groups(evidence.scan, "near_duplicate", "warning", evidence.duplicates.near, advice)


def leak(evidence: Evidence) -> list[Finding]:
    """Copies in two splits. An error: the accuracy on a test image that was trained on says nothing."""
    scan = evidence.scan
    groups = [group for group in evidence.duplicates.every if len({int(scan.splits[i]) for i in group}) > 1]
    if all(len({scan.home(i) for i in group}) < 2 for group in groups):
        remedy = (
            "The split was drawn: keep one of each, or train with group_duplicates=true, which keeps copies together."
        )
    else:
        remedy = "Remove them from the training images, or move them to the split of their copies."
    advice = f"The same image in two splits: accuracy would be measured on images that were trained on. {remedy}"
    notes = {scan.path(i): scan.split_names[scan.splits[i]] for group in groups for i in group}
    return of_groups(scan, "leak", "error", groups, advice, notes=notes)


def conflicting_label(evidence: Evidence) -> list[Finding]:
    """The same image under two labels. An error: one of them is wrong, and is counted as right or as wrong."""
    scan = evidence.scan
    groups = [group for group in evidence.duplicates.every if len({int(scan.labels[i]) for i in group}) > 1]
    advice = "The same image, or a copy of it, under two labels: at least one is wrong. Decide, and remove the other."
    notes = {scan.path(i): scan.label(i) for group in groups for i in group}
    return of_groups(scan, "conflicting_label", "error", groups, advice, notes=notes)
