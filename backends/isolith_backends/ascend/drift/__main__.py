"""python -m isolith_backends.ascend.drift --venv DIR [--calls] [--refresh]"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import isolith
from isolith_backends import ascend
from isolith_backends.ascend.drift import read, schemas, stand_ins
from isolith_backends.ascend.drift.calls import AGREES, NO_META, between
from isolith_backends.ascend.vendor import soc

AGREED, DIFFERS, NOT_LOOKED_AT = 0, 1, 2
FILE = Path(ascend.__file__).parent / "schemas.json"
FAMILIES = ("a2", "a3", "a5")
INSTALL = "make it by the commands of `isolith_backends/ascend/drift/__init__.py`"
WHERE = "import importlib.util; print(importlib.util.find_spec('torch_npu').submodule_search_locations[0])"


class NotLookedAtError(Exception):
    """Why nothing could be compared."""


class Environment:
    """A virtual environment that has torch_npu, and a folder for the stand-ins of CANN's libraries."""

    def __init__(self, venv: Path, folder: Path) -> None:
        self.python, self.folder = venv / "bin" / "python", folder
        if not self.python.exists():
            raise NotLookedAtError(f"{venv} is no virtual environment; {INSTALL}")
        try:
            package = Path(self.run(["-c", WHERE], "TORCH_DEVICE_BACKEND_AUTOLOAD=0").strip())
            stand_ins.build(package, folder)
        except OSError as error:
            raise NotLookedAtError(f"a C compiler and nm are needed: {error}") from None
        except subprocess.CalledProcessError as error:
            raise NotLookedAtError(f"{error.cmd[0]}: {error.stderr}") from None

    def run(self, words: Sequence[str], *variables: str) -> str:
        """What its Python prints."""
        command = ["env", *variables, str(self.python), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-12:]
            raise NotLookedAtError("\n".join((f"{self.python} failed; has it torch, pluggy and torch_npu?", *last)))
        return done.stdout

    def written(self, words: Sequence[str], family: str) -> Any:  # Any: JSON
        """The JSON that a program of ours writes there, on a chip of the family."""
        target = self.folder / "written.json"
        roots = {Path(module.__file__ or "").parents[1] for module in (isolith, sys.modules["isolith_backends"])}
        self.run(
            [*words, str(target)],
            f"LD_LIBRARY_PATH={self.folder}",
            f"PYTHONPATH={':'.join(sorted(map(str, roots)))}",
            f"{stand_ins.CHIP}={soc.FAMILIES[family].chip}",
        )
        return json.loads(target.read_text())


def look_at_schemas(environment: Environment, refresh: bool) -> int:
    """Print what has changed since schemas.json was written."""
    file = json.loads(FILE.read_text())
    found = environment.written([str(Path(read.__file__))], "a3")
    lines = schemas.differences(file, found)
    of_file = file["sources"][schemas.SOURCE]["version"]
    print(
        f"torch_npu {found['version']} registers {len(found['ops'])} operators; schemas.json, of {of_file}, keeps "
        f"{len(schemas.kept(file))}: {len(lines)} differences"
    )
    print("\n".join(lines), end="\n" if lines else "")
    if refresh:
        FILE.write_text(json.dumps(schemas.refreshed(file, found), indent=1, ensure_ascii=False))
        print(f"written: {FILE}")
        if found["version"] != of_file:
            print("add the version before to WHEELS in vendor/soc.py, whose first is the one of schemas.json")
        return AGREED
    return DIFFERS if lines else AGREED


def look_at_calls(environment: Environment) -> int:
    """Print how the adapters' calls fare with the vendor's meta kernels, for each family of chips, and the twin's."""
    wrong = 0
    for family in FAMILIES:
        found = environment.written(["-m", "isolith_backends.ascend.drift.calls"], family)
        lines, told = report(family.upper(), found)
        count, others = between(found["rows"], of_twin(environment.folder, family)["rows"])
        lines.append(f"  the twin gives {count} results as the meta kernels do; {len(others)} others")
        print("\n".join([*lines, *(f"  {line}" for line in others)]))
        wrong += told + len(others)
    return DIFFERS if wrong else AGREED


def of_twin(folder: Path, family: str) -> Any:  # Any: JSON
    """The same calls on the twin of a chip with torch_npu alone, in a process of its own."""
    target = folder / "twin.json"
    words = [sys.executable, "-m", "isolith_backends.ascend.drift.calls", str(target), "twin"]
    done = subprocess.run(["env", f"ISOLITH_TWIN={family}-wheel", *words], capture_output=True, text=True)
    if done.returncode:
        raise NotLookedAtError(done.stderr)
    return json.loads(target.read_text())


def report(family: str, found: dict[str, Any]) -> tuple[list[str], int]:  # Any: JSON
    """(lines about one family, the number of calls that differ)."""
    rows = found["rows"]
    alike = [row for row in rows if row["outcome"] == AGREES]
    without = [row for row in rows if row["outcome"].endswith(NO_META)]
    wrong = [row for row in rows if row not in alike and row not in without]
    operators = Counter(name for row in alike for name in {name for name, _ in row["made"]})
    lines = [
        f"{family}: {len(alike)} calls of {len({row['kernel'] for row in alike})} kernels agree, through "
        f"{len(operators)} of the vendor's operators; {len(wrong)} differ; {len(without)} without a meta kernel"
    ]
    lines += [f"  {name} {count}" for name, count in sorted(operators.items())]
    lines += [f"  {line}" for line in sorted({row["outcome"] for row in without})]
    lines += [f"  {row['kernel']} {row['sample']} {row['dtype']} {row['outcome']}" for row in wrong]
    lines += [f"  {kernel} is not here: {reason}" for kernel, reason in found["not_here"].items()]
    return lines, len(wrong)


def main(words: Sequence[str] | None = None) -> int:
    """Compare; 0 where nothing differs, 1 where something does, 2 where nothing could be compared."""
    parser = argparse.ArgumentParser(prog="python -m isolith_backends.ascend.drift", description=__doc__)
    parser.add_argument("--venv", type=Path, required=True, help="a virtual environment with torch, pluggy, torch_npu")
    parser.add_argument("--calls", action="store_true", help="the adapters' calls through meta kernels instead")
    parser.add_argument("--refresh", action="store_true", help="write schemas.json anew")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = Environment(options.venv.absolute(), Path(folder))
            if options.calls:
                return look_at_calls(environment)
            return look_at_schemas(environment, options.refresh)
        except NotLookedAtError as error:
            print(error, file=sys.stderr)
            return NOT_LOOKED_AT


if __name__ == "__main__":
    sys.exit(main())
