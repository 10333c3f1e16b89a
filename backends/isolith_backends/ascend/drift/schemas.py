"""What a torch_npu registers, compared with schemas.json, and schemas.json made anew."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

Json = dict[str, Any]  # Any: JSON
SOURCE = "torch_npu"


def kept(file: Json) -> dict[str, Json]:
    """The rows of schemas.json that come from the wheel, by name."""
    return {row["name"]: row for row in file["ops"] if row["source"] == SOURCE}


def differences(file: Json, found: Json) -> list[str]:
    """One line for each operator that is new, gone or another one than in schemas.json."""
    ours, others = kept(file), set(file["not_kept"][SOURCE])
    theirs = {row["name"]: row for row in found["ops"]}
    lines = [f"added    {theirs[name]['schema']}" for name in sorted(theirs.keys() - ours.keys() - others)]
    lines += [f"removed  {name}" for name in sorted((ours.keys() | others) - theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        what = changes(ours[name]["schema"], theirs[name]["schema"])
        keys = [set(row[name]["keys"]) for row in (ours, theirs)]
        what += [f"a kernel for {key} is new" for key in sorted(keys[1] - keys[0])]
        what += [f"the kernel for {key} is gone" for key in sorted(keys[0] - keys[1])]
        lines += [f"changed  {name}: {'; '.join(what)}"] if what else []
    return lines


def changes(before: str, after: str) -> list[str]:
    """What differs between two schemas of one operator, as a caller sees it."""
    if before == after:
        return []
    old, new = (torch._C.parse_schema(schema) for schema in (before, after))
    arguments = [{argument.name: written(argument) for argument in schema.arguments} for schema in (old, new)]
    said = [f"argument {arguments[1][name]} is new" for name in arguments[1] if name not in arguments[0]]
    said += [f"argument {name} is gone" for name in arguments[0] if name not in arguments[1]]
    both = [name for name in arguments[0] if name in arguments[1]]
    said += [f"{arguments[0][n]} is now {arguments[1][n]}" for n in both if arguments[0][n] != arguments[1][n]]
    if both != [name for name in arguments[1] if name in arguments[0]]:
        said.append(f"the order of arguments is now {', '.join(arguments[1])}")
    returns = [[str(result.type) for result in schema.returns] for schema in (old, new)]
    if returns[0] != returns[1]:
        said.append(f"returns {', '.join(returns[1])} instead of {', '.join(returns[0])}")
    return said or [f"is now written {after}"]


def written(argument: Any) -> str:  # Any: torch does not type it
    """An argument as in a schema, near enough to see what differs."""
    mark = "!" if argument.alias_info is not None and argument.alias_info.is_write else ""
    default = f"={argument.default_value}" if argument.has_default_value() else ""
    return f"{'*, ' if argument.kwarg_only else ''}{argument.type}{mark} {argument.name}{default}"


def refreshed(file: Json, found: Json) -> Json:
    """schemas.json with the wheel's rows as found; rows of other sources and what is not kept stay.

    An operator that neither is kept nor was left out before is kept. Where the wheel is another one than before, that
    one becomes one of the older wheels, as far as its rows tell.
    """
    made = copy.deepcopy(file)
    ours, others = kept(file), set(file["not_kept"][SOURCE])
    before = file["sources"][SOURCE]["version"]
    rows = [row_of(found, row, ours.get(row["name"]), before) for row in found["ops"] if row["name"] not in others]
    made["ops"] = rows + [row for row in file["ops"] if row["source"] != SOURCE]
    made["not_kept"][SOURCE] = [row["name"] for row in found["ops"] if row["name"] in others]
    made["sources"][SOURCE].update({key: found[key] for key in ("version", "torch", "git")})
    made["registered_total"][SOURCE] = len(found["ops"])
    return made


def row_of(found: Json, row: Json, old: Json | None, before: str) -> Json:
    """A row of schemas.json for an operator of the wheel."""
    made = {
        "name": row["name"],
        "schema": row["schema"],
        "source": SOURCE,
        "version": found["version"],
        "keys": row["keys"],
        "in_torch_npu_namespace": row["in_torch_npu_namespace"],
    }
    wheels = dict(old.get("older_wheels", {})) if old else {}
    if found["version"] != before:
        added = arguments_added(old["schema"], row["schema"]) if old else ()
        wheels = {wheel: with_added(known, added) for wheel, known in wheels.items()}
        wheels[before] = with_added("same arguments", added) if old else "absent"
    return {**made, "older_wheels": wheels} if wheels else made


def arguments_added(before: str, after: str) -> tuple[str, ...]:
    """Arguments that a later schema has and an earlier one has not."""
    old, new = ([each.name for each in torch._C.parse_schema(schema).arguments] for schema in (before, after))
    return tuple(name for name in new if name not in old)


def with_added(known: str | Mapping[str, Any], added: tuple[str, ...]) -> str | Json:
    """What is known of an older wheel, with arguments that came later still."""
    if known == "absent" or not added:
        return known if isinstance(known, str) else dict(known)
    more = dict(known) if isinstance(known, Mapping) else {}
    return {**more, "arguments_added_later": [*more.get("arguments_added_later", ()), *added]}
