"""A kernel: one backend's function for one operator, with the conditions under which it may run."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from isolith.dtypes import dtype_name

if TYPE_CHECKING:
    from isolith.backend import Backend
    from isolith.operator import Operator

P = ParamSpec("P")
R = TypeVar("R")

WhyNot = str | None
"""None, or the sentence that says why not."""

Dtypes = tuple[torch.dtype, ...]


@dataclass(frozen=True, kw_only=True)
class Requires:
    """What a kernel needs, as data: readable without the device, so that a support table can be made anywhere.

    Args:
        dtypes: Dtypes of the first tensor argument, or of each argument named.
        contiguous: Whether every tensor argument must be contiguous.
        arch: A range such as ">=9.0" or "==5.x" over what the backend's `arch` returns.
        sdk: Ranges by distribution name, such as {"torch_npu": ">=2.8"}, over the backend's `versions`.
        missing: Says what the kernel calls and this installation has not, where a version does not tell; or None.
    """

    dtypes: Dtypes | Mapping[str, Dtypes] = ()
    contiguous: bool = False
    arch: str = ""
    sdk: Mapping[str, str] = field(default_factory=dict)
    missing: Callable[[], WhyNot] | None = None

    def why_not_here(self, backend: "Backend") -> WhyNot:
        """Refuse on grounds of the device and its software, whatever the arguments."""
        if self.arch:
            arch = backend.arch() if backend.arch else None
            if arch is None or not in_range(arch, self.arch):
                return f"arch={arch or 'unknown'}; needs {self.arch}"
        versions = backend.versions() if self.sdk and backend.versions else {}
        for name, wanted in self.sdk.items():
            if name not in versions:
                return f"{name} is not installed; needs {name}{wanted}"
            if not in_range(versions[name], wanted):
                return f"{name}={versions[name]}; needs {wanted}"
        return self.missing() if self.missing else None

    def why_not(self, arguments: Mapping[str, Any]) -> WhyNot:  # Any: a call's own values
        """Refuse on grounds of single arguments."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        if isinstance(self.dtypes, Mapping):
            by_name = self.dtypes
        else:
            by_name = {next(iter(tensors), ""): self.dtypes} if self.dtypes else {}
        for name, dtypes in by_name.items():
            if name in tensors and tensors[name].dtype not in dtypes:
                takes = ", ".join(sorted(map(dtype_name, dtypes)))
                return f"{name} is {dtype_name(tensors[name].dtype)}; takes {takes}"
        if self.contiguous:
            for name, tensor in tensors.items():
                if not tensor.is_contiguous():
                    return f"{name} is not contiguous; strides {tuple(tensor.stride())}"
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel(Generic[P, R]):
    """A backend's function for an operator, as `implements` marked it."""

    operator: "Operator[P, R]"
    name: str
    fn: Callable[P, R]
    requires: Requires
    why_not: Callable[..., WhyNot] | None
    nondeterministic: bool = False
    batch_invariant: bool = False
    declares: tuple[str, ...] = ()
    owner: str = ""
    """The backend or the kernel pack that brings it."""

    @property
    def full_name(self) -> str:
        """As settings and reports spell it: "cpu.sparse_attn", "cpu.fast.sparse_attn"."""
        return f"{self.owner}.{self.name}"


def implements(
    operator: "Operator[P, R]",
    *,
    requires: Requires | None = None,
    why_not: Callable[..., WhyNot] | None = None,
    nondeterministic: bool = False,
    batch_invariant: bool = False,
    declares: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Kernel[P, R]]:
    """Mark a function as a kernel of `operator`; nothing is registered until its backend is loaded.

    Args:
        operator: The operator; the function has its signature.
        requires: What relates to one argument or to the device, as data.
        why_not: What relates arguments to each other: gets every argument by name, names those it uses and takes the
            others as `**_`; returns a sentence with the number in it, or None.
        nondeterministic: Declares that two runs may differ, each within the limits.
        batch_invariant: Claims that a row's result is the same to the bit whatever else is in the batch.
        declares: Numerics of the kernel that the operator allows to those that say so: "tf32" for hc_pre.

    Raises:
        ValueError: where the operator allows no such numerics.
    """
    if unknown := [name for name in declares if name not in operator.declared]:
        raise ValueError(
            f"{operator.name} allows {sorted(operator.declared) or 'none'} to be declared; got {unknown[0]!r}"
        )

    def mark(fn: Callable[P, R]) -> Kernel[P, R]:
        return Kernel(
            operator=operator,
            name=fn.__name__,
            fn=fn,
            requires=requires or Requires(),
            why_not=why_not,
            nondeterministic=nondeterministic,
            batch_invariant=batch_invariant,
            declares=declares,
        )

    return mark


def in_range(version: str, wanted: str) -> bool:
    """Whether `version` lies in a comma-separated range; "==5.x" means any 5."""
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*([\w.+]+?)\s*", part)
        if match is None:
            raise ValueError(f"a range is written like '>=2.8,<3'; got {wanted!r}")
        sign, bound = match.groups()
        if bound.endswith(".x"):
            holds = f"{version}.".startswith(bound[:-1])
            holds = holds if sign == "==" else not holds
        else:
            found, limit = TorchVersion(version), TorchVersion(bound)
            holds = {">=": found >= limit, "<=": found <= limit, ">": found > limit, "<": found < limit}.get(
                sign, (found == limit) == (sign == "==")
            )
        if not holds:
            return False
    return True
