"""Kernel packs: plugins that add kernels to another plugin's backend."""

import importlib
import json

import pytest
import torch

import isolith
from isolith import Backend, KernelPack, NoKernelError, implements
from isolith.__main__ import main
from isolith.config import Settings
from isolith.dispatch import Dispatcher, call, using
from isolith.plugins import Plugin
from isolith.registry import Registry, build

X, WEIGHT = torch.randn(3, 8), torch.ones(8)
BACKEND = """
import isolith
from isolith import Backend, hookimpl, implements

@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    return isolith.rms_norm.reference(x, weight, eps, round_before_weight)

@hookimpl
def isolith_backend():
    return Backend(name="acme", device_type="cpu", api_version=1, why_unavailable=lambda: None, kernels=(__name__,))
"""
PACK = """
import isolith
from isolith import KernelPack, hookimpl, implements

def only_three_rows(x, **_):
    return None if len(x) == 3 else f"rows={len(x)}; takes 3"

@implements(isolith.rms_norm, why_not=only_three_rows)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    return isolith.rms_norm.reference(x, weight, eps, round_before_weight)

@hookimpl
def isolith_kernels():
    return KernelPack(name="acme.fast", api_version=1, kernels=(__name__,))
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lay out a distribution with one entry point on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, source):
        module = f"plugin_{name.replace('.', '_')}_{tmp_path.name.replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[isolith]\n{name} = {module}\n")
        importlib.invalidate_caches()

    return make


def names(registry, backend="acme", operator="rms_norm"):
    """Full names of a backend's kernels, best first."""
    found = next(b for b in registry.backends if b.name == backend)
    return [kernel.full_name for kernel in registry.kernels(found, operator)]


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        (Settings(), ["acme.rms_norm", "acme.fast.rms_norm"]),
        (Settings(backend="acme"), ["acme.rms_norm", "acme.fast.rms_norm"]),
        (Settings(plugins=("acme",)), ["acme.rms_norm"]),
        (Settings(plugins=("acme", "acme.fast")), ["acme.fast.rms_norm", "acme.rms_norm"]),
        (Settings(plugins=("acme.fast",)), ["acme.fast.rms_norm", "acme.rms_norm"]),
        (Settings(plugins=("acme.fast",), backend="acme"), ["acme.fast.rms_norm", "acme.rms_norm"]),
    ],
)
def test_a_pack_that_is_named_comes_before_the_backend_and_another_behind_it(install, settings, order):
    install("acme", BACKEND)
    install("acme.fast", PACK)
    assert names(build(isolith.OPERATORS, settings)) == order


def chosen(registry, x=X, **settings):
    """What a call runs."""
    with using(Dispatcher(registry, Settings(backend="acme", **settings))) as active:
        explanation = active.explain(isolith.rms_norm, isolith.rms_norm.arguments(x, WEIGHT))
        assert torch.equal(call(isolith.rms_norm, (x, WEIGHT), {}), isolith.rms_norm.reference(x, WEIGHT))
    return explanation


def test_a_pin_comes_before_all(install):
    install("acme", BACKEND)
    install("acme.fast", PACK)
    registry = build(isolith.OPERATORS, Settings())
    assert chosen(registry).chosen.name == "acme.rms_norm"
    assert chosen(registry, kernels=(("rms_norm", "acme.fast.rms_norm"),)).chosen.name == "acme.fast.rms_norm"


def test_what_a_pack_refuses_goes_on_to_the_backend_and_explain_says_why(install):
    install("acme", BACKEND)
    install("acme.fast", PACK)
    registry = build(isolith.OPERATORS, Settings(plugins=("acme.fast", "acme")))
    explanation = chosen(registry, torch.randn(2, 8))
    assert explanation.chosen.name == "acme.rms_norm"
    assert explanation.reasons == "  acme.fast.rms_norm: rows=2; takes 3"


def test_a_pack_without_its_backend_is_a_sentence(install, capsys):
    install("acme.fast", PACK)
    assert main(["status", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["backends"]}
    # The process's own dispatcher may be older than the pack.
    if "acme.fast" in rows:
        assert rows["acme.fast"]["reason"] == "it adds to the backend 'acme', which is not available"
    registry = build(isolith.OPERATORS, Settings())
    assert "acme.fast" in {plugin.name for plugin in registry.plugins}
    assert all(not name.startswith("acme") for name in names(registry, "cpu"))


CALLED = "a pack for the backend 'acme' is called 'acme.NAME'"


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("acme.other", PACK, "its entry point is 'acme.other' but its kernel pack is 'acme.fast'"),
        ("acme.fast", PACK.replace("version=1", "version=9"), "written for plugin API 9; this isolith has API 1"),
        (
            "fast",
            PACK.replace('"acme.fast"', '"fast"'),
            f"it has the name of a backend and brings a kernel pack; {CALLED}",
        ),
        (
            "acme.chip",
            BACKEND.replace('"acme"', '"acme.chip"'),
            f"it has the name of a kernel pack and brings a backend; {CALLED}",
        ),
    ],
)
def test_a_pack_that_is_not_what_it_says_is_a_row_with_the_reason(install, name, source, reason):
    install(name, source)
    row = next(row for row in build(isolith.OPERATORS, Settings(plugins=(name,))).plugins if row.name == name)
    assert (row.pack, row.backend, row.reason) == (None, None, reason)


def made(why_unavailable=lambda: None):
    """A registry of a backend without kernels and a pack whose kernel returns zeros."""

    @implements(isolith.rms_norm)
    def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
        return torch.zeros_like(x)

    module = type(importlib)("isolith_test_pack")
    rms_norm.fn.__module__ = module.__name__
    module.rms_norm = rms_norm
    importlib.sys.modules[module.__name__] = module
    acme = Backend(name="acme", device_type="cpu", api_version=1, why_unavailable=lambda: None, kernels=())
    pack = KernelPack(name="acme.fast", api_version=1, kernels=(module.__name__,), why_unavailable=why_unavailable)
    rows = (
        Plugin(name="acme", distribution="a", version="1", target="a", backend=acme),
        Plugin(name="acme.fast", distribution="b", version="1", target="b", pack=pack),
    )
    return Registry(operators=isolith.OPERATORS, plugins=rows)


def test_a_pack_serves_an_operator_that_its_backend_has_no_kernel_for():
    with using(Dispatcher(made(), Settings(backend="acme", fallback="error"))):
        assert not call(isolith.rms_norm, (X, WEIGHT), {}).any()


@pytest.mark.parametrize("why", [lambda: "no library", lambda: 1 / 0])
def test_a_pack_that_lacks_what_it_needs_is_out(why):
    registry = made(why_unavailable=why)
    assert names(registry) == []
    with (
        using(Dispatcher(registry, Settings(backend="acme", fallback="error"))),
        pytest.raises(NoKernelError),
    ):
        call(isolith.rms_norm, (X, WEIGHT), {})
