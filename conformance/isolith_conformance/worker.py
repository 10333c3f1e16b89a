"""A backend's process: loads one plugin, runs calls, sends back bytes. `python -m isolith_conformance.worker`.

It reads frames from its standard input and answers each with one frame on what was its standard output; whatever the
plugin prints goes to standard error.
"""

import importlib
import json
import os
import resource
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from isolith import OPERATORS, certificates, plugins, simulated
from isolith.backend import Backend
from isolith.config import Settings
from isolith.dispatch import Dispatcher, Recorder, call, using
from isolith.errors import IsolithError
from isolith.operator import AnyOperator
from isolith.registry import Registry, load
from isolith.simulated import is_simulated
from isolith_conformance import wire
from isolith_conformance.execute import Declined, Options, Response, Values, run
from isolith_conformance.layers import UNITS


class Bench:
    """The backend under test, ready to run calls.

    Args:
        name: The plugin's name, or "distribution:name" where two offer it.
        how: "hardware", "interpreter" or "twin".
    """

    def __init__(self, name: str, how: str) -> None:
        self.plugin = base = load(asked_for(name), OPERATORS)
        if self.plugin.pack is not None:  # its kernels, on the backend that it adds to
            base = load(asked_for(self.plugin.pack.backend), OPERATORS)
        if how == "interpreter" and base.backend:
            base = replace(base, backend=on_host(base.backend))
        self.backend = base.backend
        self.reason = self.plugin.reason or base.reason
        self.how = how
        if how == "twin" and self.backend and self.backend.twin:
            importlib.import_module(self.backend.twin)
        rows = (base,) if self.plugin.pack is None else (base, replace(self.plugin, named=True))
        self.registry = Registry(operators=OPERATORS, plugins=rows)

    @property
    def device(self) -> torch.device:
        """Where it runs; torch does not know the name of a device whose extension is not loaded."""
        return torch.device(self.backend.device_type if self.backend else "cpu")

    @property
    def in_the_hosts_memory(self) -> bool:
        """Whether its tensors lie in the host's memory."""
        return self.backend is None or self.backend.device_type in ("cpu", simulated.State.device_type)

    @property
    def why_unavailable(self) -> str | None:
        """None where the backend can run here."""
        if self.backend is None or self.reason:
            return self.reason
        if self.how == "twin" and not self.backend.twin:
            return f"{self.backend.name} has no twin"
        needed = (self.plugin.pack, self.backend) if self.plugin.pack else (self.backend,)
        reason = next((reason for owner in needed if (reason := self.registry.why_unavailable(owner))), None)
        if reason is None and self.how == "hardware" and is_simulated(self.device):
            return f"its device {self.backend.device_type!r} is simulated here, which is no hardware: run it --how twin"
        return reason

    def describe(self) -> Values:
        """What the backend is and which kernels it claims, by operator, best first."""
        known: Values = {"distribution": self.plugin.distribution, "version": self.plugin.version}
        known["why_unavailable"] = self.why_unavailable
        if self.backend is None or known["why_unavailable"]:
            return {**known, "device": "", "arch": None, "versions": {}, "native": False, "kernels": {}}
        return {
            **known,
            "device": self.backend.device_type,
            "simulated": is_simulated(self.device),
            "arch": self.backend.arch() if self.backend.arch else None,
            "versions": dict(self.backend.versions() if self.backend.versions else {}),
            "native": self.backend.reference_is_native and self.plugin.pack is None,
            "kernels": {name: self.kernels(self.backend, name) for name in OPERATORS},
            "waivers": waivers_beside(self.plugin.target),
            "facts": certificates.facts(self.backend),
            "modules": {name: vars(sys.modules[name])["__version__"] for name in versioned()},
        }

    def kernels(self, backend: Backend, operator: str) -> list[Values]:
        """The kernels of an operator with what they declare."""
        return [
            {
                "name": kernel.full_name,
                "why_unavailable": kernel.requires.why_not_here(backend),
                "nondeterministic": kernel.nondeterministic,
                "batch_invariant": kernel.batch_invariant,
                "declares": list(kernel.declares),
                "source": certificates.source_hash(kernel),
                "contract": certificates.contract_hash(kernel),
            }
            for kernel in self.registry.kernels(backend, operator)
            if kernel.owner == self.plugin.name
        ]

    def run(self, request: Values) -> Response:
        """Run one call by the candidate that the request names, or refuse it with the reasons."""
        unit, candidate = UNITS[request["operator"]], request["kernel"]
        options = Options(**{name: frozen(value) for name, value in request["options"].items()})
        pins = ((unit.name, candidate),) if candidate and unit.name in OPERATORS else ()
        # A kernel cannot pass by not running. A layer is of what the backend has, and of references for the rest.
        settings = replace(
            Settings(),
            backend=self.backend.name if self.backend else "",
            kernels=pins,
            fallback="error" if unit.name in OPERATORS or not candidate else "allow",
            debug=True,
        )
        recorder = Recorder(self.registry, settings)

        def dispatched(**given: Any) -> Any:  # Any: an operator's own signature
            refused = self.refusal(unit, recorder, given, candidate)
            if refused:
                raise Declined(refused)
            return call(unit, (), given)

        with using(recorder):
            response = run(unit, dispatched, request["arguments"], options, self.device, request["earlier"] or None)
        executed = sorted(f"{operator} {name}" for operator, name in recorder.calls)
        if response.status == "refused" and candidate == "composition":
            return replace(response, executed=[], references=[])  # a part that the backend has no kernel for
        if response.status == "refused" and candidate and not response.declined:
            return replace(
                response, status="raised", message=f"claims the call but refuses to run it: {response.message}"
            )
        own = {unit.name} if unit.composed_of else set()
        return replace(response, executed=executed, references=[n for n in response.references if n not in own])

    def refusal(self, unit: AnyOperator, dispatcher: Dispatcher, arguments: Values, candidate: str) -> str | None:
        """Why the candidate does not take the call; None where it does, or where the call is illegal."""
        if unit.name not in OPERATORS:
            return None
        if not candidate:  # the backend that a pack adds to may have a kernel, which is not the pack's
            return f"{self.plugin.name} has no kernel for {unit.name}" if self.plugin.pack else None
        try:
            explanation = dispatcher.explain(unit, unit.arguments(**arguments), self.device.type)
        except IsolithError:
            return None
        chosen = explanation.chosen
        return None if chosen is not None and chosen.name == candidate else explanation.reasons.strip()


