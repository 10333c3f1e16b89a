import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from isolith_conformance.page import page, page_command
from isolith_conformance.page_picture import bar_of, picture
from isolith_conformance.report import BackendRecord
from isolith_conformance.report_text import summary_text

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    '" autofocus onfocus="alert(1)',
    "javascript:alert(1)",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "--><script>alert(1)</script>",
    "]]><script>alert(1)</script>",
    "{{ 7*7 }}{% for x in y %}",
    "=cmd|' /C calc'!A0",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202eright to left\u2066",
    "line\r\nbreak\x00null",
    "&lt;script&gt;&#60;b>",
]
ALLOWED = {
    *("html", "head", "meta", "title", "style", "script", "body", "header", "section", "article", "div", "p", "br"),
    *("h1", "h2", "h3", "small", "span", "b", "code", "pre", "ul", "li", "a", "details", "summary"),
    *("table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "svg", "line", "rect", "text"),
}


class Elements(HTMLParser):
    """Every element, attribute and text of a page."""

    def __init__(self):
        super().__init__()
        self.elements, self.attributes, self.scripts, self.links = set(), set(), 0, set()
        self.ids = []

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.scripts += tag == "script"
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value for name, value in attrs if name in ("href", "src", "srcset", "action")}
        self.ids += [value for name, value in attrs if name == "id"]


def elements(text):
    parser = Elements()
    parser.feed(text)
    return parser


@pytest.fixture
def poisoned(make_report, make_case):
    """A report with a payload wherever a plugin, a device or a user has a say."""

    def make(payload):
        case = make_case(
            verdict="FAIL", rule=payload, sample=payload, dtype=payload, check=payload, executed=(payload,)
        )
        case = replace(case, backend=payload, operator=payload, family=payload, kernel=payload, problem=payload)
        case = replace(case, statistics={payload: 2.0, "r1": 3.0}, limits={payload: 1.0, "r1": 1.0})
        refused = make_case(verdict="NOT-CLAIMED", problem=payload)
        backend = BackendRecord(
            name=payload,
            distribution=payload,
            version=payload,
            device=payload,
            arch=payload,
            versions={payload: payload},
            kernels={payload: (payload,)},
        )
        gone = replace(backend, name=f"{payload} gone", why_unavailable=payload)
        waiver = {payload: payload}
        report = make_report(case, refused, backends=(backend, gone), waivers=(waiver,), command=payload)
        more = {payload: payload}
        return replace(report, environment=replace(report.environment, more=more, modules=more, platform=payload))

    return make


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_payload_makes_no_element(poisoned, payload):
    assert elements(page(poisoned(payload))).elements <= ALLOWED


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_payload_makes_no_script(poisoned, payload):
    assert elements(page(poisoned(payload))).scripts == 1


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_payload_adds_no_attribute(poisoned, payload):
    assert elements(page(poisoned(payload))).attributes == elements(page(poisoned("harmless"))).attributes


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_every_link_stays_on_the_page(poisoned, payload):
    assert all(re.fullmatch(r"#b\d+-\d+-\d+(-n?\d+)?", link) for link in elements(page(poisoned(payload))).links)


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_page_has_no_character_that_hides_or_turns_text(poisoned, payload):
    assert not re.findall(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", page(poisoned(payload))
    )


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_terminal_text_has_no_control_character(poisoned, payload):
    assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", summary_text(poisoned(payload)))


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_no_line_of_the_terminal_text_starts_a_formula(poisoned, payload):
    assert not any(line[:1] in tuple("=+@") for line in summary_text(poisoned(payload)).splitlines())


def test_page_loads_nothing(make_report):
    assert not re.search(r"(?:src|href)=\"(?!#)|url\(|@import|https?:", page(make_report()))


def test_policy_forbids_other_scripts(make_report):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page(make_report()))[1]
    assert re.fullmatch(
        r"default-src &#39;none&#39;; style-src &#39;sha256-[\w+/=]+&#39;; script-src &#39;sha256-[\w+/=]+&#39;; "
        r"base-uri &#39;none&#39;",
        policy,
    )


def test_every_link_has_its_target(make_report, make_case):
    found = elements(page(make_report(make_case(), make_case(dtype="float16", verdict="FAIL"))))
    assert {link[1:] for link in found.links} <= set(found.ids)


