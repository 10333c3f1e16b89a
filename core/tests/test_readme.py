"""The README says what the program says. `python core/tests/test_readme.py` writes its tables anew."""

import argparse
import re
from pathlib import Path

import pytest

from isolith.commands import COMMANDS
from isolith.config import user_fields, variable_of
from isolith.dispatch import dispatcher

README = Path(__file__).parents[2] / "README.md"


def settings_table():
    rows = [f"| `{variable_of(field.name)}` | {field.metadata['meaning']} |" for field in user_fields()]
    return "\n".join(["| variable | meaning |", "|---|---|", *rows])


def support_table():
    ours = [plugin.name for plugin in dispatcher().registry.plugins if plugin.distribution == "isolith"]
    assert ours == ["ascend", "cambricon", "cpu", "cuda"]
    reports = sorted((README.parent / "conformance" / "reports").glob("*.json"))
    return COMMANDS["table"].text(COMMANDS["table"].answer(argparse.Namespace(reports=reports)))


TABLES = {"settings": settings_table, "table": support_table}


def block(name, text):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_table_of_the_readme_is_what_the_program_prints(name):
    assert block(name, README.read_text())[1].strip() == TABLES[name]().strip()


def test_example_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})


def test_commands_of_the_readme_are_those_of_the_program():
    named = set(re.findall(r"^\| `isolith ([\w-]+)", README.read_text(), re.MULTILINE))
    assert named == set(COMMANDS)


if __name__ == "__main__":
    text = README.read_text()
    for name, make in TABLES.items():
        found = block(name, text)
        text = text[: found.start(1)] + make() + "\n" + text[found.end(1) :]
    README.write_text(text)
