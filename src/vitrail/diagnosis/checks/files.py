"""Files that cannot be read, or that are not what their names say."""

from vitrail.diagnosis.findings import Evidence, Finding, of_groups, tally


def unreadable(evidence: Evidence) -> list[Finding]:
    """Files that cannot be decoded. A warning: training and evaluation leave them out and name them."""
    found = evidence.scan.unreadable
    if not found:
        return []
    advice = f"These files are left out ({tally(each['reason'] for each in found)}). Replace or remove them."
    notes = {each["path"]: each["reason"] for each in found}
    return [Finding("unreadable", "warning", len(found), [[path] for path in notes], advice, notes=notes)]


def suspicious(evidence: Evidence) -> list[Finding]:
    """Files that can be decoded, but contradict their names, are animations, or have no end."""
    odd = evidence.scan.odd
    advice = (
        "These files can be read, but are suspicious: see the reason of each. A false extension misleads other tools."
    )
    notes = {evidence.scan.path(i): reason for i, reason in odd.items()}
    return of_groups(evidence.scan, "unreadable", "note", [[i] for i in odd], advice, notes=notes)