def test_no_id_stands_twice(make_report, make_case):
    cases = [make_case(operator=name, family=name, verdict=v) for name in "ab" for v in ("FAIL",)]
    ids = elements(page(make_report(*cases, make_case(backend="cuda", verdict="CRASH")))).ids
    assert len(ids) == len(set(ids))


def test_failure_is_told_with_statistics_and_command(make_report, make_case):
    failed = make_case(verdict="FAIL", rule="R2", problem="R2 is 17.3", statistics={"r2": 17.3}, limits={"r2": 2.0})
    text = page(make_report(failed))
    expected = [
        "R2 is 17.3",
        '<td class="beyond">17.3</td>',
        "<td>2</td>",
        "reproduce cpu.rms_norm/one_row/bfloat16/accuracy --seed 7 --backend cpu</pre>",
    ]
    assert [part for part in expected if part not in text] == []


@pytest.mark.parametrize(
    "run", [{"scope": "quick"}, {"scope": "selected"}, {"how": "twin"}, {"how": "interpreter"}], ids=str
)
def test_page_of_less_than_a_full_run_has_a_banner(make_report, run):
    assert re.search(r'class="banner">[^<]*not sufficient for conformance', page(make_report(**run)))


def test_page_of_a_full_run_has_none(make_report):
    assert 'class="banner"' not in page(make_report())


def test_conformant_page_says_so(make_report):
    assert '<p class="verdict conformant">CONFORMANT' in page(make_report())


def test_cell_shows_the_worst_outcome(make_report, make_case):
    text = page(make_report(make_case(), make_case(sample="x", verdict="CRASH")))
    assert re.search(r'<td class="bad" title="1 passed, 1 CRASH"><a href="#b0-0-0-0">✗ 1</a></td>', text)


def test_cell_of_a_twin_is_striped(make_report, make_case):
    assert '<td class="pass elsewhere"' in page(make_report(make_case(how="twin"), how="twin"))


def test_cell_of_hardware_is_not_striped(make_report):
    assert 'elsewhere"' not in page(make_report()).split("<body>")[1]


def test_cell_of_a_twin_beside_hardware_says_so(make_report, make_case):
    assert "<small>twin</small>" in page(make_report(make_case(), make_case(dtype="float16", how="twin")))


def test_operator_that_failed_comes_first(make_report, make_case):
    text = page(make_report(make_case(operator="a"), make_case(operator="z", verdict="FAIL")))
    assert re.findall(r"<summary><b[^>]*>(\w)</b>", text) == ["z", "a"]


def test_unavailable_backend_has_its_reason(make_report):
    gone = BackendRecord(name="cuda", distribution="", version="", device="cuda", why_unavailable="no CUDA device")
    assert "Not run: no CUDA device" in page(make_report(backends=(gone,)))


def test_kernel_that_cannot_run_here_has_its_reason(make_report):
    here = replace(make_report().backends[0], unavailable_kernels={"cpu.fast": "library <1> is not installed"})
    assert "<code>cpu.fast</code>: library &lt;1&gt; is not installed" in page(make_report(backends=(here,)))


def test_limit_itself_is_the_last_legal_bar():
    assert (bar_of(1.0), bar_of(1.0001)) == (31, 32)


@pytest.mark.parametrize(("share", "place"), [(0.0, 0), (1e-9, 0), (1e9, 47), (float("inf"), 47)])
def test_what_lies_beyond_the_picture_is_in_its_last_bar(share, place):
    assert bar_of(share) == place


def test_one_case_among_thousands_is_seen():
    assert picture("r1", [0.1] * 5000 + [5.0]).bars[-1].height >= 1


def test_infinite_statistic_is_drawn(make_report, make_case):
    text = page(make_report(make_case(verdict="FAIL", statistics={"r1": float("inf")}, limits={"r1": 1.4})))
    assert "largest inf of its limit" in text


def test_command_writes_the_page(make_report, tmp_path):
    make_report().write(tmp_path / "a.json")
    assert (page_command(tmp_path / "a.json", tmp_path / "a.html"), (tmp_path / "a.html").exists()) == (0, True)


def test_command_ends_with_2_where_there_is_no_report(tmp_path):
    assert page_command(tmp_path / "a.json", tmp_path / "a.html") == 2
