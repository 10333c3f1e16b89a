"""The suite's side of a backend's process: starts it, asks it with a time limit, ends it, and starts the next.

The suite never imports a backend. What comes back is data; a process that dies, hangs or speaks nonsense is a verdict
on the case that it was running, and the next case gets a fresh process.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from isolith.config import environment_of_child
from isolith_conformance import wire
from isolith_conformance.execute import Options, Response, Values

ENVIRONMENT = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_*", "TZ", "TERM", "SYSTEMROOT"),
    *("OMP_*", "MKL_*", "KMP_*", "GOMP_*", "TORCH*", "PYTORCH_*", "TRITON_*", "ISOLITH_*", "COVERAGE_*"),
    *("CUDA_*", "NVIDIA_*", "NVTE_*", "ASCEND*", "NPU_*", "CANN*", "ATB_*", "MLU_*", "NEUWARE*", "CNCL_*"),
)
"""The variables that a backend's process gets; secrets that lie in others stay here."""

PERTURB = {"first": "132", "fresh": "1"}
"""glibc fills newly allocated memory with the complement of this byte: 0x7B in one process, 0xFE in the other."""

START_TIMEOUT_S = 60.0


class Trouble(Exception):  # noqa: N818  # a verdict, not a mistake of ours
    """A process that gave no answer: the verdict (CRASH, TIMEOUT or INFRA) and why."""

    def __init__(self, verdict: str, message: str) -> None:
        super().__init__(message)
        self.verdict = verdict


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the processes of a backend are started.

    Args:
        backend: The plugin's name, or "distribution:name".
        how: "hardware", "interpreter" or "twin".
        timeout_s: How long one call may take.
        memory: How many bytes a process on the host may allocate; 0 sets no limit.
        environment: Names or patterns of more variables to pass on.
    """

    backend: str
    how: str = "hardware"
    timeout_s: float = 120.0
    memory: int = 0
    environment: tuple[str, ...] = ()


class Process:
    """One process of a backend."""

    def __init__(self, setup: Setup, perturb: str) -> None:
        self.description: Values = {}
        self.home = tempfile.TemporaryDirectory(prefix="isolith-")
        self.errors = open(os.path.join(self.home.name, "stderr"), "w+b")  # noqa: SIM115  # closed with the process
        more = {"HOME": self.home.name, "TMPDIR": self.home.name, "MALLOC_PERTURB_": perturb}
        if setup.how == "interpreter":
            more["TRITON_INTERPRET"] = "1"
        given = json.dumps({"backend": setup.backend, "how": setup.how, "memory": setup.memory})
        self.child = subprocess.Popen(
            [sys.executable, "-P", "-m", "isolith_conformance.worker", given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment_of_child((*ENVIRONMENT, *setup.environment), **more),
            cwd=self.home.name,
            start_new_session=True,
        )
        assert self.child.stdin, "it is a pipe"
        assert self.child.stdout, "it is a pipe"
        self.requests, self.answers = self.child.stdin.fileno(), self.child.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.answers, False)

    def ask(self, message: Values, timeout_s: float) -> Values:
        """Send a message and wait for the answer; Trouble when there is none."""
        deadline = time.monotonic() + timeout_s
        try:
            self.write(wire.encode(message), deadline)
            header, body = wire.lengths(bytes(self.read(wire.PREFIX.size, deadline)))
            return wire.decode(bytes(self.read(header, deadline)), self.read(body, deadline))
        except (BrokenPipeError, EOFError):
            raise Trouble("CRASH", self.last_words()) from None
        except TimeoutError:
            raise Trouble("TIMEOUT", f"no answer within {timeout_s:g} s") from None
        except wire.WireError as error:
            raise Trouble("INFRA", f"the backend's process sent what is no answer: {error}") from None

    def describe(self) -> None:
        """Wait until the plugin is loaded, and keep what it says of itself."""
        self.description = self.ask({"ask": "describe"}, START_TIMEOUT_S)

    def write(self, data: bytes, deadline: float) -> None:
        """Write everything before the deadline."""
        view = memoryview(data)
        while view:
            self.wait(self.requests, selectors.EVENT_WRITE, deadline)
            view = view[os.write(self.requests, view[: 1 << 20]) :]

    def read(self, count: int, deadline: float) -> bytearray:
        """Exactly so many bytes before the deadline; EOFError where the stream ends."""
        data = bytearray()
        while len(data) < count:
            self.wait(self.answers, selectors.EVENT_READ, deadline)
            more = os.read(self.answers, min(count - len(data), 1 << 22))
            if not more:
                raise EOFError
            data += more
        return data

    def wait(self, stream: int, event: int, deadline: float) -> None:
        """Wait until a stream is ready; TimeoutError when that takes too long."""
        with selectors.DefaultSelector() as selector:
            selector.register(stream, event)
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError

    def last_words(self) -> str:
        """How the process ended, and the end of what it wrote to standard error."""
        try:
            code = self.child.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        self.errors.seek(0)
        tail = self.errors.read()[-2000:].decode(errors="replace").strip()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return f"the process {how}" + (f": {tail}" if tail else "")

    def end(self) -> None:
        """Kill the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.home.cleanup()


