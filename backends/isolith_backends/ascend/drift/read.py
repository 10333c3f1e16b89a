"""Write as JSON what the torch_npu of this interpreter registers; runs where isolith need not be installed."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

NAMESPACES = ("npu", "atb", "npu_custom_dist")
KEYS = ("CPU", "Meta", "PrivateUse1", "AutogradPrivateUse1", "CompositeExplicitAutograd", "CompositeImplicitAutograd")


def registered(module: Any) -> list[dict[str, Any]]:  # Any: torch_npu has no types, JSON has many
    """Every schema with the keys that have a kernel, in the order of names."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    rows = []
    for schema in map(str, torch._C._jit_get_all_schemas()):
        name = schema.partition("(")[0]
        namespace, _, operator = name.partition("::")
        if namespace in NAMESPACES:
            keys = [key for key in KEYS if has_kernel(name, key)]
            is_attribute = hasattr(module, operator.partition(".")[0])
            rows.append({"name": name, "schema": schema, "keys": keys, "in_torch_npu_namespace": is_attribute})
    return sorted(rows, key=lambda row: str(row["name"]))


def main(target: str) -> None:
    """Import torch_npu and write what it has."""
    import torch_npu  # type: ignore[import-not-found]  # in an environment of its own

    versions = {
        "version": torch_npu.__version__.partition("+")[0],
        "torch": torch.__version__,
        "git": getattr(torch_npu.version, "git_version", ""),
    }
    Path(target).write_text(json.dumps({**versions, "ops": registered(torch_npu)}))


if __name__ == "__main__":
    main(sys.argv[1])
