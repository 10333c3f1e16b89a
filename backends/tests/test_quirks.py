"""What the backends keep in their quirks.toml is about kernels that there are."""

from pathlib import Path

import isolith
import isolith_backends
from isolith import plugins, quirks

FILES = sorted(Path(isolith_backends.__file__).parent.glob("*/quirks.toml"))


def test_quirks_are_about_kernels_that_there_are():
    backends = {plugin.name: plugins.load(plugin).backend for plugin in plugins.discover()}
    found = []
    for path in FILES:
        kernels, reason = plugins.kernels_of(backends[path.parent.name])
        assert reason is None
        for quirk in quirks.beside(str(path), isolith.OPERATORS):
            assert not quirk.kernel or quirk.kernel in {kernel.name for kernel in kernels[quirk.operator]}
            found.append(quirk.id)
    assert found
