"""Mutants: the whole package imported again with one semantic decision changed in its source."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader

from torch import Tensor
from torch.utils._pytree import tree_flatten

PACKAGE = "isolith"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One text of a module replaced by another; it must stand there `count` times."""

    module: str
    old: str
    new: str
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A wrong reference.

    Args:
        name: Unique in its family: "window_one_more".
        operator: The operator whose reference is wrong.
        edits: What is changed.
        row: The row of the catalogue, such as "S2"; "" for one of our own.
        equivalent: Why no call can tell it from the reference; "" for a mutant that must die.
    """

    name: str
    operator: str
    edits: tuple[Edit, ...]
    row: str = ""
    equivalent: str = ""

    def load(self) -> Callable[..., list[Tensor]]:
        """The mutated reference: a call's arguments -> outputs, then mutated arguments, which it writes."""
        package = reimported(self.edits)
        operator = package.OPERATORS[self.operator]
        dispatch = package._dispatch
        registry = package._registry.Registry(operators=package.OPERATORS, plugins=())
        references = dispatch.references(dispatch.Dispatcher(registry, package._config.Settings(fallback="allow")))

        def run(**arguments):
            with dispatch.using(references):
                outputs = operator.reference(**arguments)
            tensors = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]
            return tensors + [arguments[name] for name in operator.mutates]

        return run


def mutant(operator: str, name: str, *edits: tuple, row: str = "", equivalent: str = "") -> Mutant:
    """A mutant from (old, new) pairs in the operator's own file, or (module, old, new) triples elsewhere.

    A module is named without the package: "numerics.lists". A number behind `new` is how often `old` must stand there.
    """
    own = home_of(operator)
    made = []
    for edit in edits:
        count = edit[-1] if isinstance(edit[-1], int) else 1
        words = [word for word in edit if isinstance(word, str)]
        module = f"{PACKAGE}.{words[0]}" if len(words) == 3 else own
        made.append(Edit(module=module, old=words[-2], new=words[-1], count=count))
    return Mutant(name=name, operator=operator, edits=tuple(made), row=row, equivalent=equivalent)


def home_of(operator: str) -> str:
    """The module of an operator's file."""
    from isolith import OPERATORS

    return OPERATORS[operator].reference.__module__


class Mutating(SourceFileLoader):
    """Loads a module from its edited source."""

    def __init__(self, name, path, edits):
        super().__init__(name, path)
        self.edits = edits

    def get_code(self, fullname):
        """Compiled from the edited source; no cached bytecode."""
        source = self.get_source(fullname)
        for edit in self.edits:
            found = source.count(edit.old)
            if found != edit.count:
                raise ValueError(f"{fullname}: {edit.old!r} stands there {found} times, not {edit.count}")
            source = source.replace(edit.old, edit.new)
        return compile(source, f"<mutant of {fullname}>", "exec")


class Finder:
    """Finds the edited modules before anyone else does; one module, which registers with torch, it blanks."""

    def __init__(self, edits):
        self.edits = edits

    def find_spec(self, fullname, path, target=None):
        """A spec with the edits, or None for a module that has none."""
        mine = [edit for edit in self.edits if edit.module == fullname]
        if fullname == f"{PACKAGE}.graph":
            return importlib.util.spec_from_loader(fullname, Blank())
        if not mine:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        return importlib.util.spec_from_file_location(
            fullname, spec.origin, loader=Mutating(fullname, spec.origin, mine)
        )


class Blank:
    """Loads a module in which every name is a function that does nothing."""

    def create_module(self, spec):
        """The default."""

    def exec_module(self, module):
        """Every attribute is a function that does nothing."""
        module.__getattr__ = lambda name: lambda *args, **kwargs: None


def reimported(edits):
    """The package imported afresh with the edits, while everybody else keeps the one they have."""
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}
    for name in kept:
        del sys.modules[name]
    finder = Finder(edits)
    sys.meta_path.insert(0, finder)
    try:
        package = importlib.import_module(PACKAGE)
        for part in ("dispatch", "registry", "config"):
            setattr(package, f"_{part}", importlib.import_module(f"{PACKAGE}.{part}"))
        unused = {edit.module for edit in edits} - sys.modules.keys()
        if unused:
            raise ValueError(f"nothing imports {', '.join(sorted(unused))}")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.modules.update(kept)
    return package
