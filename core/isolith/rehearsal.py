"""Loading a plugin in a process of its own, before it is loaded here: being installed must not be able to do harm.

A plugin from outside that nobody has named is rehearsed once for each installation of it: imported, asked whether its
device is here, its kernels imported. One that ends its process, hangs or replaces parts of torch is not loaded here.
What came of it is remembered in the user's cache; `isolith status` rehearses anew. A plugin that the user has named, in
ISOLITH_PLUGINS or ISOLITH_BACKEND, is loaded as it is. What a plugin does after all this, it does here.
"""

import builtins
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

from isolith import config, plugins
from isolith.backend import API_VERSION
from isolith.plugins import Plugin

TIMEOUT_S = 20.0
"""How long a plugin may take to load. Its process ends itself then, which counts from where torch is imported."""
START_S = 120.0
"""How long importing torch may take on a slow disk."""
AT_ONCE = 4
MOST_REMEMBERED = 256
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from isolith.rehearsal import main; main(sys.argv[2])"

Outcome = Mapping[str, Any]  # Any: JSON: "reason", None or a sentence, and "seconds"

HERE: dict[str, Outcome] = {}
"""Rehearsals that this process knows of, by `stamp`."""


@dataclass(frozen=True, kw_only=True)
class Child:
    """A rehearsal that is under way."""

    process: subprocess.Popen[bytes]
    deadline: float


def rehearsed(rows: Iterable[Plugin], named: Sequence[str] = (), again: bool = False) -> tuple[Plugin, ...]:
    """The rows, with the reason of each that must not be loaded here.

    Args:
        rows: Plugins that are about to be loaded.
        named: Those that the user has named: they are refused only where this process knows already that they fail.
        again: Rehearse whatever the cache remembers.
    """
    rows = tuple(rows)
    stamps = {row: stamp(row) for row in rows if row.reason is None and row.distribution != "isolith"}
    remembered = {} if again else read_cache()
    for mark in stamps.values():
        if mark in remembered:
            HERE.setdefault(mark, remembered[mark])
    wanted = [row for row, mark in stamps.items() if (again or mark not in HERE) and row.name not in named]
    made: dict[str, Outcome] = {}
    for first in range(0, len(wanted), AT_ONCE):
        children = [(stamps[row], start(row)) for row in wanted[first : first + AT_ONCE]]
        made |= {mark: outcome(child) for mark, child in children}
    if made:
        HERE.update(made)
        write_cache({**read_cache(), **made})
    return tuple(replace(row, **known(HERE.get(stamps.get(row, ""), {}))) if row in stamps else row for row in rows)


def known(found: Outcome) -> dict[str, Any]:  # Any: fields of Plugin
    """What a rehearsal adds to a row."""
    return {"reason": found.get("reason"), "seconds": found.get("seconds", 0.0)}


def stamp(row: Plugin) -> str:
    """Another one for every installation of a plugin, and for every Python, torch and isolith."""
    place, record = "", None
    with suppress(PackageNotFoundError):
        found = distribution(row.distribution)
        place, record = str(found.locate_file("")), found.read_text("RECORD")  # hashes of all its files
    parts = [row.name, row.origin, row.target, place, record, sys.version, torch.__version__, API_VERSION]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def start(row: Plugin) -> Child | None:
    """Start a rehearsal; None where no process can be started."""
    given = {"name": row.name, "distribution": row.distribution, "version": row.version, "target": row.target}
    if not sys.executable:  # Python within another program
        return None
    with suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps([*map(str, sys.path)]), json.dumps([given, TIMEOUT_S])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        return Child(process=process, deadline=time.monotonic() + START_S + TIMEOUT_S)
    return None


def outcome(child: Child | None) -> Outcome:
    """Wait for a rehearsal; the reason says how it ended where that was not well."""
    if child is None:
        return {"reason": None, "seconds": 0.0}
    try:
        answer, errors = child.process.communicate(timeout=max(0.0, child.deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.communicate()
        return refused(f"it did not load within {START_S + TIMEOUT_S:g} s")
    with suppress(ValueError, KeyError, TypeError):
        said = json.loads(answer)
        replaced, seconds = ", ".join(map(str, said["replaced"])), float(said["seconds"])
        found = refused(f"importing it replaces {replaced}") if replaced else {"reason": None}
        return {**found, "seconds": seconds}
    code = child.process.returncode
    if code == -signal.SIGALRM:
        return refused(f"it did not load within {TIMEOUT_S:g} s")
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    last = errors.decode(errors="replace").strip().splitlines()[-1:]
    return refused(f"the process that loaded it {how}{': ' if last else ''}{''.join(last)[:400]}")


def refused(reason: str) -> Outcome:
    """The outcome for a plugin that is not loaded here."""
    ways = "isolith status tries it again, and ISOLITH_PLUGINS loads it as it is"
    return {"reason": f"{reason}; it is not loaded here: {ways}", "seconds": 0.0}


def read_cache() -> dict[str, Outcome]:
    """What earlier processes found; nothing where the file is not ours or not right."""
    with suppress(OSError, ValueError):
        found = json.loads(cache_file().read_text())
        if isinstance(found, dict):
            return {
                mark: row for mark, row in found.items() if isinstance(row, dict) and set(row) == {"reason", "seconds"}
            }
    return {}


def write_cache(outcomes: Mapping[str, Outcome]) -> None:
    """Remember the latest; a cache that cannot be written costs a rehearsal in each process."""
    path = cache_file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(dict(list(outcomes.items())[-MOST_REMEMBERED:])))
        part.replace(path)


def cache_file() -> Path:
    """Where rehearsals are remembered."""
    return config.cache_folder() / "rehearsals.json"


WATCHED: Mapping[str, tuple[Any, ...]] = {  # Any: modules and classes; of two with one function the last counts
    "torch": (torch,),
    "torch.Tensor": (torch._C.TensorBase, torch.Tensor),
    "torch.nn.functional": (torch.nn.functional,),
    "torch.library": (torch.library,),
    "builtins": (builtins,),
}


def functions() -> dict[str, object]:
    """Everything that a plugin might replace, by name."""
    return {
        f"{place}.{name}": value
        for place, owners in WATCHED.items()
        for owner in owners
        for name, value in vars(owner).items()
        if callable(value)
    }


def made_by_torch(function: object) -> bool:
    """Whether it is torch that has put a function of its own in another's place, as some of its modules do."""
    return str(getattr(function, "__globals__", {}).get("__name__")).partition(".")[0] == "torch"


def main(given: str) -> None:
    """Load one plugin here, and say on what was standard output how that went."""
    plugin, timeout_s = json.loads(given)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, wherever that is
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the plugin prints
    before, began = functions(), time.monotonic()
    row = plugins.load(Plugin(**plugin))
    seconds, now = time.monotonic() - began, functions()
    changed = [name for name, function in before.items() if now.get(name) is not function]
    replaced = sorted(name for name in changed if not made_by_torch(now.get(name)))
    owner = row.backend or row.pack
    if owner is not None and plugins.probe(owner) is None:
        plugins.kernels_of(owner)
    answers.write(json.dumps({"replaced": replaced[:8], "seconds": round(seconds, 2)}))
    answers.flush()
    os._exit(0)  # what a plugin has left running is not waited for