def on_host(backend: Backend) -> Backend:
    """The backend as an interpreter runs it: available, on tensors of the host."""
    return replace(backend, device_type="cpu", why_unavailable=lambda: None)


def waivers_beside(target: str) -> str:
    """The text of the waivers.toml beside a plugin's entry module; empty where there is none."""
    module = sys.modules[target.partition(":")[0]]
    path = Path(module.__file__ or ".").parent / "waivers.toml"
    return path.read_text() if path.is_file() else ""


def versioned() -> list[str]:
    """Packages that are loaded and say of which version they are."""
    loaded = {name: vars(module).get("__version__") for name, module in tuple(sys.modules.items()) if "." not in name}
    return sorted(name for name, version in loaded.items() if isinstance(version, str))


def frozen(value: Any) -> Any:  # Any: JSON values
    """Lists as tuples."""
    return tuple(value) if isinstance(value, list) else value


def asked_for(name: str) -> plugins.Plugin:
    """The plugin of a name; of two with one name, the one of the distribution named."""
    distribution, _, short = name.rpartition(":")
    rows = [row for row in plugins.discover() if row.name == short and distribution in ("", row.distribution)]
    if not rows:
        raise SystemExit(f"there is no plugin {name!r}")
    if distribution and len(rows) == 1:
        return replace(rows[0], reason=None)
    return rows[0]


def read_exactly(stream: BinaryIO, count: int) -> bytearray:
    """So many bytes, or SystemExit at the end of the stream."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        more = stream.readinto(view[done:])  # type: ignore[attr-defined]  # raw and buffered streams have it
        if not more:
            raise SystemExit(0)
        done += more
    return data


def main(arguments: Iterable[str]) -> None:
    """Answer requests until the stream ends."""
    given = json.loads(next(iter(arguments)))
    # The protocol has the pipe to itself; prints of a plugin go where errors go.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bench = Bench(given["backend"], given["how"])
    if given.get("memory") and bench.in_the_hosts_memory:
        resource.setrlimit(resource.RLIMIT_DATA, (given["memory"], given["memory"]))
    while True:
        header, body = wire.lengths(bytes(read_exactly(requests, wire.PREFIX.size)))
        request = wire.decode(bytes(read_exactly(requests, header)), read_exactly(requests, body))
        reply = bench.describe() if request["ask"] == "describe" else bench.run(request).as_message()
        send(answers, wire.encode(reply))


def send(stream: BinaryIO, data: bytes) -> None:
    """Write everything."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


if __name__ == "__main__":
    main(sys.argv[1:])
