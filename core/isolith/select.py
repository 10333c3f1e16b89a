"""Selection: which step of the ladder takes a call, and why the steps above it did not.

A kernel of the backend, then the composition, then the reference on the device, then the `cpu` backend with copies to
the host and back.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from isolith.backend import Backend
from isolith.config import Settings
from isolith.errors import ArgumentError
from isolith.kernel import WhyNot
from isolith.plugins import AnyKernel
from isolith.registry import Registry

if TYPE_CHECKING:
    from isolith.operator import AnyOperator

Step = Literal["kernel", "composition", "reference", "host"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a call: its name, and None or the sentence that rules it out."""

    step: Step
    name: str
    why_not: WhyNot
    kernel: AnyKernel | None = None
    note: str = ""
    """What is known of it that does not rule it out."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Every candidate for one call, best first."""

    operator: str
    device: str
    candidates: tuple[Candidate, ...]
    native: bool
    """Whether the reference is this device's own implementation, so that running it is no step down."""
    pin: str | None = None
    """The candidate that the user asked for by name."""

    @property
    def chosen(self) -> Candidate | None:
        """The first candidate that nothing rules out."""
        return next((candidate for candidate in self.candidates if candidate.why_not is None), None)

    @property
    def is_fallback(self) -> bool:
        """Whether the chosen candidate is a step down: another than was asked for, or a reference that is not native.

        A composition is none: each of its parts is selected, and falls back or not, by itself.
        """
        if self.chosen is None or self.pin is not None:
            return self.chosen is not None and self.chosen.name != self.pin
        return self.chosen.step in ("reference", "host") and not self.native

    @property
    def reasons(self) -> str:
        """Why the candidates above the chosen one were not taken, a line each."""
        lines = []
        for candidate in self.candidates:
            if candidate.why_not is None:
                break
            lines.append(f"  {candidate.name}: {candidate.why_not}")
        return "\n".join(lines) or f"  no backend here has a kernel for {self.operator} on {self.device!r}"

    def as_dict(self) -> dict[str, Any]:  # Any: JSON
        """For JSON."""
        rows = [{k: v for k, v in asdict(c).items() if k != "kernel"} for c in self.shown]
        chosen = self.chosen.name if self.chosen else None
        return {"operator": self.operator, "device": self.device, "chosen": chosen, "candidates": rows}

    @property
    def shown(self) -> tuple[Candidate, ...]:
        """The candidates without their functions."""
        return tuple(replace(candidate, kernel=None) for candidate in self.candidates)

    def __str__(self) -> str:
        lines = [f"{self.operator} on {self.device}"]
        for candidate in self.candidates:
            mark = "->" if candidate is self.chosen else "  "
            verdict = candidate.why_not or ("chosen" if candidate is self.chosen else "would do")
            lines.append(f"{mark} {candidate.name}: {verdict}{candidate.note and f'; {candidate.note}'}")
        return "\n".join(lines)


def device_of(arguments: Mapping[str, Any]) -> str:  # Any: a call's own values
    """The type of the device that the call's tensors are on; "cpu" for a call without tensors."""
    return next((value.device.type for value in arguments.values() if isinstance(value, Tensor)), "cpu")


def select(
    registry: Registry,
    settings: Settings,
    operator: "AnyOperator",
    arguments: Mapping[str, Any],  # Any: a call's own values
    device_type: str | None = None,
) -> Explanation:
    """List the candidates for a call that has passed its check.

    Args:
        registry: Where operators and backends come from.
        settings: The user's choices.
        operator: What is called.
        arguments: All its arguments by name.
        device_type: The device to select for; that of the tensors when None.
    """
    device = device_type or device_of(arguments)
    backends = serving(registry, settings, operator, device)
    rows = [
        candidate(registry, settings, backend, kernel, arguments)
        for backend in backends
        for kernel in registry.kernels(backend, operator.name)
    ]
    if operator.composed_of:
        rows.append(Candidate(step="composition", name="composition", why_not=None))
    rows.append(Candidate(step="reference", name="reference", why_not=None))
    if device != "cpu":
        rows.append(Candidate(step="host", name="cpu with copies", why_not=None))
    native = any(backend.reference_is_native for backend in backends)
    pin = settings.pins.get(operator.name)
    if pin is not None:
        # A pin comes first; what it would have overtaken stands behind it, for the case that it refuses.
        rows.sort(key=lambda row: row.name != pin)
    return Explanation(operator=operator.name, device=device, candidates=tuple(rows), native=native, pin=pin)


def candidate(
    registry: Registry,
    settings: Settings,
    backend: Backend,
    kernel: AnyKernel,
    arguments: Mapping[str, Any],  # Any: a call's own values
) -> Candidate:
    """A kernel as a candidate for a call: what it requires and refuses, what is known of it, what has shown it."""
    why_not = kernel.requires.why_not_here(backend) or refusal(kernel, arguments)
    known = () if why_not else registry.quirks(kernel, backend, arguments)
    refused = next((quirk.sentence for quirk in known if quirk.effect == "refuse"), None)
    if settings.require and not why_not and not refused:
        from isolith.certificates import why_uncertified  # few ask for them: importing isolith stays cheap

        refused = why_uncertified(kernel, backend, arguments)
    return Candidate(
        step="kernel",
        name=kernel.full_name,
        why_not=why_not or refused,
        kernel=kernel,
        note="; ".join(quirk.sentence for quirk in known if quirk.effect == "tell"),
    )


def serving(registry: Registry, settings: Settings, operator: "AnyOperator", device: str) -> tuple[Backend, ...]:
    """The backends to ask: the one that the user named, or all that serve the device."""
    if not settings.backend:
        return registry.serving(device)
    backend = registry.backend(settings.backend)
    if backend.device_type != device:
        raise ArgumentError(
            f"{operator.name}: ISOLITH_BACKEND={backend.name} serves {backend.device_type!r} tensors; "
            f"got {device!r} tensors."
        )
    return (backend,)


def refusal(kernel: AnyKernel, arguments: Mapping[str, Any]) -> WhyNot:  # Any: a call's own values
    """Why a kernel does not take these arguments."""
    reason = kernel.requires.why_not(arguments)
    if reason is None and kernel.why_not is not None:
        reason = kernel.why_not(**arguments)
    return reason
