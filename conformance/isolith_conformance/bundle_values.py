"""Records with tensors in them as JSON and a file of tensors, and back: no pickle, and no code but the records' own."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from isolith.dtypes import dtype_name
from isolith.operator import AnyOperator, Operator
from isolith_conformance.bundle_tensors import NAMES
from isolith_conformance.report_json import NON_FINITE, JsonError, Value, check_number, shown
from isolith_conformance.wire import bytes_of

DTYPES = {dtype_name(dtype): dtype for dtype in NAMES}


class Packer:
    """Turns records into JSON values; their tensors gather in `tensors`, equal ones once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}

    def pack(self, value: Any, name: str = "") -> Value:  # Any: a record, or a part of one
        """The JSON value that stands for this one; `name` is what a tensor in it is called."""
        if isinstance(value, Tensor):
            return {"tensor": self.keep(value, name)}
        if isinstance(value, torch.dtype):
            return {"dtype": dtype_name(value)}
        if isinstance(value, Operator):
            return {"operator": value.name}
        if isinstance(value, float) and not math.isfinite(value):
            return {"number": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
        if isinstance(value, (list, tuple)):
            return [self.pack(part, f"{name}.{place}".lstrip(".")) for place, part in enumerate(value)]
        if is_dataclass(value):
            names = [field.name for field in fields(value)]
            return {each: self.pack(getattr(value, each), f"{name}.{each}".lstrip(".")) for each in names}
        if isinstance(value, Mapping):
            return {str(each): self.pack(part, f"{name}.{each}".lstrip(".")) for each, part in value.items()}
        assert value is None or isinstance(value, (bool, int, float, str)), f"{name} is a {type(value).__name__}"
        return value

    def keep(self, tensor: Tensor, name: str) -> str:
        """Keep a tensor, unless an equal one is kept; what it is called."""
        key = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(bytes_of(tensor)).hexdigest()}"
        if key not in self.names:
            self.names[key] = name
            self.tensors[name] = tensor
        return self.names[key]


class Unpacker:
    """Turns JSON values back into records of a type; JsonError where they do not fit it.

    Args:
        tensors: By name.
        operators: By name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], operators: Mapping[str, AnyOperator]) -> None:
        self.tensors = tensors
        self.operators = operators

    def unpack(self, kind: Any, value: Value, where: str) -> Any:  # Any: a type, and a value of it
        """The value of this type that the JSON value stands for."""
        origin, inner = get_origin(kind), get_args(kind)
        if is_dataclass(kind) and kind is not Operator and origin is not Operator:
            return self.record(kind, value, where)
        if origin in (Union, UnionType):
            present = next(part for part in inner if part is not NoneType)
            return None if value is None else self.unpack(present, value, where)
        if origin is tuple:
            if not isinstance(value, list):
                raise JsonError(f"{where} must be a list; got {shown(value)}")
            return tuple(self.unpack(inner[0], part, f"{where}[{place}]") for place, part in enumerate(value))
        if kind is bool or kind is str or kind is int:
            if type(value) is not kind:
                raise JsonError(f"{where} must be {kind.__name__}; got {shown(value)}")
            return value
        if kind is float:
            return float(self.number(value, where))
        if kind is torch.dtype:
            return self.named(value, "dtype", DTYPES, where)
        if kind is Tensor:
            return self.named(value, "tensor", self.tensors, where)
        return self.named(value, "operator", self.operators, where)

    def record(self, kind: Any, value: Value, where: str) -> Any:  # Any: a dataclass, and a value of it
        """A dataclass: all its fields, and no others."""
        hints = get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        if not isinstance(value, dict) or value.keys() != set(names):
            raise JsonError(f"{where} must have {', '.join(names)} alone; got {shown(value)}")
        return kind(**{name: self.unpack(hints[name], value[name], f"{where}.{name}") for name in names})

    def argument(self, value: Value, where: str) -> Any:  # Any: an operator's argument
        """An argument of a call: a tensor, or what stands for itself."""
        if isinstance(value, dict) and "tensor" in value:
            return self.named(value, "tensor", self.tensors, where)
        if isinstance(value, (dict, float)):
            return self.number(value, where)
        if isinstance(value, list):
            return [self.argument(part, f"{where}[{place}]") for place, part in enumerate(value)]
        return value

    def number(self, value: Value, where: str) -> float:
        """A number, or the word for one that is not finite."""
        if isinstance(value, dict):
            return float(self.named(value, "number", NON_FINITE, where))
        number: float = check_number(value, where)
        return number

    def named(self, value: Value, kind: str, known: Mapping[str, Any], where: str) -> Any:  # Any: of the kind
        """What is known under the name."""
        if not isinstance(value, dict) or value.keys() != {kind} or not isinstance(value[kind], str):
            raise JsonError(f"{where} must name a {kind}; got {shown(value)}")
        if value[kind] not in known:
            raise JsonError(f"{where}: there is no {kind} {shown(value[kind])}")
        return known[value[kind]]
