"""Whatever is installed: nothing is imported before it is needed, the process lives, other plugins are as without it.

Real distributions, in processes of their own. What a plugin does after it has been loaded cannot be held off: a kernel
that ends its process ends it, and a plugin that the user has named is loaded as it is.
"""

import json
import subprocess
import sys

import pytest

HEAD = """
import isolith
from isolith import Backend, hookimpl, implements, ops

def why_unavailable():
    return None

def described(**fields):
    given = dict(name="NAME", device_type="cpu", api_version=1, why_unavailable=why_unavailable, kernels=(__name__,))
    return Backend(**given | fields)

@hookimpl
def isolith_backend():
    return described()
"""
KERNEL = """
@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    return isolith.rms_norm.reference(x, weight, eps, round_before_weight)
"""
GOOD = HEAD + KERNEL
LOADED = "the process that loaded it"
UNLESS = "; it is not loaded here: isolith status tries it again, and ISOLITH_PLUGINS loads it as it is"
OTHER_API = GOOD.replace("return described()", "return described(api_version=99)")
FOREIGN = "import dataclasses\nforeign = dataclasses.replace(isolith.swiglu, name='swish')\n@implements(foreign)\n"
FOREIGN += "def swish(x, limit=0.0, row_weight=None): ...\n"

BAD = {
    "import_error": ("import no_such_sdk", "ModuleNotFoundError: No module named 'no_such_sdk' ("),
    "system_exit": ("raise SystemExit(3)", "SystemExit: 3 ("),
    "interrupt": ("raise KeyboardInterrupt", f"{LOADED} was ended by SIGINT: KeyboardInterrupt{UNLESS}"),
    "exit": ("import os; os._exit(0)", f"{LOADED} exited with 0{UNLESS}"),
    "segfault": ("import ctypes; ctypes.string_at(0)", f"{LOADED} was ended by SIGSEGV{UNLESS}"),
    "abort_in_probe": (
        GOOD.replace("    return None", "    import os; os.abort()"),
        f"{LOADED} was ended by SIGABRT",
    ),
    "exit_in_kernels": (
        HEAD.replace("kernels=(__name__,)", "kernels=('kernels_that_exit',)"),
        f"{LOADED} exited with 5{UNLESS}",
    ),
    "other_api": (OTHER_API, "written for plugin API 99; this isolith has API 1"),
    "other_torch": ("raise RuntimeError('imported')", "it needs torch<2.0,>=1.0; this is torch 2."),
    "patches_torch": (
        f"import torch\ntorch.equal = torch.Tensor.add = lambda *given: True\n{GOOD}",
        f"importing it replaces torch.Tensor.add, torch.equal{UNLESS}",
    ),
    "patches_builtins": (
        f"import builtins\nbuiltins.sum = lambda *given: 0\n{GOOD}",
        f"importing it replaces builtins.sum{UNLESS}",
    ),
    "twice": (GOOD, "isolith-twice 1.0 and twice-fork 2.0 both offer the backend 'twice'; uninstall all but one"),
    "no_such_operator": (
        HEAD + "implements(ops.norm.rms_normal)",
        "AttributeError: module 'isolith.ops.norm' has no attribute 'rms_normal' (",
    ),
}
ODD = {
    "imports_what_wraps_torch": (f"import torch._dynamo\n{GOOD}", "available: 'cpu' tensors; 1 kernels"),
    "slow": (f"import time\ntime.sleep(1.2)\n{GOOD}", "s to import"),
    "drifts": (
        GOOD.replace("eps=1e-6", "epsilon=1e-6"),
        "without drifts.rms_norm: its signature is (x, weight, epsilon=1e-06, round_before_weight=False); rms_norm has",
    ),
    "drifts_in_a_default": (GOOD.replace("eps=1e-6", "eps=1e-5"), "its signature is (x, weight, eps=1e-05"),
    "foreign_operator": (f"{HEAD}{FOREIGN}", "without foreign_operator.swish: there is no operator 'swish'"),
}


class Site:
    """A folder of installed distributions, and programs that find them."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "kernels_that_exit.py").write_text("import os; os._exit(5)")

    def install(self, name, source, distribution="", version="1.0", needs=()):
        distribution = distribution or f"isolith-{name.replace('_', '-')}"
        (self.folder / f"plugin_{name}.py").write_text(source.replace("NAME", name))
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = [f"Name: {distribution}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *metadata, ""]))
        (info / "entry_points.txt").write_text(f"[isolith]\n{name} = plugin_{name}\n")

    def run(self, code, **environment):
        given = {
            "PYTHONPATH": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=given, capture_output=True, text=True, timeout=120, check=False)

    def status(self, timeout_s=20.0, **environment):
        code = f"import isolith.rehearsal as r; r.TIMEOUT_S = {timeout_s}\nfrom isolith.__main__ import main\n"
        done = self.run(f"{code}raise SystemExit(main(['status', '--json']))", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return {row["name"]: row for row in json.loads(done.stdout)["backends"]}


CALL = """
import isolith, torch
torch.manual_seed(1)
x, weight = torch.randn(3, 64), torch.randn(64)
with isolith.record() as calls:
    y = isolith.rms_norm(x, weight)
