"""What users and plugins build on changes only together with the changelog.

`python core/tests/test_surface.py` records the surface anew, unless CHANGELOG.md is what it was the last time.
"""

import hashlib
import inspect
import json
import re
import sys
from pathlib import Path

import isolith
from isolith import hooks
from isolith.commands import COMMANDS
from isolith.config import user_fields, variable_of
from isolith.operator import Operator

RECORD = Path(__file__).parent / "surface.json"
CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


def described(value):
    """A public name, as far as others write against it."""
    if isinstance(value, Operator):
        return f"operator {value.signature}"
    if inspect.isclass(value):
        if issubclass(value, BaseException):
            return f"error, a {value.__mro__[1].__name__}"
        members = sorted(name for name in vars(value) if not name.startswith("_"))
        return f"class {signature_of(value)} with {', '.join(members)}"
    if callable(value):
        return f"function {signature_of(value)}"
    return f"{type(value).__name__}" if not isinstance(value, int) else f"{value}"


def signature_of(value):
    """A signature as text, without addresses; "()" where Python knows none."""
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))
    except ValueError:  # of a class whose base is written in C
        return "()"


def surface():
    """Names with what they are: of the package, of the hooks, of the settings and of the command line."""
    found = {f"isolith.{name}": described(getattr(isolith, name)) for name in isolith.__all__}
    found |= {f"hook {name}": described(vars(hooks)[name]) for name in vars(hooks) if name.startswith("isolith_")}
    found |= {variable_of(field.name): str(field.type) for field in user_fields()}
    found |= {f"isolith {name}": "command" for name in COMMANDS}
    return dict(sorted(found.items()))


def changelog_hash():
    return hashlib.sha256(CHANGELOG.read_bytes()).hexdigest()


def test_the_public_surface_is_the_recorded_one():
    recorded, now = json.loads(RECORD.read_text())["surface"], surface()
    changed = sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))
    assert not changed, f"changed: {changed}. Say so in CHANGELOG.md, then run python core/tests/test_surface.py"


def test_a_changed_signature_changes_the_surface(monkeypatch):
    before = surface()
    monkeypatch.setattr(isolith, "freeze", lambda more=None: None)
    assert surface()["isolith.freeze"] != before["isolith.freeze"]


if __name__ == "__main__":
    old = json.loads(RECORD.read_text()) if RECORD.exists() else {"surface": {}, "changelog": ""}
    if old["surface"] == surface():
        sys.exit("nothing to record: the surface is the recorded one")
    if old["changelog"] == changelog_hash():
        sys.exit("the surface has changed and CHANGELOG.md has not: say what changed for users and plugins there first")
    RECORD.write_text(json.dumps({"changelog": changelog_hash(), "surface": surface()}, indent=1) + "\n")
    print(f"recorded {len(surface())} names")
