"""`python -m isolith_conformance bench`: the command line of the benchmark."""

import argparse
import datetime
import difflib
import itertools
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import isolith
from isolith.dispatch import Dispatcher
from isolith.errors import IsolithError
from isolith.machine import device_name, processor
from isolith.memory import bytes_free
from isolith.models import MODELS, V4
from isolith.ops import OPERATORS
from isolith_conformance import plan
from isolith_conformance.bench import record
from isolith_conformance.bench.clock import Clock
from isolith_conformance.bench.floors import CHIPS, floors
from isolith_conformance.bench.machine import measure_limits
from isolith_conformance.bench.measure import Bench, measure
from isolith_conformance.bench.memory import check_memory, least_experts
from isolith_conformance.bench.page import page
from isolith_conformance.bench.peers import PEERS
from isolith_conformance.bench.picture import picture
from isolith_conformance.bench.record import BenchError, Row
from isolith_conformance.bench.text import row_line, table
from isolith_conformance.bench.workloads import GROUPS, Setting, Workload, workloads
from isolith_conformance.report import BackendRecord, Environment

UNITS = {"": 1, "K": 10**3, "M": 10**6, "KI": 2**10, "MI": 2**20}
DEFAULT_TOKENS = {"decode": 1, "prefill": 512}
CANNOT_START = 2

Say = Callable[[str], None]


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="isolith_conformance bench",
        description="Time every operator of a model beside what the machine can do, and check what was timed.",
    )
    add = made.add_argument
    add("--backend", default="", metavar="NAME", help="the backend (default: the one for this machine's device)")
    add("--model", choices=sorted(MODELS), default="v4-flash", help="whose layers' shapes (default: v4-flash)")
    add("--phase", choices=("decode", "prefill"), default="decode", help="kind of step (default: decode)")
    add("--context", action="append", default=[], metavar="N", help="tokens: 4096, 64K, 64Ki, 1M; more than once")
    add(
        "--tokens",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="decode: sequences (1); prefill: tokens of one (512); more than once",
    )
    add(
        "--experts",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="keep so many experts, for little memory; more than once",
    )
    add("--op", action="append", default=[], metavar="OPERATOR", help="time this operator alone; more than once")
    add("--seconds", type=float, default=1.0, metavar="S", help="for the repeats of each kernel and peer (1)")
    add("--reference-seconds", type=float, default=20.0, metavar="S", help="a run of a reference may take (20)")
    add("--no-reference", action="store_true", help="leave the references' times out; results are still checked")
    add("--no-peers", action="store_true", help="leave the peers out")
    add("--warm", action="store_true", help="leave caches as they are between repeats, for calls of microseconds")
    add("--threads", type=int, default=None, metavar="N", help="torch's threads on the host")
    add("--json", type=Path, default=None, metavar="FILE", help="write the record")
    add(
        "--plot", type=Path, default=None, metavar="FILE.svg", help="draw the roofline, and how times grow with context"
    )
    add("--page", type=Path, default=None, metavar="FILE.html", help="write table and pictures as one page")
    add("--list", action="store_true", help="list what would be timed, with its bytes, and stop")
    add(
        "--floors",
        choices=sorted(CHIPS),
        default=None,
        help="list each call's least time on this chip, on paper, and stop",
    )
    return made


def bench_command(arguments: list[str], say: Say = print) -> int:
    """Run the benchmark.

    Returns:
        0 where every row is right, 1 where one is not, 2 where the benchmark cannot start.
    """
    options = parser().parse_args(arguments)
    try:
        return run(options, shlex.join(["python", "-m", "isolith_conformance", "bench", *arguments]), say)
    except (BenchError, IsolithError) as error:
        print(error, file=sys.stderr)
        return CANNOT_START


