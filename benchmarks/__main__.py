"""Every benchmark that takes minutes, one after the other: `python -m benchmarks`. Keep the machine otherwise idle."""

import argparse
import subprocess
import sys
from pathlib import Path

SUPPORT = {"__init__", "__main__", "measure", "oracles", "peers", "planted_evidence"}
APART = {
    "amp_widths",
    "comparison",
    "distillation",
    "explain",
    "optimizers",
    "small_recipe",
}  # run by themselves: for one processor, or of hours

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name in sorted(path.stem for path in Path(__file__).parent.glob("*.py")):
        if name not in SUPPORT | APART:
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
