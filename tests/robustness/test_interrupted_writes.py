"""SIGKILL and a full disk while the last checkpoint of a run is written, and two processes that write one run: each 20
times, and what the run leaves in the end is bit for bit that of an undisturbed one.

Each case is a process of its own, forked from one that has imported PyTorch.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DRIVER = """
import errno, itertools, os, shutil, signal, sys, traceback
from pathlib import Path
sys.path.insert(0, {tests!r})
from training import tiny
from training.runs import KEYS, assert_same, outcome, run
from vitrail.errors import RunError
from vitrail.training.run import train
from vitrail.training.session import Session

tiny.VARIANTS[tiny.VARIANT.name] = tiny.VARIANT
base = Path({base!r})

def forked(work):
    '''The wait status of a child that runs `work`; with exit status 3 for a RunError.'''
    child = os.fork()
    if not child:
        try:
            work()
        except RunError:
            os._exit(3)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

def wait(child):
    return os.waitpid(child, 0)[1]

def disturb(number, act):
    '''While the last checkpoint is written, call `act` instead of call `number` of what changes the disk. Returns the
    list of these calls.'''
    calls, save = [], Session.save
    names = [(os, "fsync"), (os, "open"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text")]
    if act is kill:
        names.append((shutil, "rmtree"))  # which needs no space
    def counted(original):
        def call(*arguments, **options):
            calls.append(original.__name__)
            if len(calls) == number:
                act()
            return original(*arguments, **options)
        return call
    def last_save(self):
        if not self.trainer.schedule.finished(self.trainer.state.steps, self.trainer.state.spent):
            return save(self)
        for place, name in names:
            setattr(place, name, counted(getattr(place, name)))
        save(self)
        calls.append("end")
    Session.save = last_save
    return calls

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

act, expected = (full, 3) if {what!r} == "full disk" else (kill, -signal.SIGKILL)
assert wait(forked(lambda: run(base / "reference"))) == 0
reference = outcome(base / "reference")

def count():
    calls = disturb(0, act)
    run(base / "counted")
    (base / "calls").write_text(str(calls.index("end")))

assert wait(forked(count)) == 0
points = int((base / "calls").read_text())
assert points >= 8, points
same = 0
for k in range(20):
    folder = base / f"run{{k}}"
    if {what!r} == "two writers":
        children = [forked(lambda: run(folder)) for _ in range(2)]
        statuses = sorted(os.waitstatus_to_exitcode(wait(child)) for child in children)
        assert statuses == [0, 3], statuses
    else:
        def work():
            disturb(1 + k * points // 20, act)
            run(folder)
        status = os.waitstatus_to_exitcode(wait(forked(work)))
        # An error in the removal of what is no longer needed is ignored.
        assert status == expected or (act is full and status == 0), (k, status)
        if status:
            assert wait(forked(lambda: train(tiny.dataset(), resume=folder, progress=False))) == 0
    assert_same(outcome(folder), reference)
    same += 1
print(f"{{same}} of 20 bit-identical, {{points}} calls")
"""


@pytest.mark.parametrize("what", ["kill", "full disk", "two writers"])
def test_twenty_times(what: str, tmp_path: Path) -> None:
    code = DRIVER.format(tests=str(Path(__file__).parents[1]), base=str(tmp_path), what=what)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("20 of 20 bit-identical")
