"""Kills a child process at every system call of one scenario in turn, and prints what was left and
wrong after each, as JSON.

python tests/crash/killer.py FOLDER SCENARIO STEP
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

from failer import Sweep
from injection import Layer, killing
from scenarios import SCENARIOS, Case, main_folder, stamps

LAST = 45
HUNG = 200  # seconds after which a child says where it is, and ends
# calls that a run of several jobs may make or not, as when two of them ask at once what a file
# system can do
RACED = 3


def killed_at(case: Case, number: int) -> bool:
    """Whether the run of *case* was killed at that call; false where it made fewer."""
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(HUNG, exit=True)
        error = case.strike(Layer(case.work, number, killing))
        os._exit(2 if error else 0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise AssertionError(f"call {number}: the run failed, and was to be killed")
    return os.WIFSIGNALED(status)


def numbers(case: Case, step: int) -> list[int]:
    """Every *step*-th call of *case*, and each of the last, where the output is put in place."""
    case.reset()
    layer = Layer(case.work)
    assert case.strike(layer) is None
    count = len(layer.calls)
    return [number for number in range(count) if number % step == 0 or number >= count - LAST]


def main(base: Path, name: str, step: int) -> None:
    """Kill at every *step*-th call of the scenario called *name*, and at each of the last."""
    case = Case.at(main_folder(base, name), next(each for each in SCENARIOS if each.name == name))
    before = stamps(case.source)
    sweep = Sweep()
    struck = numbers(case, step)
    for number in struck:
        case.reset()
        if not killed_at(case, number):
            if number <= struck[-1] - RACED:
                raise AssertionError(f"the run made no call {number}")
            continue
        sweep.left[case.left()] += 1
        sweep.faults += [
            f"killed at call {number}: {fault}" for fault in case.faults(before, killed=True)
        ]
    print(sweep.dump())  # noqa: T201 - to the program that started us


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
