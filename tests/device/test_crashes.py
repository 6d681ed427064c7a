"""A device that is killed at any moment, or whose disk stops at any write: one charge per release, and no more.

A small child does the step of ``release`` alone, forked from a process that has imported everything. What its answer
would be sent over is a file; a line in it has left the device.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from fed_dpsat.accounting import PrivacyEvent, PrivacyLedger, epsilon
from fed_dpsat.device.release import CLIENT, journal_path, ledger_path, prepare

EVENT = PrivacyEvent(noise_multiplier=5.0, sample_rate=1.0, steps=1)
DELTA = 1e-5

COMMON = """
import ctypes, hashlib, json, os, random, signal, sys, time
from pathlib import Path
from fed_dpsat.device.journal import Refusal, Request
from fed_dpsat.device.release import release
from fed_dpsat.accounting import LedgerError, PrivacyEvent, epsilon

folder, budget = Path(sys.argv[1]), float(sys.argv[2])
wire = os.open(folder.parent / "wire", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
event = PrivacyEvent(noise_multiplier=5.0, sample_rate=1.0, steps=1)

def step(round):
    digest = hashlib.sha256(str(round).encode()).digest()
    request = Request(run="1", round=round, attempt=0, settings=b"s", digest=digest)
    try:
        reply = release(folder, request, event, epsilon=budget, delta=1e-5,
                        compute=lambda state: (os.urandom(8), os.urandom(3000)))
    except Refusal as refusal:
        return 3 if "budget" in str(refusal) else 4
    except LedgerError:
        return 5
    os.write(wire, f"{round} {reply.hex()}\\n".encode())
    return 0

def child(round, before=lambda: None):
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            before()
            code = step(round)
        finally:
            os._exit(code)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

epsilon([event], 1e-5)  # imports what the children would
"""

KILLS = (
    COMMON
    + """
rng, kills, round, codes = random.Random(int(sys.argv[3])), 0, 1, []
began = time.perf_counter()
ended(child(round))
usual = time.perf_counter() - began
while kills < 200:
    pid = child(round)
    time.sleep(rng.uniform(0, 1.2 * usual))
    os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    codes.append(code)
    kills += code == -signal.SIGKILL
    # the server asks again, or gives up, or gets its answer and goes on, or asks what it asked long ago
    if rng.random() < (0.4 if code else 0.7):
        round += 1
    if rng.random() < 0.1:
        codes.append(ended(child(rng.randint(1, round))))
while codes[-1] != 3:  # on until the budget is spent
    round += 1
    codes.append(ended(child(round)))
print(json.dumps(codes))
"""
)

WRITES = (
    COMMON
    + """
fault = ctypes.CDLL(None)
mode, found = int(sys.argv[3]), []
ended(child(1))
for n in range(1, 10_000):
    round = 1 + n
    first = ended(child(round, lambda: fault.arm(mode, n)))
    again = ended(child(round))
    found.append((first, again))
    if first == 0:
        break
print(json.dumps(found))
"""
)


def run(script: str, folder: Path, *arguments: object, preload: Path | None = None) -> list:
    environment = {**os.environ, **({"LD_PRELOAD": str(preload), "FAULT_FOLDER": str(folder)} if preload else {})}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(folder: Path, budget: float) -> tuple[int, int]:
    """One answer per question, one charge per answer, no question charged twice; ``(charges, questions answered)``."""
    answers: dict[int, set[str]] = collections.defaultdict(set)
    for line in (folder.parent / "wire").read_text().splitlines():
        round, reply = line.split()
        answers[int(round)].add(reply)
    assert all(len(found) == 1 for found in answers.values())
    assert len({reply for found in answers.values() for reply in found}) == len(answers)
    journal = sqlite3.connect(journal_path(folder))
    numbers = dict(journal.execute("SELECT round, number FROM requests"))
    journal.close()
    with PrivacyLedger(ledger_path(folder), readonly=True) as ledger:
        ledger.verify()
        for round in answers:
            assert ledger.outcome(CLIENT, numbers[round], 0) == "released"
        assert len(set(numbers.values())) == len(numbers)
        assert ledger.head.charges <= len(numbers)
        assert epsilon(ledger.history(CLIENT), DELTA) <= budget
        return ledger.head.charges, len(answers)


@pytest.fixture
def folder(tmp_path):
    prepare(tmp_path / "device")
    return tmp_path / "device"


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    """The library that stops the file system."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("fault") / "fault.so"
    source = Path(__file__).with_name("fault.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.mark.slow
def test_200_random_kills(folder):
    rounds = 110
    budget = epsilon([EVENT] * rounds, DELTA)
    codes = collections.Counter(run(KILLS, folder, budget, 1))
    assert codes[-9] >= 200
    assert codes[3] > 0  # the budget was spent, and then refused
    assert set(codes) <= {0, 3, 4, -9}  # a kill never breaks what comes after it
    charges, answered = check(folder, budget)
    assert charges == rounds
    assert answered > rounds // 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", [1, 2], ids=["at the write", "in the middle of it"])
def test_a_kill_at_each_write(folder, fault, mode):
    found = run(WRITES, folder, 1e6, mode, preload=fault)
    assert len(found) > 20
    assert {first for first, _ in found[:-1]} == {-9}
    assert {again for _, again in found} == {0}
    charges, answered = check(folder, 1e6)
    assert charges == answered == len(found) + 1  # each question was charged once, and had its answer in the end


@pytest.mark.slow
def test_a_disk_that_is_full_from_each_write_on(folder, fault):
    found = run(WRITES, folder, 1e6, 3, preload=fault)
    assert len(found) > 20
    assert {first for first, _ in found[:-1]} == {5}  # an error in words, and no answer
    assert {again for _, again in found} == {0}
    charges, answered = check(folder, 1e6)
    assert charges == answered == len(found) + 1
