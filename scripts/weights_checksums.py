"""Ask the Hugging Face Hub for the sha256 of published weights and write them into `published.csv`.

    python scripts/weights_checksums.py                  # rows that have none
    python scripts/weights_checksums.py --all "deit*"    # these models' rows; a checksum that has changed is told

The hub states the sha256 of every large file, so nothing is downloaded. From then on a download of that row is refused
unless it has this checksum. HF_ENDPOINT names another hub.
"""

import argparse
import csv
import io
import os
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi

import vitrail
from vitrail.pretrained.local import choose_weights
from vitrail.utils.files import atomic_write_text

TABLE = Path(vitrail.__file__).parent / "weights" / "published.csv"


def hub_sha256(repo: str) -> str:
    """The sha256 of the file that `--weights` would take from this repository."""
    info = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(repo, files_metadata=True, timeout=10)
    files = {entry.rfilename: entry.lfs for entry in info.siblings or ()}
    name = choose_weights(files, f"hf:{repo}")
    large = files[name]
    if large is None:
        raise ValueError(f"hf:{repo} states no sha256 for {name}")
    return large.sha256


def fill(table: Path, pattern: str = "*", again: bool = False) -> list[str]:
    """Fill the column of one table; a line for each row that was asked for."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    told = []
    for row in rows:
        if row["source"] != "hf:timm" or not fnmatchcase(row["model"], pattern) or (row["sha256"] and not again):
            continue
        name = f"{row['model']}.{row['tag']}"
        try:
            found = hub_sha256(f"timm/{name}")
        except Exception as error:  # one repository that cannot be had must not keep the others
            told.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        told.append(f"{name}: {found}" + (f", was {row['sha256']}" if row["sha256"] not in ("", found) else ""))
        row["sha256"] = found
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(table, text.getvalue())
    return told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="*", help="models whose rows are asked for")
    parser.add_argument("--all", action="store_true", help="also rows that have a checksum")
    arguments = parser.parse_args()
    print("\n".join(fill(TABLE, arguments.pattern, arguments.all)))
