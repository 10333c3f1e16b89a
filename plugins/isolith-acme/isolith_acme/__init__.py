"""Isolith's operators on acme devices."""

import torch

from isolith import Backend, WhyNot, hookimpl


def why_unavailable() -> WhyNot:
    """Say why no acme device can be used, or None; the vendor's software is first looked at here."""
    device = getattr(torch, "acme", None)  # what the vendor's extension of torch registers for its device type
    if device is None:
        return "torch has no device type 'acme': the extension that brings it is not loaded"
    if not device.is_available():
        return "torch.acme finds no device"
    return None


@hookimpl
def isolith_backend() -> Backend:
    """Describe the backend; its kernels are imported when they are first needed."""
    return Backend(
        name="acme",
        device_type="acme",
        api_version=1,
        why_unavailable=why_unavailable,
        kernels=(f"{__name__}.norm", f"{__name__}.moe", f"{__name__}.quant"),
        twin=f"{__name__}.twin",
    )