class Runner:
    """Runs calls on a backend, in a process that is replaced whenever it has died."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.processes: dict[str, Process] = {}

    def describe(self) -> Values:
        """What the backend says of itself; a plugin that cannot be loaded is unavailable, with the reason."""
        try:
            return self.process("first").description
        except Trouble as trouble:
            self.end("first")
            reason = f"{trouble.verdict}: {trouble}"
            return {
                "why_unavailable": reason,
                "kernels": {},
                "native": False,
                "versions": {},
            }

    def run(
        self,
        operator: str,
        kernel: str,
        arguments: Values,
        options: Options,
        which: str = "first",
        earlier: Values | None = None,
    ) -> Response:
        """Run one call; Trouble when the process dies, hangs or answers nonsense.

        Args:
            operator: The operator's or layer's name.
            kernel: The candidate that must run, as `explain` spells it.
            arguments: All arguments by name, on the host.
            options: How to run.
            which: "first", the process that runs everything, or "fresh", another that has run little.
            earlier: Values of a call that comes first, in the same memory.
        """
        request = {"ask": "run", "operator": operator, "kernel": kernel, "arguments": arguments}
        request["earlier"] = earlier or {}
        try:
            process = self.process(which)
            return response_of(process.ask({**request, "options": asdict(options)}, self.setup.timeout_s))
        except Trouble:
            self.end(which)
            raise

    def process(self, which: str) -> Process:
        """The process of that name; started, and given time to import, where there is none."""
        if which not in self.processes:
            self.processes[which] = Process(self.setup, PERTURB.get(which, "1"))
            self.processes[which].describe()
        return self.processes[which]

    def end(self, which: str) -> None:
        """End a process, if it runs."""
        if which in self.processes:
            self.processes.pop(which).end()

    def close(self) -> None:
        """End every process."""
        for which in tuple(self.processes):
            self.end(which)


def response_of(answer: Mapping[str, Any]) -> Response:  # Any: whatever the process sent
    """The answer as a Response; Trouble when a part is missing or of another kind."""
    blank = Response(status="")
    for part in fields(Response):
        given, kind = answer.get(part.name), type(getattr(blank, part.name))
        if not isinstance(given, kind) and not (kind is float and type(given) is int):
            raise Trouble("INFRA", f"the answer's {part.name} is {type(given).__name__}; due is {kind.__name__}")
    if answer.keys() - {part.name for part in fields(Response)}:
        raise Trouble("INFRA", "the answer has parts that nobody asked for")
    tensors = [*answer["results"], *answer["late"], *answer["zones"], *answer["buffers"].values()]
    words = [*answer["executed"], *answer["references"]]
    if not all(isinstance(t, torch.Tensor) for t in tensors) or not all(isinstance(w, str) for w in words):
        raise Trouble("INFRA", "the answer's lists hold what they should not")
    return replace(blank, **answer)
