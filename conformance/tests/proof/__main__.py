"""The proof: wrong references must die, right ones must live.

python conformance/tests/proof kill   [--operator NAME] [--only TEXT] [--seeds N]   what the judge alone says
python conformance/tests/proof alarm  [--operator NAME] [--only TEXT] [--seeds N]   right variants
python conformance/tests/proof matrix [--operator NAME] [--only TEXT] [--json FILE] which check kills which mutant
(--sample N: so many of each operator)
"""

import argparse
import json
import sys
import time
from pathlib import Path

import harness
from faults import FAULTS


def main() -> None:
    """Print what was killed, what survived, and what was a false alarm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "alarm", "matrix"))
    parser.add_argument("--operator")
    parser.add_argument("--only", default="")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lists = {"kill": ("mutants", "MUTANTS"), "alarm": ("right", "RIGHT"), "matrix": ("mutants", "MUTANTS")}
    entries = harness.listed(*lists[options.what])
    if options.sample is not None:
        entries = harness.sample(entries, options.sample)
    entries += FAULTS if options.what == "matrix" else []
    entries = [e for e in entries if options.operator in (None, e.operator) and options.only in e.name]
    if options.what == "matrix":
        matrix(entries, options.json)
        return
    flagged = trials = 0
    for entry in entries:
        start, function, problem = time.perf_counter(), entry.load(), None
        for seed in range(options.seeds):
            trials += harness.trials(entry.operator)
            problem = problem or harness.first_problem(function, entry.operator, seed)
        flagged += problem is not None
        word = {"kill": ("SURVIVES", "killed"), "alarm": ("lives", "FALSE ALARM")}[options.what][problem is not None]
        print(f"{word:11} {entry.operator}.{entry.name} ({time.perf_counter() - start:.2f} s): {problem}", flush=True)
    print(f"{flagged} of {len(entries)} flagged, {options.seeds} seeds, {trials} trials")


def matrix(entries: list, target: Path | None) -> None:
    """Run every check on every wrong kernel; print the matrix and the rates."""
    rows = {}
    for entry in entries:
        start = time.perf_counter()
        rows[f"{entry.operator}.{entry.name}"] = found = harness.killers(entry)
        equivalent = getattr(entry, "equivalent", "")
        word = "killed" if found else "EQUIVALENT" if equivalent else "SURVIVES"
        print(
            f"{word:11} {entry.operator}.{entry.name} ({time.perf_counter() - start:.1f} s): {', '.join(found)}",
            flush=True,
        )
    due = [e for e in entries if not getattr(e, "equivalent", "")]
    killed = [e for e in due if rows[f"{e.operator}.{e.name}"]]
    print(f"\n{len(killed)} of {len(due)} wrong kernels killed; {len(entries) - len(due)} equivalent ones listed")
    for check in harness.CHECKS:
        by = [name for name, found in rows.items() if check in found]
        alone = [name for name in by if len(rows[name]) == 1]
        print(f"  {check:22} kills {len(by):4}, alone {len(alone):3}  {', '.join(alone[:3])}")
    if target is not None:
        target.write_text(json.dumps(rows, indent=1))
    sys.exit(len(killed) < len(due))


if __name__ == "__main__":
    main()
