"""What every test needs: folders of its own instead of the user's."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def folders_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests, and the processes that they start, remember or keep does not reach the user's folders."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
            patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        share_what_is_compiled(tmp_path_factory)
        yield


def share_what_is_compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The processes of one run compile C++ once."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "native"
    shared.mkdir(mode=0o700, exist_ok=True)
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "isolith"
    folder.mkdir()
    (folder / "native").symlink_to(shared)
