"""Right kernels that compute otherwise than the reference does: other orders, blocks, legal roundings, free ties."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_flatten

from isolith import OPERATORS


@dataclass(frozen=True, kw_only=True)
class Right:
    """A right kernel; it may write only what its operator declares."""

    name: str
    operator: str
    function: Callable

    def load(self) -> Callable[..., list[Tensor]]:
        """A call's arguments -> outputs, then mutated arguments."""

        def run(**arguments):
            tensors = [leaf for leaf in tree_flatten(self.function(**arguments))[0] if isinstance(leaf, Tensor)]
            return tensors + [arguments[name] for name in OPERATORS[self.operator].mutates]

        return run


def right(listed: list, operator: str) -> Callable:
    """Add the function below to a list, as a right kernel of an operator."""

    def add(function):
        listed.append(Right(name=function.__name__, operator=operator, function=function))
        return function

    return add
