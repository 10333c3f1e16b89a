"""The legal family of a call: the reference and the operator's variants, in the orders that every sum may be taken in.

A sum in float32 may be taken in any order, so that one member adds its terms one after the other, whatever operator it
is: references and variants are run with torch's products and sums replaced. Others see their inputs off by a rounding,
and where activations are quantised on the way, codes next to a boundary on either side of it.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from isolith.config import Settings
from isolith.dispatch import Dispatcher, references, using
from isolith.operator import AnyOperator, in_float64
from isolith.ops import OPERATORS
from isolith.registry import Registry
from isolith_conformance.execute import leaves
from isolith_conformance.limits import CODE_LEAN, INPUT_ROUNDING, STANDARD

Arguments = Mapping[str, Any]  # Any: a call's own values
Function = Callable[..., Any]  # Any: any signature

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
FEW = 4096
"""Elements of a call's float32 results that are few."""
MOST_WORK = 2**30
"""Elements that a sum in order may touch; a larger one keeps torch's order."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a call may give.

    Args:
        gold: In float64, unrounded; outputs, then mutated arguments.
        members: The legal results; the first is the reference's.
        variants: Which of them are the operator's own variants; those behind see other inputs.
        moved: By float dtype, gold after a change of the inputs by that dtype's rounding.
        requantised: Whether legal roundings change codes on the way.
    """

    gold: list[Tensor]
    members: list[list[Tensor]]
    variants: slice
    moved: dict[torch.dtype, list[Tensor]]
    requantised: bool


def family_of(operator: AnyOperator, arguments: Arguments, declared: tuple[str, ...] = ()) -> Family:
    """Run everything that is legal for a call.

    Args:
        operator: What is called.
        arguments: As they are before the call.
        declared: Numerics that the kernel has declared, of those in `operator.declared`.
    """
    wide, watch = in_float64(operator, arguments), Numerics()
    gold = evaluate(operator, operator.reference, wide, watch)
    floats = not operator.bitwise and any(leaf.is_floating_point() for leaf in gold)
    how = [Numerics()]
    members = [evaluate(operator, operator.reference, arguments, how[0])]
    dtypes = [leaf.dtype for leaf in members[0]]
    if floats:
        # To narrower dtypes the last rounding is most of the error, whatever the order.
        how += [
            Numerics(in_order=way) for way in (("forward", "backward") if torch.float32 in dtypes else ("forward",))
        ]
        how += [Numerics(lean=lean) for lean in ((CODE_LEAN, -CODE_LEAN) if watch.codes else ())]
        members += [evaluate(operator, operator.reference, arguments, each) for each in how[1:]]
    variants = [*operator.variants, *(function for name in declared for function in operator.declared.get(name, ()))]
    runs = [(function, Numerics()) for function in variants]
    if floats and few(members[0]):
        runs += [(function, Numerics(in_order=way)) for function in variants for way in ("forward", "backward")]
    members += [evaluate(operator, function, arguments, each) for function, each in runs]
    own = slice(len(members) - len(runs), len(members))
    if floats:
        members += inputs_rounded(operator, wide, members[0])
    codes = [each.codes for each in (*how, *(each for _, each in runs))]
    return Family(
        gold=gold,
        members=members,
        variants=own,
        moved=moved_gold(operator, wide, set(dtypes)) if floats else {},
        requantised=any(differ(watch.codes, each) for each in codes),
    )


def inputs_rounded(operator: AnyOperator, wide: Arguments, like: list[Tensor]) -> list[list[Tensor]]:
    """Members that see their inputs off by a rounding, in the dtypes of a result; `wide` is the call of gold."""
    members = []
    for draw in range(draws_of(like)):
        near = evaluate(operator, operator.reference, nudged(wide, INPUT_ROUNDING, draw))
        members.append([leaf.to(other.dtype) for leaf, other in zip(near, like, strict=True)])
    return members


def draws_of(results: list[Tensor]) -> int:
    """How many changes of the inputs are tried: more where there are few errors to tell their legal size by."""
    if all(leaf.dtype != torch.float32 for leaf in results):
        return 2
    return 8 if few(results) else 4


def few(results: list[Tensor]) -> bool:
    """Whether there are float32 results of so few elements that one of them may be most of the error."""
    return 0 < sum(leaf.numel() for leaf in results if leaf.dtype == torch.float32) < FEW


def moved_gold(operator: AnyOperator, wide: Arguments, dtypes: set[torch.dtype]) -> dict[torch.dtype, list[Tensor]]:
    """Gold after a change of the inputs by each dtype's rounding."""
    sizes = {dtype: torch.finfo(dtype).eps / 2 for dtype in dtypes & set(STANDARD)}
    return {dtype: evaluate(operator, operator.reference, nudged(wide, size, 0)) for dtype, size in sizes.items()}


def differ(codes: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two runs have quantised to other codes."""
    if len(codes) != len(others):
        return True
    return any(not torch.equal(a, b) for a, b in zip(codes, others, strict=True))


def nudged(arguments: Arguments, size: float, seed: int) -> dict[str, Any]:  # Any: a call's own values
    """The call with every float64 value off by a random part of at most `size`."""
    generator = torch.Generator().manual_seed(seed)

    def moved(value: Tensor) -> Tensor:
        return value * (1 + size * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1))

    return {
        name: moved(value) if isinstance(value, Tensor) and value.dtype == torch.float64 else value
        for name, value in arguments.items()
    }


@functools.cache
def only_references() -> Dispatcher:
    """A dispatcher without a backend: no plugin is found, none is imported."""
    return references(Dispatcher(Registry(operators=OPERATORS, plugins=()), Settings(fallback="allow")))


def copied(arguments: Arguments) -> dict[str, Any]:  # Any: a call's own values
    """The arguments with tensors of their own."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def evaluate(
    operator: AnyOperator, function: Function, arguments: Arguments, numerics: "Numerics | None" = None
) -> list[Tensor]:
    """Outputs, then mutated arguments, of a function run on copies, with references for the parts of a composite."""
    given = copied(arguments)
    with using(only_references()), numerics or Numerics():
        outputs = function(**given)
    return leaves(outputs) + [given[name] for name in operator.mutates]