def run(options: argparse.Namespace, command: str, say: Say) -> int:
    """Check everything that can be checked before, then measure, then write."""
    settings = settings_of(options)
    chosen = [(setting, selected(setting, options.op)) for setting in settings]
    check_files(options)
    if not any(calls for _, calls in chosen):
        raise BenchError(f"bench: {options.model} has none of {', '.join(options.op)} in {options.phase}.")
    if options.floors:
        say(floors(options.floors, chosen))
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with dispatching(options.backend) as (dispatcher, device, backend):
        if options.list:
            say(listing(chosen))
            return 0
        for setting, calls in chosen:
            check_memory(setting, calls, bytes_free(device))
        found = measured(options, command, dispatcher, device, backend, chosen)
    say(table(found))
    write_files(options, found)
    return 0 if found.all_right else 1


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """A setting for each context, number of tokens and number of experts; BenchError for what is not legal."""
    model = MODELS[options.model]
    contexts = [tokens_of(text) for text in options.context or ["4096"]]
    counts = options.tokens or [DEFAULT_TOKENS[options.phase]]
    kept = options.experts or [model.experts]
    for name, value in (("--seconds", options.seconds), ("--reference-seconds", options.reference_seconds)):
        if not 0 < value < 1e6:
            raise BenchError(f"bench: {name} must be positive; got {value:g}.")
    for name, given in (("--tokens", counts), ("--threads", [options.threads or 1])):
        if min(given) < 1:
            raise BenchError(f"bench: {name} must be at least 1; got {min(given)}.")
    for name, values in (("--context", contexts), ("--tokens", counts), ("--experts", kept)):
        if len(set(values)) != len(values):
            raise BenchError(f"bench: {name} names one number twice.")
    if options.phase == "prefill" and max(counts) > min(contexts):
        raise BenchError(f"bench: --tokens must be at most --context = {min(contexts)} in prefill; got {max(counts)}.")
    made = [
        Setting(model=model, phase=options.phase, context=context, tokens=tokens, experts=experts)
        for experts, tokens, context in itertools.product(kept, counts, contexts)
    ]
    least, step = least_experts(made[0]), 1 if isinstance(model, V4) else GROUPS
    for experts in kept:
        if not least <= experts <= model.experts or experts % step:
            multiple = "" if step == 1 else f" and a multiple of {step}, its groups"
            raise BenchError(
                f"bench: --experts of {options.model} must be in {least}..{model.experts}{multiple}; got {experts}."
            )
    return made


def tokens_of(text: str) -> int:
    """`1M`, `64K` (decimal), `64Ki` (binary) or a number of tokens."""
    match = re.fullmatch(r"(\d{1,12})(|K|M|KI|MI)", text.upper())
    value = int(match[1]) * UNITS[match[2]] if match else 0
    if not 1 <= value < 2**31:
        raise BenchError(f"bench: --context is a number of tokens such as 4096, 64K, 64Ki or 1M; got {text!r}.")
    return value


def selected(setting: Setting, names: list[str]) -> list[Workload]:
    """The calls asked for."""
    for name in names:
        if name not in OPERATORS:
            near = difflib.get_close_matches(name, OPERATORS, n=1, cutoff=0.0)[0]
            raise BenchError(f"bench: there is no operator {name!r}; the nearest is {near}.")
    return [one for one in workloads(setting) if not names or one.operator.name in names]


def check_files(options: argparse.Namespace) -> None:
    """Refuse files that cannot be written before anything is measured."""
    for name, suffix in (("json", ""), ("plot", ".svg"), ("page", "")):
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        if not path.parent.is_dir():
            raise BenchError(f"bench: --{name} is in a folder that there is not: {path.parent}.")
        if suffix and path.suffix != suffix:
            raise BenchError(f"bench: --{name} must end with {suffix}; got {path.name}.")


