"""Quirks as data: how they are read, when they hold, and that selection obeys them."""

import datetime
import json
from types import SimpleNamespace

import pytest
import torch

import isolith
from isolith import PluginError, implements, quirks
from isolith.__main__ import main
from isolith.config import Settings
from isolith.dispatch import Dispatcher
from isolith.plugins import Plugin
from isolith.registry import Registry

QUIRK = """
[[quirk]]
id = "odd-rows"
operator = "rms_norm"
effect = "refuse"
says = "wrong for many rows"
link = "https://example.org/1"
review = 2030-01-01
"""


def read(*lines, base=QUIRK):
    """The only quirk of a file with these lines more."""
    (quirk,) = quirks.parse("\n".join([base, *lines]), "quirks.toml", isolith.OPERATORS)
    return quirk


def call(rows=3, columns=8, dtype=torch.float32, **more):
    """Arguments of rms_norm."""
    return isolith.rms_norm.arguments(torch.ones(rows, columns, dtype=dtype), torch.ones(columns), **more)


@pytest.mark.parametrize(
    ("when", "arguments", "holds"),
    [
        ('{ "x.0" = ">=4" }', call(rows=4), True),
        ('{ "x.0" = ">=4" }', call(rows=3), False),
        ('{ "x.0" = ">=4,<6" }', call(rows=6), False),
        ('{ "x.-1" = "==8" }', call(), True),
        ('{ "x.-1" = "!=8" }', call(), False),
        ('{ "x.2" = ">=0" }', call(), False),  # no such axis
        ('{ "x.dtype" = ["float16", "bfloat16"] }', call(dtype=torch.bfloat16), True),
        ('{ "x.dtype" = ["float16", "bfloat16"] }', call(), False),
        ("{ round_before_weight = [true] }", call(round_before_weight=True), True),
        ("{ round_before_weight = [1] }", call(round_before_weight=True), False),
        ('{ eps = "<=0.001" }', call(), True),
        ('{ eps = "<0.000001" }', call(), False),
        ('{ "x.0" = ">=3", "x.1" = ">8" }', call(), False),  # all must hold
        ('{ "x.0" = ">=3", "x.1" = ">=8" }', call(), True),
        ("{ x = [1] }", call(), False),
    ],
)
def test_a_condition_holds_or_not(when, arguments, holds):
    assert read(f"when = {when}").holds(arguments) is holds


def chip(arch="9.0", **versions):
    """A backend of this architecture and software."""
    return SimpleNamespace(arch=lambda: arch, versions=lambda: versions)


@pytest.mark.parametrize(
    ("line", "backend", "here"),
    [
        ('arch = "<9.0"', chip("8.6"), True),
        ('arch = "<9.0"', chip("9.0"), False),
        ('sdk = { lib = ">=2,<3" }', chip(lib="2.5"), True),
        ('sdk = { lib = ">=2,<3" }', chip(lib="3.0"), False),
        ('sdk = { lib = ">=2,<3" }', chip(), True),  # not known: it may have it
        ('sdk = { torch = "<1.0" }', chip(), False),
        ("", SimpleNamespace(arch=None, versions=None), True),
    ],
)
def test_a_quirk_is_here_by_device_and_software(line, backend, here):
    assert read(line).is_here(backend) is here


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[quirk", "Expected"),
        ("x = 1", "a file of \\[\\[quirk\\]\\] tables; got x"),
        (QUIRK.replace('id = "odd-rows"', ""), "quirk 1: it lacks id"),
        (QUIRK + 'kernels = "a"', "there is no field 'kernels'"),
        (QUIRK.replace('"rms_norm"', '"rms"'), "there is no operator 'rms'"),
        (QUIRK.replace('"refuse"', '"warn"'), "effect must be refuse or tell; got 'warn'"),
        (QUIRK.replace("2030-01-01", '"soon"'), "review must be a date; got 'soon'"),
        (QUIRK.replace('"wrong for many rows"', '""'), "says must be a str; got ''"),
        (QUIRK + 'arch = "9"', "arch: a range is written like"),
        (QUIRK + 'sdk = { torch = "new" }', "sdk.torch: a range is written like"),
        (QUIRK + "when = { y = [1] }", "when: the operator has no argument 'y'"),
        (QUIRK + 'when = { "x.rows" = [1] }', "'x.rows' must end with .dtype or the number of an axis"),
        (QUIRK + 'when = { "x.0" = "many" }', "must be a list of values or a range such as"),
        (QUIRK + 'when = { "x.0" = [] }', "must be a list of values or a range such as"),
        (QUIRK + QUIRK, "quirk 2: another entry has the id 'odd-rows'"),
    ],
)
def test_a_file_that_is_not_right_is_refused_with_the_place(text, problem):
    with pytest.raises(PluginError, match=f"^quirks.toml: .*{problem}"):
        quirks.parse(text, "quirks.toml", isolith.OPERATORS)


