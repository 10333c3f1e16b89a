"""Compiling a C++ file of this folder for this machine, and calling its functions on tensors.

The first use of a family compiles it, a few seconds; the result is kept in the user's cache, by the hash of the
sources, of the compiler and of what it takes this machine for. Nothing but a C++17 compiler is needed: CXX and CXXFLAGS
are honoured.
The functions run on torch's own OpenMP threads, as many as `torch.get_num_threads()` says.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from isolith import WhyNot, config

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]  # a module, or none

FOLDER = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-fopenmp")
TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}
SECONDS = 300
"""Before a compiler is given up."""

LARGE = 4 << 20
"""Bytes from which on large pages are asked for."""
MADVISE = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How the C++ side spells the dtypes that its functions are templates over."""

Argument = Tensor | torch.dtype | int | float | None


class Library:
    """The functions of one C++ file, which say `EXPORT void name(int threads, ...)`.

    Args:
        name: The file, without its ending.
    """

    def __init__(self, name: str) -> None:
        self.source = FOLDER / f"{name}.cpp"
        self.lock = threading.Lock()
        self.functions: dict[str, Callable[..., None]] = {}
        self.problem: WhyNot = None

    def missing(self) -> WhyNot:
        """Compile and load where that has not been done; the sentence that says why it cannot be."""
        with self.lock:
            if not self.functions and self.problem is None:
                try:
                    self.functions = loaded(compiled(self.source), self.source)
                except (OSError, subprocess.SubprocessError, LookupError) as error:
                    self.problem = f"{self.source.name} is not compiled: {str(error).strip()[:400]}"
        return self.problem

    def call(self, name: str, *arguments: Argument) -> None:
        """Call a function: tensors as pointers to their data, dtypes by their code, None as a null pointer."""
        self.functions[name](torch.get_num_threads(), *map(passed, arguments))


def passed(argument: Argument) -> int | float | None:
    """An argument as ctypes takes it."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return CODES[argument] if isinstance(argument, torch.dtype) else argument


def in_large_pages(y: Tensor) -> Tensor:
    """The tensor, not yet written, for the system to keep in large pages where it is large.

    Memory above 32 MiB is fetched anew by every call, and a fault for each 4 KiB of it took as long as filling it.
    """
    if y.nbytes >= LARGE and MADVISE is not None:
        start = -(-y.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(y.data_ptr() + y.nbytes - start), mmap.MADV_HUGEPAGE)
    return y


def loaded(binary: Path, source: Path) -> dict[str, Callable[..., None]]:
    """The functions of a shared library, with the types that the source declares."""
    library = ctypes.CDLL(str(binary))
    functions: dict[str, Callable[..., None]] = {}
    for name, parameters in re.findall(r"^EXPORT void (\w+)\(([^)]*)\)", source.read_text(), flags=re.MULTILINE):
        function = library[name]
        function.restype = None
        function.argtypes = [ctype(parameter) for parameter in parameters.split(",")]
        functions[name] = function
    return functions


def ctype(parameter: str) -> type:
    """The ctypes type of a parameter such as "const float* x"."""
    if "*" in parameter:
        return ctypes.c_void_p
    return TYPES[parameter.split()[-2]]


def compiled(source: Path) -> Path:
    """The shared library of a source, made where it is not there."""
    compiler = (*compiler_words(), *FLAGS, *shlex.split(config.tool("CXXFLAGS") or ""))
    texts = [path.read_bytes() for path in (source, *sorted(FOLDER.glob("*.h")))]
    identity = hashlib.sha256(b"\0".join([machine(compiler).encode(), shlex.join(compiler).encode(), *texts]))
    binary = config.cache_folder() / "native" / f"{source.stem}-{identity.hexdigest()[:16]}.so"
    if binary.exists():
        return binary
    binary.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with alone(binary.parent), tempfile.TemporaryDirectory(dir=binary.parent) as folder:
        made = Path(folder) / binary.name
        if not binary.exists():
            run((*compiler, str(source), "-o", str(made), *openmp()))
            made.replace(binary)  # at once: whoever finds it may load it
    return binary


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time: the others wait for what it compiles, where the system has such locks."""
    with (folder / "lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compiler_words() -> tuple[str, ...]:
    """The compiler's command: CXX, or the first of the usual names."""
    wanted = config.tool("CXX")
    if wanted is not None:
        words = tuple(shlex.split(wanted))
        if not words or shutil.which(words[0]) is None:
            raise LookupError(f"CXX={wanted!r} names no program")
        return words
    found = next(filter(shutil.which, COMPILERS), None)
    if found is None:
        raise LookupError(f"no C++ compiler is installed ({', '.join(COMPILERS)}); CXX names one")
    return (found,)


@functools.cache
def machine(compiler: tuple[str, ...]) -> str:
    """What the compiler says of itself and of the machine: one home may serve several kinds."""
    return run((*compiler, "-dM", "-E", "-x", "c++", os.devnull))


def openmp() -> list[str]:
    """The OpenMP runtime that torch has brought and loaded: two of them would get in each other's way."""
    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    return [str(path) for path in found[:1]]


def run(command: tuple[str, ...]) -> str:
    """The output of a command; OSError with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
        raise OSError(f"{command[0]} ended with {done.returncode}: {said}")
    return done.stdout
