"""The command line: `python -m isolith_conformance`.

    python -m isolith_conformance [OPTIONS] [PYTEST OPTIONS]   check every backend that this machine has
    python -m isolith_conformance reproduce CASE-ID --seed N   run one case of a report again
    python -m isolith_conformance reproduce FOLDER             run a call again that a shadow run has kept
    python -m isolith_conformance page REPORT OUT.html         the report as one page
    python -m isolith_conformance compare A.json B.json        where two runs, or two benchmarks, differ
    python -m isolith_conformance bench [OPTIONS]              how fast a model's operators are; bench --help
    python -m isolith_conformance bundle FOLDER                write inputs and expected outputs
    python -m isolith_conformance judge-bundle FOLDER RESULTS  judge results that somebody else computed

Options of a run: --backend NAME, --op OPERATOR, --dtype DTYPE (each more than once), --quick, --full (the default),
--seed N, --profile strict|standard|basic, --how hardware|interpreter|twin, --report FILE, --page FILE, --waivers FILE,
--timeout SECONDS, --pass-env PATTERN, and whatever pytest takes: -k, -x, --lf, -n 4, --junit-xml FILE.

Exit codes: 0 nothing failed, 1 something failed, 2 the run could not start.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CANNOT_START = 2


def run(arguments: list[str]) -> int:
    """Run the suite in this process, under pytest, without whatever other plugins are installed."""
    distributed = any(word.startswith(("-n", "--numprocesses")) for word in arguments)
    words = [
        *(
            "-c",
            str(HERE / "pytest.ini"),
            f"--rootdir={Path.cwd()}",
            "-o",
            f"cache_dir={Path.cwd() / '.isolith_cache'}",
        ),
        *("--disable-plugin-autoload", "-p", "isolith_conformance.plugin", "-q", "--tb=no", "-rN"),
        *(("-p", "xdist.plugin", "--dist=loadgroup") if distributed else ()),
    ]
    code = pytest.main([*words, *arguments, *map(str, sorted(HERE.glob("test_*.py")))])
    return int(code) if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else CANNOT_START


def reproduce(arguments: list[str]) -> int:
    """Run one case again, and show what it finds."""
    if not arguments or arguments[0].startswith("-"):
        print("reproduce needs the id of a case, as a report gives it", file=sys.stderr)
        return CANNOT_START
    case, *rest = arguments
    if (Path(case) / "call.json").is_file():
        return reproduce_kept(Path(case), rest)
    backend = [] if any(word.startswith("--backend") for word in rest) else ["--backend", case.partition("/")[0]]
    operator = ["--op", case.split("/")[1]] if case.count("/") >= 2 else []
    return run(["--case", case, "--tb=auto", "-v", *backend, *operator, *rest])


def reproduce_kept(folder: Path, arguments: list[str]) -> int:
    """Run a call again that a shadow run has kept."""
    from isolith_conformance.shadow_reproduce import reproduce_command

    parser = argparse.ArgumentParser(prog=f"isolith_conformance reproduce {folder}")
    parser.add_argument("--backend", default="", metavar="NAME", help="another backend than the kernel's own")
    parser.add_argument("--how", choices=("hardware", "interpreter", "twin"))
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")
    options = parser.parse_args(arguments)
    return reproduce_command(folder, options.backend, options.how, options.timeout)


def page(arguments: list[str]) -> int:
    """Write a report's page."""
    from isolith_conformance.page import page_command

    parser = argparse.ArgumentParser(prog="isolith_conformance page")
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    return page_command(options.report, options.out)


def compare(arguments: list[str]) -> int:
    """Say where two runs, or two benchmarks, differ."""
    from isolith_conformance.bench import compare as benches
    from isolith_conformance.bench.record import is_bench
    from isolith_conformance.compare import compare_command

    parser = argparse.ArgumentParser(prog="isolith_conformance compare")
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    command = benches.compare_command if is_bench(options.a) or is_bench(options.b) else compare_command
    return command(options.a, options.b, options.json)


def bench(arguments: list[str]) -> int:
    """Time a model's operators."""
    from isolith_conformance.bench.command import bench_command

    return bench_command(arguments)


def bundle(arguments: list[str]) -> int:
    """Write a golden bundle."""
    from isolith_conformance.bundle_judge import bundle_command

    parser = argparse.ArgumentParser(prog="isolith_conformance bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--op", action="append", default=[], metavar="OPERATOR")
    parser.add_argument("--dtype", action="append", default=[], metavar="DTYPE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return bundle_command(options.folder, tuple(options.op), tuple(options.dtype), options.seed)


def judge_bundle(arguments: list[str]) -> int:
    """Judge results of a golden bundle."""
    from isolith_conformance.bundle_judge import judge_bundle_command

    parser = argparse.ArgumentParser(prog="isolith_conformance judge-bundle")
    parser.add_argument("folder", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--profile", choices=("strict", "standard", "basic"), default="standard")
    parser.add_argument("--sha256", help="the hash that the bundle's manifest must have")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    return judge_bundle_command(options.folder, options.results, options.profile, options.sha256, options.json)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "reproduce": reproduce,
    "page": page,
    "compare": compare,
    "bench": bench,
    "bundle": bundle,
    "judge-bundle": judge_bundle,
}


def main(arguments: list[str]) -> int:
    """Run the command that the first word names, or the suite."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        print(f"there is no command {arguments[0]!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return CANNOT_START
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
