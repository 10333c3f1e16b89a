"""A benchmark as one page of HTML that needs nothing else; it has no script, and escapes whatever a record holds."""

import base64
from importlib.resources import files

from markupsafe import Markup

from isolith_conformance.bench.growth import growths
from isolith_conformance.bench.picture import numbers, picture
from isolith_conformance.bench.record import Bench
from isolith_conformance.bench.text import (
    GROWTH_HEADING,
    cells,
    growth_cells,
    limit_lines,
    notes_of,
    number,
    seconds,
)
from isolith_conformance.page import environment, source

HEADING = (
    *("call", "context", "tokens", "kernel", "median", "spread", "n", "GB/s", "GFLOP/s", "least", "% of limit"),
    *("by", "× reference", "check"),
)


def page(bench: Bench) -> str:
    """The page of a record."""
    style = "".join(
        files(package).joinpath(name).read_text()
        for package, name in (("isolith_conformance", "page.css"), ("isolith_conformance.bench", "bench.css"))
    )
    template = environment().from_string(files("isolith_conformance.bench").joinpath("bench.html.j2").read_text())
    known = numbers(bench)
    rows = [(known[row.operator, row.label], row, cells(row)[1:]) for row in bench.rows]
    return template.render(
        bench=bench,
        heading=HEADING,
        rows=rows,
        wrong=[row for row in bench.rows if row.state != "RIGHT"],
        peers=[
            (row, peer, seconds(peer.time.median) if peer.time else "–", number(peer.ratio))
            for row in bench.rows
            for peer in row.peers
        ],
        limits=list(limit_lines(bench.limits)),
        notes=notes_of(bench),
        growth=[growth_cells(found) for found in growths(bench)],
        growth_heading=GROWTH_HEADING,
        drawing="data:image/svg+xml;base64," + base64.b64encode(picture(bench).encode()).decode(),
        style=Markup(style),  # the package's own files
        policy=f"default-src 'none'; style-src '{source(style)}'; img-src data:; base-uri 'none'",
    )
