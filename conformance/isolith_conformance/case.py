"""What there is to check: every kernel of a backend, with every sample of its operator, in every dtype."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch

from isolith import Make
from isolith.dtypes import dtype_name
from isolith.operator import AnyOperator
from isolith.sample import Sample
from isolith_conformance import wire
from isolith_conformance.execute import Values
from isolith_conformance.judge import Expectation, expect
from isolith_conformance.layers import UNITS

Scope = Literal["full", "quick"]
Samples = Literal["every", "one", "few", "first", "none"]
MARK = "isolith_check"
"""The attribute by which a test function is a check."""
NEVER_ON_A_HOST = frozenset({"device"})


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One candidate under check: a backend's kernel, its composition, or its native reference.

    Args:
        backend: The plugin's name, as the user gave it.
        operator: The operator's or layer's name.
        kernel: The candidate as `explain` spells it; "" for an operator that the backend has nothing for.
        device: The torch device type that it runs on.
        simulated: That device is simulated in the host's memory.
        native: The backend's own implementation is the reference.
        nondeterministic: Declared: two runs may differ.
        batch_invariant: Claimed: a row does not depend on the others.
        declares: Numerics that the operator allows to kernels that say so.
    """

    backend: str
    operator: str
    kernel: str
    device: str = "cpu"
    simulated: bool = False
    native: bool = False
    nondeterministic: bool = False
    batch_invariant: bool = False
    declares: tuple[str, ...] = ()

    @property
    def on_a_host(self) -> bool:
        """Whether it has no more than a host's memory, speed and order of work."""
        return self.device == "cpu" or self.simulated


@dataclass(frozen=True, kw_only=True)
class Case:
    """One check of one candidate with one sample in one dtype, under one seed."""

    check: str
    unit: Unit
    sample: str
    dtype: str
    seed: int
    tags: frozenset[str] = frozenset()
    scope: Scope = "full"

    @property
    def id(self) -> str:
        """backend/operator/kernel/sample/dtype/check; with the seed, all that reproduces it."""
        kernel = self.unit.kernel.rpartition(".")[2] or "none"
        return "/".join((self.unit.backend, self.unit.operator, kernel, self.sample, self.dtype, self.check))

    @property
    def operator(self) -> AnyOperator:
        """The operator, or the layer."""
        return UNITS[self.unit.operator]

    @property
    def arguments(self) -> Values:
        """All arguments by name, on the host; equal seeds give equal bytes."""
        return arguments_of(self.unit.operator, self.sample, self.dtype, self.seed)

    @property
    def expectation(self) -> Expectation:
        """Gold and the legal family."""
        return expectation_of(self.unit.operator, self.sample, self.dtype, self.seed, self.unit.declares)

    @property
    def make(self) -> Make:
        """What makes the tensors of this case, from the start."""
        return make_for(self.unit.operator, self.dtype, self.seed)

    @property
    def input_hash(self) -> str:
        """SHA-256 of the arguments as they cross to the backend."""
        return input_hash_of(self.unit.operator, self.sample, self.dtype, self.seed)


def make_for(operator: str, dtype: str, seed: int) -> Make:
    """What makes an operator's tensors under a seed."""
    return Make(wire.DTYPES[dtype], seed=f"{operator}:{seed}")


@lru_cache(maxsize=6)
def samples_of(operator: str, dtype: str, seed: int) -> Mapping[str, Sample]:
    """The samples of an operator by name."""
    return {sample.name: sample for sample in UNITS[operator].samples(make_for(operator, dtype, seed))}


def arguments_of(operator: str, sample: str, dtype: str, seed: int) -> Values:
    """All arguments of a sample by name."""
    return UNITS[operator].arguments(**samples_of(operator, dtype, seed)[sample].arguments)


@lru_cache(maxsize=4)
def input_hash_of(operator: str, sample: str, dtype: str, seed: int) -> str:
    """The hash of a sample's arguments; kept for the checks that come next."""
    return hashlib.sha256(wire.encode(arguments_of(operator, sample, dtype, seed))).hexdigest()


@lru_cache(maxsize=4)
def expectation_of(operator: str, sample: str, dtype: str, seed: int, declared: tuple[str, ...] = ()) -> Expectation:
    """What is due for a sample from a kernel with such numerics; kept for the checks that come next."""
    arguments, tags = arguments_of(operator, sample, dtype, seed), samples_of(operator, dtype, seed)[sample].tags
    return expect(UNITS[operator], arguments, "exact" in tags, declared)