class Numerics(TorchFunctionMode):
    """Run torch with other roundings, and keep the codes that are made on the way.

    Args:
        in_order: "forward" or "backward": add the terms of float32 products and sums one after the other.
        lean: Move what is quantised by this part of the format's largest value, up or down in magnitude, unless it
            lies on a boundary exactly.
    """

    def __init__(self, in_order: str = "", lean: float = 0.0) -> None:
        super().__init__()
        self.in_order = in_order
        self.lean = lean
        self.codes: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # Any: torch's own protocol
        kwargs = kwargs or {}
        if func is torch.Tensor.to and len(args) == 2 and args[1] in LARGEST and args[0].is_floating_point():
            codes = self.quantised(*args)
            self.codes.append(codes.view(torch.uint8))
            return codes
        if func is torch.Tensor.round and self.lean and not kwargs:
            return self.leaning(args[0], torch.round, LARGEST[torch.int8])
        if self.in_order and func in IN_ORDER:
            found = IN_ORDER[func](self.in_order, *args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)

    def quantised(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The codes of values that are within the format's range."""
        if not self.lean or dtype == torch.int8:
            return values.to(dtype)
        return self.leaning(values, lambda each: each.to(dtype).to(values.dtype), LARGEST[dtype]).to(dtype)

    def leaning(self, values: Tensor, rounded: Callable[[Tensor], Tensor], largest: float) -> Tensor:
        """Rounded values, those next to a boundary to one side of it."""
        step = self.lean * largest
        above, below = (
            rounded((values + step).clamp(-largest, largest)),
            rounded((values - step).clamp(-largest, largest)),
        )
        exact = values == (above + below) / 2
        return torch.where(exact, rounded(values.clamp(-largest, largest)), above)


def turned(way: str, *parts: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """The terms' factors, side by side, from the first to the last or from the last to the first."""
    terms = list(zip(*parts, strict=True))
    return terms[::-1] if way == "backward" else terms


def product_in_order(way: str, a: Tensor, b: Tensor) -> Tensor | None:
    """a @ b, one column of a after the other; None where torch is to do it."""
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.dim() < 2 or b.dim() < 2:
        return None
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    total = a.new_zeros((*batch, a.shape[-2], b.shape[-1]))
    if total.numel() * a.shape[-1] > MOST_WORK:
        return None
    if not batch:
        b = b.contiguous()
        for column, row in turned(way, a.split(1, 1), b.split(1, 0)):
            total.addmm_(column, row)
        return total
    for column, row in turned(way, a.split(1, -1), b.split(1, -2)):
        total += column * row
    return total


def einsum_in_order(way: str, equation: str, *operands: Tensor) -> Tensor | None:
    """A product of two tensors, summed over one index; None for any other."""
    names, result = equation.replace(" ", "").split("->")
    summed = sorted(set(names) - set(result) - {","})
    if len(operands) != 2 or len(summed) != 1 or any(each.dtype != torch.float32 for each in operands):
        return None
    sides = names.split(",")
    axes = [side.index(summed[0]) for side in sides if summed[0] in side]
    sizes = {
        letter: n
        for side, each in zip(sides, operands, strict=True)
        for letter, n in zip(side, each.shape, strict=True)
    }
    total = operands[0].new_zeros([sizes[letter] for letter in result])
    if len(axes) != 2 or total.numel() * sizes[summed[0]] > MOST_WORK:
        return None
    left, right = (each.unbind(axis) for each, axis in zip(operands, axes, strict=True))
    single = ",".join(side.replace(summed[0], "") for side in sides) + "->" + result
    for a, b in turned(way, left, right):
        total += torch.einsum(single, a, b)
    return total


def sum_in_order(  # Any: torch's dim
    way: str, x: Tensor, dim: Any = None, keepdim: bool = False, **_: object
) -> Tensor | None:
    """x.sum(dim), one term after the other; None where torch is to do it."""
    if x.dtype != torch.float32 or not isinstance(dim, int) or x.dim() == 0:
        return None
    total = torch.zeros_like(x.select(dim, 0)) if x.shape[dim] else x.sum(dim)
    for (part,) in turned(way, x.unbind(dim)):
        total += part
    return total.unsqueeze(dim) if keepdim else total


def mean_in_order(  # Any: torch's dim
    way: str, x: Tensor, dim: Any = None, keepdim: bool = False, **_: object
) -> Tensor | None:
    """x.mean(dim), likewise."""
    total = sum_in_order(way, x, dim, keepdim)
    return None if total is None else total / x.shape[dim]


IN_ORDER: dict[Any, Callable[..., Tensor | None]] = {  # Any: torch's functions
    torch.matmul: product_in_order,
    torch.Tensor.matmul: product_in_order,
    torch.Tensor.__matmul__: product_in_order,
    torch.einsum: einsum_in_order,
    torch.sum: sum_in_order,
    torch.Tensor.sum: sum_in_order,
    torch.mean: mean_in_order,
    torch.Tensor.mean: mean_in_order,
}
