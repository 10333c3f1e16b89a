"""Real distributions, built for a test: a module, and the metadata by which plugins are found."""

import textwrap
from pathlib import Path

HEAD = """
import isolith
from isolith import Backend, hookimpl, implements

def backend(**fields):
    given = dict(name=NAME, device_type="cpu", api_version=1, why_unavailable=lambda: None, kernels=(__name__,))
    return Backend(**given | fields)
"""

HOOK = """
@hookimpl
def isolith_backend():
    return backend()
"""

# Right, in code of its own.
RIGHT_RMS_NORM = """
@implements(isolith.rms_norm)
def rms_norm(x, weight, eps=1e-6, round_before_weight=False):
    wide = x.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    if round_before_weight:
        normed = normed.to(x.dtype).float()
    return (normed * weight.float()).to(x.dtype).contiguous()
"""


def build(folder: Path, name: str, source: str, head: str = HEAD, hook: str = HOOK, distribution: str = "") -> Path:
    """Write a plugin `name` with this source; the folder must then be on the path."""
    module, distribution = f"plugin_{name.replace('.', '_')}", distribution or f"isolith-{name}"
    body = f"NAME = {name!r}\n{head}\n{textwrap.dedent(source)}\n{hook}"
    (folder / f"{module}.py").write_text(body)
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[isolith]\n{name} = {module}\n")
    return folder
