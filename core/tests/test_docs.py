"""The site builds without the network, strictly, and has a page for every operator."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import isolith

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def test_every_operator_has_a_page_that_says_its_contract(site):
    for name, operator in isolith.OPERATORS.items():
        page = (site / "operators" / name / "index.html").read_text()
        assert operator.doc.split()[0] in page
        assert all(argument in page for argument in operator.signature.parameters)


def test_no_page_loads_anything_from_elsewhere(site):
    loaded = re.compile(r"""<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//[^"]*""")
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(isolith.OPERATORS)
    assert [found for page in pages for found in loaded.findall(page.read_text())] == []


def test_every_page_of_the_list_is_there(site):
    text = (ROOT / "mkdocs.yml").read_text()
    for page in re.findall(r": ([\w/]+)\.md$", text, re.MULTILINE):
        place = site / "index.html" if page == "index" else site / page / "index.html"
        assert place.is_file(), page