@pytest.fixture
def dispatcher(backend):
    """A dispatcher over a backend with one kernel and one quirk."""

    @implements(isolith.rms_norm)
    def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
        return isolith.rms_norm.reference(x, weight, eps, round_before_weight)

    def make(*lines, base=QUIRK):
        made = backend(rms_norm, name="test")
        row = Plugin(
            name="test", distribution="d", version="1", target="t", backend=made, quirks=(read(*lines, base=base),)
        )
        return Dispatcher(Registry(operators=isolith.OPERATORS, plugins=(row,)), Settings())

    return make


def test_selection_refuses_a_call_that_meets_a_quirk_and_says_why(dispatcher):
    active = dispatcher('when = { "x.0" = ">=4" }')
    assert active.explain(isolith.rms_norm, call(rows=3)).chosen.name == "test.rms_norm"
    explanation = active.explain(isolith.rms_norm, call(rows=4))
    assert explanation.chosen.name == "reference"
    assert explanation.reasons == "  test.rms_norm: quirk odd-rows: wrong for many rows (https://example.org/1)"


def test_a_quirk_that_tells_is_in_explain_and_changes_no_choice(dispatcher):
    explanation = dispatcher(base=QUIRK.replace('"refuse"', '"tell"')).explain(isolith.rms_norm, call())
    assert explanation.chosen.name == "test.rms_norm"
    assert "-> test.rms_norm: chosen; quirk odd-rows: wrong for many rows" in str(explanation)
    assert explanation.as_dict()["candidates"][0]["note"].startswith("quirk odd-rows")


@pytest.mark.parametrize(("line", "chosen"), [('kernel = "rms_norm"', "reference"), ('kernel = "x"', "test.rms_norm")])
def test_a_quirk_is_about_the_kernel_that_it_names(dispatcher, line, chosen):
    assert dispatcher(line).explain(isolith.rms_norm, call()).chosen.name == chosen


def test_a_quirk_is_stale_behind_its_review():
    quirk = read()
    assert not quirk.is_stale(datetime.date(2030, 1, 1))
    assert quirk.is_stale(datetime.date(2030, 1, 2))


SOURCE = """
import isolith
from isolith import Backend, hookimpl
@hookimpl
def isolith_backend():
    return Backend(name="quirky", device_type="cpu", api_version=1, why_unavailable=lambda: None, kernels=())
"""


@pytest.fixture
def quirky(tmp_path, monkeypatch):
    """Install a plugin with this quirks.toml beside it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("isolith.dispatch.Process.default", None)

    def make(text):
        folder = tmp_path / f"plugin_quirky_{abs(hash(text))}"
        folder.mkdir()
        (folder / "__init__.py").write_text(SOURCE)
        (folder / "quirks.toml").write_text(text)
        info = tmp_path / "quirky-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quirky\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[isolith]\nquirky = {folder.name}\n")

    return make


def status(capsys):
    """What `isolith status` prints, as text and of the plugin."""
    assert main(["status", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["backends"]
    assert main(["status"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    return text, next(row for row in rows if row["name"] == "quirky")


def test_status_lists_quirks_and_which_are_stale(quirky, capsys):
    quirky(QUIRK.replace("2030", "2020"))
    text, row = status(capsys)
    assert row["quirks"][0] | {"says": ""} == {
        "id": "odd-rows",
        "about": "quirky.rms_norm",
        "effect": "refuse",
        "says": "",
        "link": "https://example.org/1",
        "review": "2020-01-01",
        "here": True,
        "stale": True,
    }
    assert "quirky.rms_norm is not taken: wrong for many rows [https://example.org/1]; STALE" in text


def test_a_plugin_whose_quirks_cannot_be_read_is_not_available(quirky, capsys):
    quirky("[[quirk]]")
    _, row = status(capsys)
    assert row["available"] is False
    assert "quirk 1: it lacks id" in row["reason"]
