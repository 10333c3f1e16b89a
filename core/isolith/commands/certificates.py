"""`isolith certificates`: which kernels a conformance run has shown to be right on this machine."""

import argparse
from typing import Any

from isolith import certificates, dispatch
from isolith.certificates import Certificate
from isolith.commands.command import Command, entries
from isolith.registry import Registry


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """Every certificate, and why it does not hold here if so."""
    registry = dispatch.dispatcher().registry
    rows = []
    for path, one in certificates.files():
        row: dict[str, Any] = {"file": str(path), "valid": False}
        if isinstance(one, str):
            rows.append({**row, "reason": one})
            continue
        reason = why_not(registry, one)
        rows.append(
            {
                **row,
                "valid": reason is None,
                "reason": reason,
                "kernel": one.kernel,
                "dtypes": list(one.dtypes),
                "passed": one.passed,
                "profile": one.profile,
                "how": one.how,
                "device": one.device,
                "written": one.written,
                "report": one.report,
            }
        )
    return {"folder": str(certificates.folder()), "certificates": rows}


def why_not(registry: Registry, certificate: Certificate) -> str | None:
    """Why a certificate does not hold here."""
    for backend in registry.backends:
        if registry.why_unavailable(backend) is not None:
            continue
        for kernel in registry.kernels(backend, certificate.operator):
            if kernel.full_name == certificate.kernel:
                return certificates.why_not_valid(certificate, kernel, backend)
    return f"there is no kernel {certificate.kernel} here"


def text(answer: dict[str, Any]) -> str:  # Any: JSON
    """For people."""
    rows = [(row.get("kernel", row["file"]), sentence(row)) for row in answer["certificates"]]
    return f"Certificates in {answer['folder']}\n{entries(rows) or '  none'}"


def sentence(row: dict[str, Any]) -> str:  # Any: JSON
    """One certificate."""
    if "kernel" not in row:
        return f"cannot be read: {row['reason']}"
    shown = f"{', '.join(row['dtypes'])}: {row['passed']} cases, {row['profile']}, {row['how']}, {row['device']}"
    shown += f", {row['written'][:10]}, report {row['report'][:12]}"
    return f"holds: {shown}" if row["valid"] else f"does not hold: {row['reason']} ({shown})"


COMMAND = Command(
    name="certificates",
    summary="which kernels conformance runs have shown to be right on this machine",
    add_arguments=lambda _: None,
    answer=answer,
    text=text,
)
