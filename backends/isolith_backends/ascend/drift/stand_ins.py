"""Empty stand-ins for CANN's libraries: torch_npu imports with them, registers its schemas and meta kernels, runs none.

Source: the dynamic sections of torch-npu 2.13.0's libraries (what they need, all bound at once).
"""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

LIBRARIES = ("hccl", "ascendcl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "atb")
CANN_NAMES = re.compile(r"(acl|rt[A-Z]|Msprof)\w*")
ATB_NAMES = re.compile(r"_ZN3atb\w+")
CHIP = "STAND_IN_CHIP"
"""The variable that says which chip the stand-ins are of."""

ANSWERS = {
    # Everything else says 0, success. One device: a call on it is never made, but guards count the devices.
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *count) { *count = 1; return 0; }",
    "aclrtGetSocName": f'const char *aclrtGetSocName(void) {{ return getenv("{CHIP}"); }}',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return ""; }',
}


def source(names: Iterable[str]) -> str:
    """C that defines the names; those of C++ are given as they are linked."""
    return "\n".join(["#include <stdlib.h>", *(ANSWERS.get(n, f"long {n}(void) {{ return 0; }}") for n in names), ""])


def wanted(package: Path) -> set[str]:
    """What the libraries of an installed torch_npu leave undefined."""
    libraries = [*package.glob("lib/*.so"), *package.glob("_C*.so")]
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, libraries)], check=True, capture_output=True, text=True
    )
    return {line.split()[-1] for line in listed.stdout.splitlines() if line.strip()}


def build(package: Path, folder: Path) -> None:
    """Compile every stand-in into the folder.

    Raises:
        OSError: where there is no C compiler or no nm.
        subprocess.CalledProcessError: where they fail.
    """
    names = sorted(wanted(package))
    defines = {
        "ascendcl": [name for name in names if CANN_NAMES.fullmatch(name)],
        "atb": [name for name in names if ATB_NAMES.fullmatch(name)],
    }
    for library in LIBRARIES:
        code = folder / f"{library}.c"
        code.write_text(source(defines.get(library, ())))
        command = ["cc", "-shared", "-fPIC", "-o", str(folder / f"lib{library}.so"), str(code)]
        subprocess.run(command, check=True, capture_output=True, text=True)
