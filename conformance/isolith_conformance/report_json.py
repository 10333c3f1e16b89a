"""JSON as reports and bundles have it: read strictly, written in one way, and checked against the types of its records.

A record is a frozen dataclass: its annotations are what a file must hold, and the schema that other programs check with
is made of them. Every field stands in the file; nothing else may.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

DEEPEST = 16
"""The nesting of our own records is 12 at most; deeper files are nobody's."""
LONGEST_TEXT = 65536
"""A traceback's tail fits; a file of one string does not."""
LONGEST_LINE = 2**20
LARGEST_INTEGER = 2**63 - 1

TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)
NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
"""How a statistic that is no number is written: JSON has no word for it."""

Hex = Annotated[str, "^[0-9a-f]{64}$"]
"""A SHA-256 in hexadecimal."""
Statistic = Annotated[float, "statistic"]
"""A number that may be infinite or no number at all."""
Tree = Annotated[object, "tree"]
"""Any JSON value whose texts and numbers are ones that we accept."""

Value = Any  # any JSON value
Check = Callable[[Value, str], Value]


class JsonError(ValueError):
    """A file that is not what it should be; the message is a sentence."""


def read_bytes(path: Path, limit: int) -> bytearray:
    """A file's bytes, writable so that tensors can lie in them; JsonError where it is none, or larger."""
    try:
        size = size_of(path, limit)
        data = bytearray(size)
        with path.open("rb", buffering=0) as file:
            view, done = memoryview(data), 0
            while done < size and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise JsonError(str(error)[:200]) from error
    if done != size:
        raise JsonError(f"the file ended after {done} of {size} bytes")
    return data


def read_lines(path: Path, limit: int) -> Iterator[bytes]:
    """A file's lines with their ends, long ones in pieces; JsonError where it is none, or larger."""
    try:
        size_of(path, limit)
        with path.open("rb") as file:
            yield from iter(lambda: file.readline(LONGEST_LINE), b"")
    except OSError as error:
        raise JsonError(str(error)[:200]) from error


def size_of(path: Path, limit: int) -> int:
    """A file's size, at most `limit`; JsonError where it is none."""
    if "\0" in str(path) or not path.is_file():
        raise JsonError("this is not a file" if path.exists() else "there is no such file")
    size = path.stat().st_size
    if size > limit:
        raise JsonError(f"the file has {size} bytes, at most {limit} are due")
    return size


def as_text(data: bytes | bytearray) -> str:
    """The text that the bytes spell; JsonError where it is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise JsonError(str(error)[:200]) from error


def parse(text: str) -> Value:
    """The value that the text spells; JsonError for anything that JSON or this project does not allow."""
    check_depth(text)
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError among them
        raise JsonError(f"this is not JSON: {str(error)[:200]}") from error


def check_depth(text: str) -> None:
    """Refuse deep nesting before the parser meets it."""
    depth = 0
    for token in TOKENS.finditer(text):
        first = text[token.start()]
        if first in "[{":
            depth += 1
            if depth > DEEPEST:
                raise JsonError(f"values are nested deeper than {DEEPEST}")
        elif first in "]}":
            depth -= 1


def unique(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
    """An object whose keys stand once each."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonError(f"the key {shown(twice)} stands twice in one object")
    return made


def refuse(constant: str) -> Value:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise JsonError(f"{constant} is not JSON")


def finite(digits: str) -> float:
    """A number, unless it is too large for one."""
    number = float(digits)
    if math.isinf(number):
        raise JsonError(f"the number {digits[:40]} is too large")
    return number