print(list(calls), y.numpy().tobytes().hex())
"""


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A site with every bad plugin and a good one."""
    made = Site(tmp_path_factory.mktemp("site"))
    for name, (source, _) in (BAD | ODD).items():
        made.install(name, source, needs=["torch<2.0,>=1.0", "rich"] if name == "other_torch" else ["torch>=2.0"])
    made.install("twice", GOOD, distribution="twice-fork", version="2.0")
    made.install("good", GOOD)
    return made


@pytest.fixture(scope="module")
def told(full):
    return full.status()


@pytest.mark.parametrize(("name", "reason"), [(name, reason) for name, (_, reason) in BAD.items()], ids=[*BAD])
def test_the_status_says_why_a_bad_plugin_is_not_used(told, name, reason):
    assert not told[name]["available"]
    assert told[name]["reason"].startswith(reason)


@pytest.mark.parametrize(("name", "says"), [(name, says) for name, (_, says) in ODD.items()], ids=[*ODD])
def test_the_status_says_what_is_odd_about_a_plugin_that_is_used(told, name, says):
    from isolith.commands.status import describe

    assert told[name]["available"]
    assert says in describe(told[name])


def test_a_good_plugin_is_used_beside_all_the_bad_ones(told):
    assert (told["good"]["available"], told["good"]["kernels"]) == (True, 1)


def test_a_call_is_to_the_bit_what_it_is_without_the_bad_ones(full, told, site):
    site.install("good", GOOD)
    alone, among = site.run(CALL), full.run(CALL, ISOLITH_KERNELS="rms_norm=good.rms_norm")
    assert alone.returncode == 0, alone.stderr
    assert "('rms_norm', 'good.rms_norm')" in alone.stdout
    assert among.stdout == alone.stdout, among.stderr


@pytest.mark.slow
def test_a_kernel_that_drifted_is_never_chosen(full, told):
    code = "import isolith, torch; print(isolith.explain(isolith.rms_norm, torch.ones(1, 8), torch.ones(8)))"
    assert "   drifts.rms_norm: its signature is (x, weight, epsilon=1e-06" in full.run(code).stdout


def test_importing_isolith_imports_no_plugin(full):
    done = full.run("import sys, isolith; print([name for name in sys.modules if name.startswith('plugin_')])")
    assert done.stdout.strip() == "[]", done.stderr


def test_a_first_call_survives_a_plugin_that_was_never_looked_at(site):
    site.install("good", GOOD)
    site.install("segfault", BAD["segfault"][0])
    assert "('rms_norm', 'good.rms_norm')" in site.run(CALL).stdout


def test_a_plugin_that_hangs_is_ended(site):
    site.install("hangs", "import time; time.sleep(1000)")
    assert site.status(timeout_s=4.0)["hangs"]["reason"] == f"it did not load within 4 s{UNLESS}"


@pytest.mark.slow
def test_what_was_found_is_remembered_until_another_is_installed(site):
    count = (
        "import isolith.rehearsal as r\nfirst = r.start\ndef start(row):\n    print(row.name)\n    return first(row)\n"
    )
    code = f"{count}r.start = start\nimport isolith; isolith.dispatch.dispatcher()"
    site.install("segfault", BAD["segfault"][0])
    (info,) = site.folder.glob("*.dist-info")
    (info / "RECORD").write_text("one")
    said = [site.run(code).stdout.split() for _ in range(2)]
    (info / "RECORD").write_text("another")
    assert [*said, site.run(code).stdout.split()] == [["segfault"], [], ["segfault"]]


@pytest.mark.slow
def test_a_plugin_that_was_mended_is_used_after_a_look_at_the_status(site):
    site.install("turns", "import os; os._exit(1)")
    first = site.status()["turns"]["available"]
    (site.folder / "plugin_turns.py").write_text(GOOD.replace("NAME", "turns"))
    assert (first, site.status()["turns"]["available"]) == (False, True)


@pytest.mark.slow
def test_a_plugin_that_the_user_names_is_loaded_as_it_is(site):
    site.install("patches", BAD["patches_torch"][0])
    site.install("exits", "import os; os._exit(7)")
    row = "import isolith; print([(p.name, p.reason) for p in isolith.dispatch.dispatcher().registry.plugins][0])"
    assert site.run(row, ISOLITH_PLUGINS="patches").stdout.strip() == "('patches', None)"
    assert site.run(row, ISOLITH_PLUGINS="exits").returncode == 7


@pytest.mark.slow
def test_the_status_survives_a_bad_plugin_that_the_user_names(site):
    site.install("exits", "import os; os._exit(7)")
    assert "exited with 7" in site.status(ISOLITH_PLUGINS="exits")["exits"]["reason"]


@pytest.mark.slow
def test_a_cache_that_is_nonsense_or_cannot_be_written_costs_a_rehearsal_alone(site):
    site.install("good", GOOD)
    (site.folder / "isolith").mkdir()
    (site.folder / "isolith" / "rehearsals.json").write_text('{"a": 1, "b": []')
    assert "good.rms_norm" in site.run(CALL).stdout
    assert "good.rms_norm" in site.run(CALL, XDG_CACHE_HOME="/proc/nowhere").stdout
