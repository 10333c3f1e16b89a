"""The least time of every call on a chip that is not here, on paper: bytes and FLOPs over the chip's rates.

Nothing runs. The rates are what such chips were measured to do by others, not what their datasheets promise; a
benchmark on the chip measures its own.
"""

from collections.abc import Iterable
from types import MappingProxyType

from isolith.commands.command import columns
from isolith_conformance.bench.fill import Fill
from isolith_conformance.bench.machine import roofline
from isolith_conformance.bench.record import Limits
from isolith_conformance.bench.text import seconds
from isolith_conformance.bench.workloads import Setting, Workload


def rates(bandwidth_gbs: float, bfloat16_gflops: float, float32_gflops: float, name: str) -> Limits:
    """A chip whose 8-bit products are twice as fast as those of bfloat16."""
    return Limits(
        read_gbs=bandwidth_gbs,
        copy_gbs=bandwidth_gbs,
        gflops={
            "bfloat16": bfloat16_gflops,
            "float16": bfloat16_gflops,
            "float32": float32_gflops,
            "float8": 2 * bfloat16_gflops,
            "int8": 2 * bfloat16_gflops,
        },
        assumed={"float4": "no such products before sm_100"},
        launch_us=None,
        how=f"on paper: {name}, {bandwidth_gbs / 1000:g} TB/s, {bfloat16_gflops / 1000:g} TFLOP/s in bfloat16,"
        f" twice that in 8 bits, {float32_gflops / 1000:g} in float32",
    )


CHIPS = MappingProxyType(
    {
        "h100": rates(3000, 798e3, 60e3, "H100 SXM"),
        "h200": rates(4300, 788e3, 60e3, "H200 SXM"),
    }
)
"""Memory and products as measured on such cards; float32 on vector units, 67 TFLOP/s by the datasheet, less a tenth."""


def floors(chip: str, chosen: Iterable[tuple[Setting, list[Workload]]]) -> str:
    """A table of the calls: bytes, FLOPs, the least time, and what takes it."""
    limits = CHIPS[chip]
    rows = [["operator", "call", "context", "tokens", "MB", "GFLOP", "least", "by", "note"]]
    for setting, calls in chosen:
        for one in calls:
            operator = one.operator
            cost = operator.cost(**operator.arguments(**one.make(Fill("meta"))))
            least, bound = roofline(cost, limits)
            size = f"{(cost.bytes_read + cost.bytes_written) / 1e6:,.2f}"
            where = [f"{setting.context}", f"{setting.tokens}"]
            rows.append(
                [operator.name, one.label, *where, size, f"{cost.flops / 1e9:,.2f}", seconds(least), bound, one.note]
            )
    return f"{columns(rows)}\n{limits.how}"
