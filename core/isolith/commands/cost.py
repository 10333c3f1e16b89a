"""`isolith cost`: cache bytes and FLOPs of decoding one token, by the operators' own cost functions, beside V3.2."""

import argparse
import re
from collections import defaultdict
from typing import Any

from isolith.commands.command import Command, columns, entries
from isolith.errors import ConfigError
from isolith.models import MODELS, Model

FP8_EQUIVALENT = {"float32": 2.0, "bfloat16": 2.0, "float8": 1.0, "int8": 1.0, "float4": 0.5}
"""Time of a FLOP relative to fp8: what the published 27 % and 10 % count in. fp4 weights times fp8 activations count as
fp8, float32 as bfloat16 (arXiv:2606.19348, section 1)."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "KI": 2**10, "MI": 2**20}


def parse_context(text: str) -> int:
    """`1M`, `64K` (decimal), `64Ki` (binary) or a number of tokens."""
    match = re.fullmatch(r"(\d+)(|K|M|KI|MI)", text.upper())
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"cost: --context is a number of tokens such as 4096, 64K, 64Ki or 1M; got {text!r}.")
    return int(match[1]) * UNITS[match[2]]


def totals(model: Model, context: int) -> dict[str, Any]:  # Any: JSON
    """FLOPs and bytes of one decoded token, by part of the model and by operator."""
    parts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    operators: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for call in model.calls(context):
        cost = call.operator.cost(**call.operator.arguments(**call.arguments))
        for row in (parts[call.part], operators[call.operator.name]):
            row["flops"] += cost.flops * call.times
            row["fp8_equivalent_flops"] += cost.flops * call.times * FP8_EQUIVALENT[cost.math]
            row["bytes_read"] += cost.bytes_read * call.times
    per_token = model.cache_bytes_per_token()
    return {
        "cache_bytes_per_token": per_token,
        "cache_bytes": per_token * context,
        "fixed_bytes": model.fixed_bytes(),
        "flops": sum(row["flops"] for row in parts.values()),
        "fp8_equivalent_flops": sum(row["fp8_equivalent_flops"] for row in parts.values()),
        "bytes_read": sum(row["bytes_read"] for row in parts.values()),
        "parts": {name: dict(row) for name, row in parts.items()},
        "operators": {name: dict(row) for name, row in operators.items()},
    }


def answer(options: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """The model asked for and V3.2, at one context."""
    context = parse_context(options.context)
    base = "v3.2"
    return {
        "model": options.model,
        "baseline": base,
        "context": context,
        "models": {name: totals(MODELS[name], context) for name in dict.fromkeys((options.model, base))},
    }


def percent(part: float, whole: float) -> str:
    """A ratio in percent."""
    return f"{100 * part / whole:.1f} %"


def text(answer: dict[str, Any]) -> str:  # Any: JSON
    """For people."""
    names = list(answer["models"])
    ours, base = (answer["models"][name] for name in (names[0], names[-1]))
    titles = [MODELS[name].title for name in names]
    lines = [f"{titles[0]} at {answer['context']:,} tokens of context, decoding one token", ""]
    rows = [["", *titles] + (["ratio"] if len(names) > 1 else [])]

    def add(label: str, key: str, scale: float, digits: int) -> None:
        cells = [f"{answer['models'][name][key] / scale:,.{digits}f}" for name in names]
        share = [percent(ours[key], base[key])] if len(names) > 1 and base[key] else [""] * (len(names) - 1)
        rows.append([label, *cells, *share])

    add("KV cache, bytes a token", "cache_bytes_per_token", 1, 0)
    add("KV cache here, GB", "cache_bytes", 1e9, 3)
    add("windows and states, MB", "fixed_bytes", 1e6, 1)
    add("GFLOP", "flops", 1e9, 1)
    add("GFLOP, fp8 equivalent", "fp8_equivalent_flops", 1e9, 1)
    add("GB read", "bytes_read", 1e9, 2)
    lines += [columns(rows), "", "GFLOP by part of the model"]
    parts = list(dict.fromkeys(part for name in names for part in answer["models"][name]["parts"]))
    table = [["", *titles]]
    for part in parts:
        flops = [answer["models"][name]["parts"].get(part, {}).get("flops", 0.0) for name in names]
        table.append([part, *(f"{value / 1e9:,.1f}" for value in flops)])
    lines += [columns(table), "", f"By operator, {titles[0]}"]
    by_operator = sorted(ours["operators"].items(), key=lambda row: -row[1]["flops"])
    table = [["", "GFLOP", "GB read"]]
    table += [[name, f"{row['flops'] / 1e9:,.3f}", f"{row['bytes_read'] / 1e9:,.3f}"] for name, row in by_operator]
    notes = "fp8 equivalent: bfloat16 and float32 count double, an fp4 indexer half (arXiv:2606.19348, section 1)."
    return "\n".join([*lines, columns(table), "", entries([("note", notes)], indent=0)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`cost --model NAME --context N`."""
    parser.add_argument("--model", choices=sorted(MODELS), default="v4-flash", help="the model (default: v4-flash)")
    parser.add_argument("--context", default="1M", metavar="N", help="tokens: 4096, 64K, 64Ki, 1M (default: 1M)")


COMMAND = Command(
    name="cost",
    summary="cache bytes and FLOPs of a model's decoding step, beside V3.2",
    add_arguments=add_arguments,
    answer=answer,
    text=text,
)
