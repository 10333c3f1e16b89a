"""Arguments that are not contiguous, or start at an odd element, give the same results or are refused."""

from isolith_conformance.buffers import Layout
from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("layout", "one")
def test_strides_and_offsets_do_not_matter(trial: Trial) -> None:
    plain = trial.run().results
    layouts: dict[Layout, str] = {"padded": "arguments with padded rows", "offset": "arguments from an odd element on"}
    for layout, words in layouts.items():
        response = trial.run_if_claimed(layout=layout) if trial.takes(layout) else None
        if response is not None:
            trial.agree(plain, response.results, words)
