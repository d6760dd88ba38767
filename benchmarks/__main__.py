"""Every benchmark that takes minutes, one after the other: `python -m benchmarks`. Keep the machine otherwise idle."""

import subprocess
import sys
from pathlib import Path

SUPPORT = {"__init__", "__main__", "measure", "oracles", "peers"}
HOURS = {"distillation", "small_recipe"}  # they train many models; run them by themselves

if __name__ == "__main__":
    for name in sorted(path.stem for path in Path(__file__).parent.glob("*.py")):
        if name not in SUPPORT | HOURS:
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