def shown(value: Value) -> str:
    """A value in a message: short, and no control character in it."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def canonical(value: Value) -> str:
    """The one spelling of a value that hashes are taken of: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode(value: Value) -> Value:
    """A record as JSON values."""
    if is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {storable(str(name)): encode(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return storable(value) if isinstance(value, str) else value


def storable(text: str) -> str:
    """The text as a reader takes it: what a plugin says must not keep a report from being written."""
    if not text.isascii():
        text = text.encode(errors="backslashreplace").decode()  # half a surrogate pair is no UTF-8
    return text[:LONGEST_TEXT]


def decode(kind: Any, value: Value, where: str = "") -> Any:  # Any: a type, and a value of it
    """A record of JSON values; JsonError where they do not fit the type's annotations."""
    return checker(kind)(value, where)


@functools.cache
def checker(kind: Any) -> Check:  # Any: a type
    """The function that turns a JSON value into one of this type."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return record_checker(kind)
    if origin is Literal:
        return functools.partial(check_choice, inner)
    if origin is Annotated:
        named = {"statistic": check_statistic, "tree": check_tree}
        return named.get(inner[1]) or functools.partial(check_pattern, re.compile(inner[1]))
    if origin in (Union, UnionType):
        present = checker(next(part for part in inner if part is not NoneType))
        return lambda value, where: None if value is None else present(value, where)
    if origin is tuple:
        return functools.partial(check_list, checker(inner[0]))
    if origin is not None and issubclass(origin, Mapping):
        return functools.partial(check_mapping, checker(inner[1]))
    return {str: check_text, int: check_integer, float: check_number, bool: check_boolean}[kind]


def record_checker(kind: Any) -> Check:  # Any: a dataclass
    """The checker of a dataclass: all its fields, and no others."""
    hints = get_type_hints(kind, include_extras=True)
    parts = {field.name: checker(hints[field.name]) for field in fields(kind)}

    def check(value: Value, where: str) -> Value:
        if isinstance(value, kind):
            return value
        check_object(value, where)
        for name in parts:
            if name not in value:
                raise JsonError(f"{where or 'the file'} lacks {name!r}")
        for name in value:
            if name not in parts:
                raise JsonError(f"{where or 'the file'} has an unknown key, {shown(name)}")
        at = f"{where}." if where else ""
        return kind(**{name: part(value[name], at + name) for name, part in parts.items()})

    return check


def check_object(value: Value, where: str) -> None:
    """Refuse what is no object."""
    if not isinstance(value, dict):
        raise must(where, "an object", value)


def check_choice(choices: tuple[Value, ...], value: Value, where: str) -> Value:
    """One of a few values, of the same type."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise must(where, f"one of {', '.join(map(str, choices))}", value)
    return value


def check_pattern(pattern: re.Pattern[str], value: Value, where: str) -> Value:
    """Text that matches as a whole."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise must(where, f"text that matches {pattern.pattern}", value)
    return value


def check_statistic(value: Value, where: str) -> Value:
    """A number, or the word for one that is not finite."""
    if isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    return check_number(value, where)


def check_tree(value: Value, where: str) -> Value:
    """Any value, part by part."""
    if isinstance(value, dict):
        return {check_text(name, where): check_tree(part, f"{where}.{shown(name)}") for name, part in value.items()}
    if isinstance(value, list):
        return [check_tree(part, f"{where}[{place}]") for place, part in enumerate(value)]
    if isinstance(value, str):
        return check_text(value, where)
    return value if value is None or type(value) is bool else check_number(value, where)


def check_list(part: Check, value: Value, where: str) -> Value:
    """A list, as a tuple of what its entries are."""
    if not isinstance(value, list):
        raise must(where, "a list", value)
    return tuple(part(entry, f"{where}[{place}]") for place, entry in enumerate(value))


def check_mapping(part: Check, value: Value, where: str) -> Value:
    """An object with any keys."""
    check_object(value, where)
    return {check_text(name, where): part(entry, f"{where}.{shown(name)}") for name, entry in value.items()}


def check_text(value: Value, where: str) -> Value:
    """Text that can be written as UTF-8 again."""
    if not isinstance(value, str):
        raise must(where, "text", value)
    if len(value) > LONGEST_TEXT:
        raise JsonError(f"{where} is longer than {LONGEST_TEXT} characters")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise JsonError(f"{where} has half a surrogate pair")
    return value


def check_integer(value: Value, where: str) -> Value:
    """A whole number that other programs can hold."""
    if type(value) is not int or not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
        raise must(where, "a whole number of 64 bits", value)
    return value


def check_number(value: Value, where: str) -> Value:
    """A finite number, whole or not."""
    if type(value) is int:
        return check_integer(value, where)
    if type(value) is not float or not math.isfinite(value):
        raise must(where, "a finite number", value)
    return value


def check_boolean(value: Value, where: str) -> Value:
    """True or false."""
    if type(value) is not bool:
        raise must(where, "true or false", value)
    return value


def must(where: str, kind: str, value: Value) -> JsonError:
    """The error for a value of the wrong kind."""
    return JsonError(f"{where or 'the file'} must be {kind}; got {shown(value)}")


@functools.cache
def schema(kind: Any) -> Value:  # Any: a type
    """The JSON schema of a type: what `decode` asks for."""
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        parts = {field.name: schema(hints[field.name]) for field in fields(kind)}
        return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is Annotated:
        if kind == Tree:
            return {}
        if kind == Statistic:
            return {"anyOf": [{"type": "number"}, {"enum": list(NON_FINITE)}]}
        return {"type": "string", "pattern": inner[1]}
    if origin in (Union, UnionType):
        present = next(part for part in inner if part is not NoneType)
        return {"anyOf": [schema(present), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": schema(inner[0])}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": schema(inner[1])}
    whole = {"type": "integer", "minimum": -LARGEST_INTEGER, "maximum": LARGEST_INTEGER}
    text = {"type": "string", "maxLength": LONGEST_TEXT}
    return {str: text, int: whole, float: {"type": "number"}, bool: {"type": "boolean"}}[kind]
