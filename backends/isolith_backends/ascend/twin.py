"""A simulated NPU: importing this module sets it up in this process, and nothing undoes it.

ISOLITH_TWIN chooses the chip (310p, a2, a3 or a5; a3 unless set) and what is installed: -vllm or -recipes behind it for
one extension beside torch_npu, -wheel for none, both unless one is named; -2.10.0.post4 or -2.8.0 for an older
torch_npu. Every public schema of such an installation is defined; those that the chip has an operator for are offered,
on the device alone.
"""

import functools
import json
import re
import sys
import types
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

from isolith import config, simulated
from isolith_backends.ascend.vendor import soc, table

CANN = "9.1.0"

LIBRARIES: list[torch.library.Library] = []


def older(row: dict[str, Any], wheel: str) -> tuple[str | None, tuple[str, ...]]:
    """(an operator's schema in an older wheel or None, the arguments that it does not have there)."""
    schema = row["schema"].partition("::")[2]
    known = (row.get("older_wheels") or {}).get(wheel)
    if row["source"] != "torch_npu" or known in (None, "same arguments"):
        return schema, ()
    if known == "absent":
        return None, ()
    added = tuple(known["arguments_added_later"])
    for argument in added:
        # Their types and defaults hold no comma but that of a short list of numbers.
        schema = re.sub(rf", [\w\[\]?]+(\([a-z]!\))? {argument}(=[^,()]*)?(?=[,)])", "", schema)
    return schema, added


def define(rows: list[dict[str, Any]], installation: soc.Installation) -> dict[str, dict[str, Any]]:
    """Register the schemas that are installed; gives, by operator, the defaults of arguments that are not there yet."""
    libraries = {name: torch.library.Library(name, "FRAGMENT") for name in installation.namespaces}
    LIBRARIES.extend(libraries.values())
    defined: dict[str, dict[str, Any]] = {}
    for row in rows:
        namespace = row["name"].partition("::")[0]
        if namespace not in libraries or row["source"] == "sgl-kernel-npu":  # which is not installed beside them
            continue
        schema, added = older(row, installation.wheel)
        if schema is not None:
            libraries[namespace].define(schema)
            newest = torch._C.parse_schema(row["schema"]).arguments if added else ()
            defined[row["name"]] = {each.name: each.default_value for each in newest if each.name in added}
    return defined


def absent(operator: str, **arguments: Any) -> None:  # Any: as schemas are
    """A call of what CANN has no kernel for on this chip."""
    raise RuntimeError(f"aclnn of {operator} or its workspace's size is not in libopapi.so")


def stand_in(installation: soc.Installation, defined: Iterable[str]) -> types.ModuleType:
    """The module torch_npu: its identity, and its functions as attributes."""
    module = types.ModuleType("torch_npu", "A stand-in for torch_npu, over simulated tensors.")
    module.__spec__ = ModuleSpec("torch_npu", None)  # other packages ask for it to see whether there is such a module
    parts = {
        "__version__": installation.wheel,
        "npu": torch.get_device_module("npu"),
        "_C": types.SimpleNamespace(_npu_get_soc_version=lambda: installation.soc.number),
        "utils": types.SimpleNamespace(get_cann_version=lambda: CANN),
    }
    vars(module).update(parts)
    for operator in defined:
        namespace, _, name = operator.partition("::")
        if namespace == "npu" and "." not in name:
            setattr(module, name, getattr(torch.ops.npu, name))
    return module


def set_up() -> None:
    """Simulate the device, register the schemas, offer the chip's operators, stand in for torch_npu."""
    installation = soc.chosen(config.from_environment().twin)
    chip = installation.soc
    simulated.simulate("npu")
    device = torch.get_device_module("npu")
    device.get_device_name = lambda _=None: chip.chip
    device.get_soc_version = lambda: chip.number
    device.matmul = types.SimpleNamespace(allow_hf32=True)
    device.conv = types.SimpleNamespace(allow_hf32=True)
    soc.CURRENT.set(chip)
    rows = json.loads((Path(__file__).parent / "schemas.json").read_text())["ops"]
    defined = define(rows, installation)
    for operator, function, families in table.OFFERED:
        namespace, _, name = operator.partition("::")
        if operator in defined and chip.name in families:
            simulated.offer(namespace, name, functools.partial(function, **defined[operator]))
        elif operator in defined and namespace == "npu":
            # torch_npu is one build for all chips: its operators are registered where CANN has nothing behind them.
            simulated.offer(namespace, name, functools.partial(absent, name))
    sys.modules["torch_npu"] = stand_in(installation, defined)


set_up()
