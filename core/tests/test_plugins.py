"""Discovery and loading, with real distributions laid out in a temporary folder."""

import importlib
import sys
import time
from importlib.metadata import distributions

import pytest

from isolith import API_VERSION, plugins
from isolith.config import Settings
from isolith.plugins import Plugin, discover, load, probe
from isolith.registry import Registry, build

GOOD = """
from isolith import Backend, hookimpl
@hookimpl
def isolith_backend():
    return Backend(name="NAME", device_type="cpu", api_version=1, why_unavailable=lambda: None, kernels=())
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lay out a distribution with one entry point, and give the plugins found in the folder."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, source=GOOD, distribution=None, version="1.0", module=None):
        module = module or f"plugin_{name}_{len(list(tmp_path.iterdir()))}"
        distribution = distribution or f"isolith-{name}"
        (tmp_path / f"{module}.py").write_text(source.replace("NAME", name))
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[isolith]\n{name} = {module}\n")
        importlib.invalidate_caches()
        return module

    def found():
        entries = [e for d in distributions(path=[str(tmp_path)]) for e in d.entry_points if e.group == "isolith"]
        return discover(entries)

    make.found = found
    yield make
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


def test_listing_imports_nothing(install):
    module = install("acme", "raise RuntimeError('imported')")
    (row,) = install.found()
    assert (row.name, row.origin, row.reason) == ("acme", "isolith-acme 1.0", None)
    assert module not in sys.modules


def test_good_plugin_gives_its_backend(install):
    install("acme")
    (row,) = map(load, install.found())
    assert (row.backend.name, row.reason) == ("acme", None)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_sdk", "ModuleNotFoundError: No module named 'no_such_sdk' ("),
        ("raise SystemExit(3)", "SystemExit: 3 ("),
        ("def f(:", "SyntaxError: "),
        ("x = 1", "TypeError: plugin_acme_0 must have one isolith_backend hook that returns a Backend, or one "),
        (
            GOOD.replace("api_version=1", "api_version=99"),
            f"written for plugin API 99; this isolith has API {API_VERSION}",
        ),
        (GOOD.replace("api_version=1, ", ""), "TypeError: Backend.__init__() missing 1 required keyword-only argument"),
        (GOOD.replace('"NAME"', '"other"'), "its entry point is 'acme' but its backend is 'other'"),
        (GOOD.replace("def isolith_backend():", "def isolith_backend(extra):"), "PluginValidationError: "),
        (GOOD.replace("def isolith_backend():", "def isolith_backnd():"), "PluginValidationError: "),
    ],
)
def test_broken_plugin_is_a_row_with_its_reason(install, source, reason):
    install("acme", source)
    (row,) = map(load, install.found())
    assert row.backend is None
    assert row.reason.startswith(reason)


def test_broken_plugin_does_not_stop_another(install):
    install("acme", "raise SystemExit(3)")
    install("good")
    rows = {row.name: row for row in map(load, install.found())}
    assert rows["good"].backend is not None


def test_two_distributions_with_one_backend_name_are_both_refused(install):
    install("acme", distribution="isolith-acme")
    install("acme", distribution="acme-fork", version="2.0")
    reason = "acme-fork 2.0 and isolith-acme 1.0 both offer the backend 'acme'; uninstall all but one"
    assert [row.reason for row in map(load, install.found())] == [reason, reason]


def test_one_distribution_seen_twice_is_one_plugin(install):
    install("acme")
    entries = [e for d in distributions(path=[sys.path[0]]) for e in d.entry_points if e.group == "isolith"]
    assert len(discover([*entries, *entries])) == 1


def test_probe_that_raises_is_a_no(backend):
    def fails():
        raise OSError("libcuda.so.1: cannot open")

    assert probe(backend(why_unavailable=fails)).startswith("its probe failed: OSError: libcuda.so.1: cannot open (")


def test_kernel_module_that_does_not_import_makes_the_backend_unavailable(backend, registry):
    broken = backend(kernels=("no_such_module",))
    reason = registry(broken).why_unavailable(broken)
    assert reason.startswith("importing no_such_module failed: ModuleNotFoundError: No module named 'no_such_module'")


def test_listing_fifty_plugins_takes_less_than_100_ms(install):
    for number in range(50):
        install(f"chip{number}", "raise RuntimeError('imported')")
    started = time.perf_counter()
    rows = install.found()
    seconds = time.perf_counter() - started
    assert len(rows) == 50
    assert seconds < 0.1


def test_registry_is_immutable():
    registry = Registry(operators={}, plugins=())
    with pytest.raises(AttributeError):
        registry.plugins = ()


@pytest.fixture
def three_plugins(monkeypatch):
    rows = tuple(Plugin(name=n, distribution=n, version="1", target="none", reason="a test") for n in ("a", "b", "cpu"))
    monkeypatch.setattr(plugins, "discover", lambda: rows)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["a", "b", "cpu"]),
        ({"plugins": ("b", "a")}, ["b", "a", "cpu"]),
        ({"backend": "b"}, ["b", "cpu"]),
    ],
    ids=str,
)
def test_plugins_take_precedence_as_named_and_the_host_is_always_there(three_plugins, settings, names):
    assert [row.name for row in build({}, Settings(**settings)).plugins] == names
