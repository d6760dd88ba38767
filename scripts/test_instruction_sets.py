"""Run the quick tests under each of the CPU's instruction sets.

`python scripts/test_instruction_sets.py [SET...] [-- PYTEST ARGUMENTS...]`

PyTorch's own kernels follow ATEN_CPU_CAPABILITY, oneDNN's (convolutions, linear layers) ONEDNN_MAX_CPU_ISA. Both only
restrict: a set that this CPU lacks is left out. What follows `--` goes to pytest. Exits 1 if a test fails.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

# Name: ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, and the flags of /proc/cpuinfo that they need.
SETS: dict[str, tuple[str, str, set[str]]] = {
    "default": ("default", "SSE41", {"sse4_1"}),
    "avx2": ("avx2", "AVX2", {"avx2", "fma"}),
    "avx512": ("avx512", "AVX512_CORE", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx512_vnni": ("avx512", "AVX512_CORE_VNNI", {"avx512f", "avx512_vnni"}),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", {"avx512f", "avx512_bf16"}),
    "amx": ("avx512", "AVX512_CORE_AMX", {"avx512f", "amx_tile", "amx_bf16"}),
}
PYTEST = ["-q", "-m", "not slow and not gpu", "-n", "2", "--dist", "loadfile"]


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line.split() for line in lines if line.startswith("flags")), []))


def run_tests(name: str, extra: list[str]) -> tuple[str, bool]:
    """A row of the table, and whether all tests passed."""
    aten, onednn, _ = SETS[name]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn}
    begin = time.perf_counter()
    command = [sys.executable, "-m", "pytest", *PYTEST, *extra]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(line)
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", lines[-1] if lines else "")
    if done.returncode and not counts:
        print(done.stdout)
    row = f"{name:12} {aten:10} {onednn:18} {time.perf_counter() - begin:6.0f} s  {', '.join(counts)}"
    return row, done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"{', '.join(SETS)}; by default all that this CPU has")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    asked, extra = parser.parse_args(words[:end]).sets, words[end + 1 :]
    if unknown := set(asked) - SETS.keys():
        parser.error(f"unknown instruction sets {', '.join(sorted(unknown))}: choose from {', '.join(SETS)}")
    flags = cpu_flags()
    available = [name for name, (_, _, needed) in SETS.items() if needed <= flags]
    if missing := [name for name in asked if name not in available]:
        parser.error(f"this CPU does not have {', '.join(missing)}")
    rows, passed = [], True
    for name in asked or available:
        print(f"== {name}", flush=True)
        row, good = run_tests(name, extra)
        rows.append(row)
        passed &= good
    print(f"\n{'set':12} {'PyTorch':10} {'oneDNN':18} {'time':>8}  tests", *rows, sep="\n")
    if absent := [name for name in SETS if name not in available]:
        print(f"not on this CPU: {', '.join(absent)}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
