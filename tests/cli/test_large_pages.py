"""On Linux, the command line has PyTorch ask for large pages."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CODE = """
import resource
from vitrail.cli import main
try:
    main(["--version"])
except SystemExit:
    pass
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(12 << 20).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not _SETTING.exists() or "[madvise]" not in _SETTING.read_text() or resource.getpagesize() != 4096,
    reason="this machine gives no large pages on request",
)
def test_a_large_tensor_does_not_come_in_small_pages() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 6000  # 12,288 pages of 4 KiB otherwise
