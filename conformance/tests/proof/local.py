"""A runner in this process: what a check asks of a backend, asked of a function. For functions of our own alone."""

from collections.abc import Callable

import torch

from isolith_conformance.execute import Options, Response, Values, run
from isolith_conformance.layers import UNITS


class Local:
    """Runs calls on functions that a factory makes: one that has run before, and fresh ones.

    Args:
        make: Makes the function; called once for each "process".
        validates: Whether illegal calls are refused, as the dispatcher refuses them.
        refuses: Whether every legal call is refused.
        warm: A call that the first process has run before anything is checked.
    """

    def __init__(
        self,
        make: Callable[[], Callable],
        validates: bool = True,
        refuses: bool = False,
        warm: tuple[str, Values] | None = None,
    ) -> None:
        self.make, self.validates, self.refuses = make, validates, refuses
        self.functions: dict[str, Callable] = {}
        if warm is not None:
            self.run(warm[0], "", warm[1], Options())

    def run(self, operator: str, kernel: str, arguments: Values, options: Options, which: str = "first", earlier=None):
        """Run one call."""
        unit = UNITS[operator]
        function = self.functions.setdefault(which, None) or self.make()
        self.functions[which] = function

        def call(**given):
            if self.validates:
                given = unit.arguments(**given)
                unit.validate(given, values=True)
            if self.refuses:
                from isolith import NoKernelError

                raise NoKernelError("takes nothing")
            return function(**given)

        response = run(unit, call, arguments, options, torch.device("cpu"), earlier)
        return Response(**response.as_message() | {"executed": [f"{operator} {kernel}"] * (response.status == "ran")})

    def end(self, which: str) -> None:
        """Forget a function, so that the next call gets a fresh one."""
        self.functions.pop(which, None)
