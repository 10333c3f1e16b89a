"""The layer rules, each with a proof that its check can fail."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "isolith"
SHIPPED = [
    path
    for folder in ("core/isolith", "backends/isolith_backends", "conformance/isolith_conformance")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
VENDORS = re.compile(
    r"\b(nvidia|cuda|triton|ascend|huawei|torch_npu|npu|cann|cambricon|mlu|torch_mlu)\b", re.IGNORECASE
)
LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def code_words(source):
    """The source without docstrings and comments: facts about a vendor may be cited there as a source."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                line
                for line in body
                if not (
                    isinstance(line, ast.Expr)
                    and isinstance(line.value, ast.Constant)
                    and isinstance(line.value.value, str)
                )
            ]
    return ast.unparse(tree)


def vendor_names(source):
    return VENDORS.findall(code_words(source))


def imports(source):
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def reads_environment(source):
    return bool(re.search(r"\bos\.(environ|getenv)\b|from os import .*(environ|getenv)", source))


def long_functions(source):
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]


def modules_after(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_core_names_no_vendor(path):
    assert vendor_names(path.read_text()) == []


def test_a_vendor_name_would_be_seen():
    assert vendor_names("'''cuda'''\nif device == 'cuda': pass  # cuda") == ["cuda"]


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_core_imports_neither_backends_nor_conformance(path):
    assert not imports(path.read_text()) & {"isolith_backends", "isolith_conformance"}


def test_an_import_of_a_backend_would_be_seen():
    assert imports("def f():\n    from isolith_backends.cpu import x") == {"isolith_backends"}


def test_import_loads_no_backend_no_sdk_and_no_pytest():
    loaded = modules_after("import isolith")
    assert not {name for name in loaded if name.split(".")[0] in {"isolith_backends", "pytest", "_pytest", "triton"}}


def test_a_loaded_module_would_be_seen():
    assert "isolith_backends.cpu" in modules_after("import isolith_backends.cpu")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_environment_is_read_in_config_alone(path):
    assert reads_environment(path.read_text()) == (path == CORE / "config.py")


@pytest.mark.parametrize("line", ["os.environ['X']", "os.getenv('X')", "from os import environ"])
def test_a_look_at_the_environment_would_be_seen(line):
    assert reads_environment(line)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= LONGEST_FILE
    if "kernels" not in path.parts:
        assert long_functions(source) == []


def test_a_long_function_would_be_seen():
    assert long_functions("def f():\n" + "    x = 1\n" * LONGEST_FUNCTION) == [f"f: {LONGEST_FUNCTION + 1}"]


def test_every_file_in_an_operator_folder_is_an_operator():
    from isolith import OPERATORS

    files = {path.stem for path in (CORE / "ops").rglob("*.py") if path.stem != "__init__"}
    assert files == set(OPERATORS)
