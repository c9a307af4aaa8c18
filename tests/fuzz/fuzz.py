"""All parsers under atheris, as many side by side as there are processors: make fuzz [SECONDS=60]
[PARSERS="pickle zip"].

What was found to lead far into a parser stays in `.fuzz/`, so that the next run goes on from there;
so does the input of a finding, which is to become a fixture. The exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from parsers import PARSERS

HERE = Path(__file__).parent
KEPT = HERE.parent.parent / ".fuzz"
LAST_LINES = 40


@dataclass(frozen=True, slots=True)
class Run:
    """What one child did: the parser, how many inputs it tried, and what it said if there is a
    finding.
    """

    parser: str
    inputs: int
    finding: str


def run(parser: str, seconds: int) -> Run:
    """Fuzz *parser* for so many *seconds*."""
    command = [
        sys.executable,
        str(HERE / "guided.py"),
        parser,
        str(KEPT / parser),
        f"-max_total_time={seconds}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    tried = [int(count) for count in re.findall(r"^#(\d+)\t", done.stderr, re.MULTILINE)]
    finding = (
        "\n".join((done.stdout + done.stderr).splitlines()[-LAST_LINES:]) if done.returncode else ""
    )
    return Run(parser, max(tried, default=0), finding)


def main() -> int:
    """Fuzz the parsers that the command line names, for the seconds that it gives to all of them
    together.
    """
    line = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    line.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(PARSERS))
    line.add_argument("--seconds", type=int, default=60, help="for all of them together")
    given = line.parse_args()
    parsers = given.parsers or list(PARSERS)
    if unknown := set(parsers) - PARSERS.keys():
        line.error(f"there is no parser {', '.join(unknown)}")
    if find_spec("atheris") is None:
        print(
            "fuzzing is skipped: atheris is not installed (pip install 'shardkit[fuzz]'; it is "
            "for Linux on x86-64)"
        )
        return 0
    together = min(len(parsers), os.cpu_count() or 1)
    seconds = max(1, given.seconds * together // len(parsers))
    with ThreadPoolExecutor(together) as pool:
        runs = list(pool.map(lambda parser: run(parser, seconds), parsers))
    for each in runs:
        print(
            f"{each.parser:12} {each.inputs:>9,} inputs  "
            f"{'A FINDING' if each.finding else 'read, or refused with a sentence'}"
        )
    print(*(f"\n{each.parser}:\n{each.finding}" for each in runs if each.finding), sep="")
    return any(each.finding for each in runs)


if __name__ == "__main__":
    sys.exit(main())
