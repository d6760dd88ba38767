"""Draw the pictures of docs/explanations by running the code of its pages: draw_docs.py [PAGE ...]; takes minutes."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from doc_blocks import read_blocks

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(pages: list[str]) -> None:
    """Run the blocks of each page in a temporary folder, and copy its pictures to docs/images."""
    paths = [Path(page).resolve() for page in pages] or sorted((DOCS / "explanations").glob("*.md"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for page in paths:
            names: dict[str, object] = {}
            for block in read_blocks(page):
                if block.language == "python":
                    exec(block.code(), names)
                for line in block.text.splitlines() if block.language == "sh" else ():
                    words = shlex.split(line, comments=True)
                    made = "--out" in words and Path(words[words.index("--out") + 1]).exists()
                    if words[:2] == ["vitrail", "train"] and not made:
                        subprocess.run([sys.executable, "-m", *words], check=True)
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, DOCS / "images" / picture.name)
            print(DOCS / "images" / picture.name)


if __name__ == "__main__":
    main(sys.argv[1:])
