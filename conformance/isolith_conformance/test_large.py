"""Large calls are right in every corner: rows repeated beyond 2^31 elements on devices, to what fits on a host.

The rows of a sample, made a prime number of them so that a wrapped offset meets another row, are repeated on the
device; only some copies come back, the first, the last and those at each 2^31 boundary, and each is a small call's
result, of which gold is known.
"""

from torch import Tensor

from isolith_conformance.case import check
from isolith_conformance.rows import Rows, rows_of
from isolith_conformance.trial import Inapplicable, Trial

ON_A_HOST = 1 << 21
"""Elements of the largest tensor of a call on a host."""
ON_A_DEVICE = (1 << 32) + (1 << 20)
"""On a device: beyond where 32-bit offsets wrap, signed or not."""
BOUNDARIES = (1 << 31, 1 << 32)


@check("large", "few", empty=False, without="model")
def test_rows_far_behind_in_memory_are_right(trial: Trial) -> None:
    operator, arguments = trial.case.operator, trial.case.arguments
    rows = None if isinstance(arguments.get("cu_seqlens"), Tensor) else rows_of(operator, arguments)
    if rows is None:
        raise Inapplicable("the call has no rows to repeat")
    chosen = [row % rows.count for row in range(odd_prime(rows.count))]
    small = rows.take(chosen)
    largest = max((small[name].numel() for name in rows.names), default=1)
    most = ON_A_HOST if trial.case.unit.on_a_host else ON_A_DEVICE
    repeats = max(2, -(-most // largest))
    copies = corners(small, rows, repeats)
    response = trial.run(small, rows=rows.names, repeats=repeats, copies=tuple(copies))
    for place, copy in enumerate(copies):
        trial.accept(
            [result[place] for result in response.results], small, f"rows repeated {repeats} times, copy {copy}"
        )


def corners(small: dict[str, Tensor], rows: Rows, repeats: int) -> list[int]:
    """The copies to look at: first, second, last, and those around each boundary, in elements and in bytes."""
    found = {0, 1, repeats - 1}
    for name in rows.names:
        for size in {small[name].numel(), small[name].nbytes}:
            for boundary in BOUNDARIES if size else ():
                found |= {
                    copy for copy in (boundary // size - 1, boundary // size, boundary // size + 1) if copy < repeats
                }
    return sorted(found)


def odd_prime(count: int) -> int:
    """The least prime from `count`, at least 3: no power of two is a multiple of so many rows."""
    number = max(3, count)
    while any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number
