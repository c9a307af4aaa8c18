"""Makes every system call of one scenario fail in turn, and prints as JSON what was left and what
was wrong after any of them.

python tests/crash/failer.py FOLDER SCENARIO ERRNO [writes|reads]
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from injection import READS, WRITES, Layer, Strike, failing
from scenarios import SCENARIOS, Case, main_folder, stamps


@dataclass
class Sweep:
    """What came of striking a scenario at one call after the other.

    Attributes:
        faults: whatever was wrong, in words.
        left: how often which output was left, as `Case.left` has it.
    """

    faults: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    @property
    def points(self) -> int:
        return self.left.total()

    def dump(self) -> str:
        """All of it as JSON."""
        return json.dumps({"points": self.points, "left": self.left, "faults": self.faults})


def struck(case: Case, strike: Strike, *, reads: bool = False, step: int = 1) -> Sweep:
    """Strike every *step*-th call of *case* in turn: those that write, or those that read its
    source, which fails then for good.
    """
    before, sweep = stamps(case.source), Sweep()
    for number in range(0, 10_000, step):
        case.reset()
        if reads:
            layer = Layer(case.source, number, strike, watched=READS, lasting=True)
        else:
            layer = Layer(case.work, number, strike, watched=WRITES)
        try:
            error = case.strike(layer)
        except OSError as bare:
            sweep.faults.append(f"call {number}, {layer.struck}: a bare {bare!r} came out")
            error = None
        if layer.struck is None:
            return sweep
        if error is not None and len(str(error)) < 20:
            sweep.faults.append(f"call {number}, {layer.struck}: no sentence: {error}")
        sweep.left[case.left()] += 1
        sweep.faults += [
            f"call {number}, {layer.struck}: {fault}" for fault in case.faults(before, killed=False)
        ]
    raise AssertionError("it never ends")


def main(base: Path, name: str, number: int, which: str = "writes") -> None:
    """Let each call of the scenario called *name* fail with the errno *number*."""
    scenario = next(each for each in SCENARIOS if each.name == name)
    case = Case.at(main_folder(base, f"{name}-{os.strerror(number)}-{which}"), scenario)
    print(struck(case, failing(number), reads=which == "reads").dump())  # noqa: T201 - to the program that started us


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