@lru_cache(maxsize=256)
def labels(operator: str, seed: int) -> tuple[tuple[str, frozenset[str], bool], ...]:
    """(name, tags, whether it has work to do) of the samples, in order."""
    first = dtype_name(UNITS[operator].sample_dtypes[0])
    return tuple(
        (sample.name, sample.tags, has_work(sample.arguments)) for sample in samples_of(operator, first, seed).values()
    )


def has_work(arguments: Mapping[str, Any]) -> bool:  # Any: a call's own values
    """Whether the first tensor has an element."""
    return next((value.numel() > 0 for value in arguments.values() if isinstance(value, torch.Tensor)), True)


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a test function checks, and with which samples.

    Args:
        name: Its verdict's name.
        samples: "every" sample in every dtype; up to six samples in "one" dtype; a "few", or the "first", in one; or
            "none", for a check that looks at the operator as a whole.
        takes: Whether the check says anything of an operator; None where it does of every one.
        only: The one tag that the samples must have.
        without: A tag that they must not have.
        invariants: Whether samples are taken too that have no gold, but invariants.
        empty: Whether samples without a single element count.
        unclaimed: Whether the check is about operators that a backend has nothing for, instead of about kernels.
        quick: Whether a quick run has it.
    """

    name: str
    samples: Samples
    takes: Callable[[AnyOperator], bool] | None = None
    only: str = ""
    without: str = ""
    invariants: bool = False
    empty: bool = True
    unclaimed: bool = False
    quick: bool = True


def check(
    name: str,
    samples: Samples = "one",
    **more: Any,  # Any: fields of Check
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test function as a check: it gets one `trial` for each of its cases. Arguments are those of `Check`."""

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        setattr(function, MARK, Check(name=name, samples=samples, **more))
        return function

    return mark


MOST_SAMPLES = {
    ("every", "quick"): 4,
    ("one", "full"): 6,
    ("one", "quick"): 1,
    ("few", "full"): 3,
    ("few", "quick"): 1,
}
"""How many samples a kind of check takes at most; they are spread over the operator's list."""
MOST_RELATIONS = {"full": 1000, "quick": 1}
"""Of how many relations a run tries each operator's."""


def cases(
    kind: Check, unit: Unit, scope: Scope, seed: int, dtypes: tuple[str, ...] = (), case: str = ""
) -> Iterator[Case]:
    """The cases of a check for one candidate.

    Args:
        kind: The check.
        unit: The candidate.
        scope: How many of them.
        seed: Of their inputs.
        dtypes: These dtypes alone; empty for all.
        case: The id of the one case wanted, whatever the scope; empty for all.
    """
    if case:
        whole = cases(replace(kind, samples="every"), unit, "full", seed)
        yield from (
            one for one in (*whole, *cases(replace(kind, samples="none"), unit, "full", seed)) if one.id == case
        )
        return
    operator = UNITS[unit.operator]
    if (
        bool(unit.kernel) == kind.unclaimed
        or (kind.takes and not kind.takes(operator))
        or (scope == "quick" and not kind.quick)
    ):
        return
    if kind.samples == "none":
        yield Case(
            check=kind.name, unit=unit, sample="-", dtype=dtype_name(operator.sample_dtypes[0]), seed=seed, scope=scope
        )
        return
    wanted = [name for name in map(dtype_name, operator.sample_dtypes) if not dtypes or name in dtypes]
    if kind.samples != "every" or scope == "quick":
        wanted = wanted[:1] if "bfloat16" not in wanted or kind.samples == "every" else ["bfloat16"]
    fitting = [
        (name, tags)
        for name, tags, work in labels(unit.operator, seed)
        if fits(kind, tags, scope, unit) and (work or kind.empty)
    ]
    if kind.samples == "first":
        fitting = fitting[:1]
    elif (kind.samples, scope) in MOST_SAMPLES:
        fitting = spread(fitting, MOST_SAMPLES[kind.samples, scope])
    for dtype in wanted:
        for name, tags in fitting:
            yield Case(check=kind.name, unit=unit, sample=name, dtype=dtype, seed=seed, tags=tags, scope=scope)


def fits(kind: Check, tags: frozenset[str], scope: Scope, unit: Unit) -> bool:
    """Whether a check takes samples with these tags."""
    if (unit.on_a_host and tags & NEVER_ON_A_HOST) or (scope == "quick" and tags & {"model", "slow"}):
        return False
    if kind.without and kind.without in tags:
        return False
    return (not kind.only or kind.only in tags) and (kind.invariants or "invariants" not in tags)


def spread(found: list[Any], count: int) -> list[Any]:  # Any: of whatever kind
    """So many of a list, spread over it."""
    return found if len(found) <= count else [found[(2 * at + 1) * len(found) // (2 * count)] for at in range(count)]