@contextmanager
def dispatching(name: str) -> Iterator[tuple[Dispatcher, str, BackendRecord]]:
    """(dispatcher, device, record) of a backend, of the machine's own where none is named."""
    more: dict[str, Any] = {"backend": name} if name else {}  # Any: settings
    with isolith.override(fallback="allow", **more) as dispatcher:
        registry = dispatcher.registry
        device = registry.backend(name).device_type if name else own_device(dispatcher)
        wanted = name or dispatcher.settings.backend or registry.serving(device)[0].name
        plugin = next(row for row in registry.plugins if row.name == wanted)
        backend = registry.backend(wanted)
        yield (
            dispatcher,
            device,
            BackendRecord(
                name=wanted,
                distribution=plugin.distribution,
                version=plugin.version,
                device=device_name(device),
                arch=backend.arch() if backend.arch else None,
                versions=dict(backend.versions() if backend.versions else {}),
            ),
        )


def own_device(dispatcher: Dispatcher) -> str:
    """The accelerator that a backend here serves, else the host."""
    if dispatcher.settings.backend:
        return dispatcher.registry.backend(dispatcher.settings.backend).device_type
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return present.type if present is not None and dispatcher.registry.serving(present.type) else "cpu"


def listing(chosen: list[tuple[Setting, list[Workload]]]) -> str:
    """What would be timed."""
    from isolith.commands.command import columns
    from isolith_conformance.bench.memory import bytes_needed

    rows = [["operator", "call", "context", "tokens", "MB", "note"]]
    for setting, calls in chosen:
        for one in calls:
            size = f"{bytes_needed(one) / 1e6:,.1f}"
            rows.append([one.operator.name, one.label, f"{setting.context}", f"{setting.tokens}", size, one.note])
    return columns(rows)


def measured(
    options: argparse.Namespace,
    command: str,
    dispatcher: Dispatcher,
    device: str,
    backend: BackendRecord,
    chosen: list[tuple[Setting, list[Workload]]],
) -> record.Bench:
    """The limits, then every row; an interrupt ends the run with the rows that there are."""
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    progress("measuring what the machine can do ...")
    watch = Clock(device)
    limits = measure_limits(watch)
    if options.warm:
        watch = Clock(device, buffer_bytes=0)
    bench = Bench(
        dispatcher=dispatcher,
        clock=watch,
        limits=limits,
        seconds=options.seconds,
        reference_seconds=0.0 if options.no_reference else options.reference_seconds,
        peers=() if options.no_peers else PEERS,
    )
    calls = [(setting, one) for setting, rows in chosen for one in rows]
    rows: list[Row] = []
    try:
        for place, (setting, one) in enumerate(calls, 1):
            progress(f"[{place}/{len(calls)}] {one.operator.name}, {one.label}, {setting.words} ...")
            rows.append(measure(bench, setting, one))
            progress(f"    {row_line(rows[-1])}")
    except KeyboardInterrupt:
        progress("interrupted; the record has what was measured")
    settings = [setting for setting, _ in chosen]
    return record.bench_of(
        suite=plan.suite(),
        run=record.BenchRun(
            command=command,
            started=started.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - clock,
            model=settings[0].model.name,
            phase=settings[0].phase,
            contexts=tuple(dict.fromkeys(setting.context for setting in settings)),
            tokens=tuple(dict.fromkeys(setting.tokens for setting in settings)),
            experts=tuple(dict.fromkeys(setting.experts for setting in settings)),
            caches="warm" if options.warm else "cold",
            threads=torch.get_num_threads(),
            complete=len(rows) == len(calls),
        ),
        environment=environment(),
        backend=backend,
        limits=bench.limits,
        rows=tuple(rows),
    )


def environment() -> Environment:
    """Where it ran."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (0.0,)
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor(),
        cores=os.cpu_count() or 0,
        torch=str(torch.__version__),
        more={"load of the last minute, at the end": f"{load[0]:.1f}"},
    )


def progress(line: str) -> None:
    """A line for who waits."""
    print(line, file=sys.stderr, flush=True)


def write_files(options: argparse.Namespace, found: record.Bench) -> None:
    """The files asked for."""
    if options.json is not None:
        record.write(found, options.json)
    if options.plot is not None:
        options.plot.write_text(picture(found), encoding="utf-8")
    if options.page is not None:
        options.page.write_text(page(found), encoding="utf-8")
