"""The pages of the site that are made of other files: READMEs, the support table, and a page for every operator.

A README's links to other READMEs become links between pages; links to files that are no page become code.
"""

import argparse
import inspect
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from isolith.commands import COMMANDS
from isolith.ops import OPERATORS

ROOT = Path(__file__).parents[1]
PAGES: Mapping[str, str] = MappingProxyType(
    {
        "README.md": "index.md",
        "plugins/isolith-transformers/README.md": "transformers.md",
        "conformance/README.md": "conformance.md",
        "plugins/isolith-acme/README.md": "acme.md",
        "benchmarks/README.md": "speed.md",
        "plugins/README.md": "plugins.md",
        "CONTRIBUTING.md": "contributing.md",
        "backends/README.md": "backends.md",
        "backends/isolith_backends/cpu/README.md": "cpu.md",
        "backends/isolith_backends/cuda/README.md": "cuda.md",
        "backends/isolith_backends/ascend/README.md": "ascend.md",
        "backends/isolith_backends/cambricon/README.md": "cambricon.md",
        "DECISIONS.md": "decisions.md",
        "CHANGELOG.md": "changelog.md",
    }
)
"""Files of the repository, and the pages that they are."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```console slow$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    made = {page: linked((ROOT / source).read_text(encoding="utf-8"), source) for source, page in PAGES.items()}
    made["support.md"] = support()
    made["operators/index.md"] = operator_list()
    made |= {f"operators/{name}.md": operator_page(name) for name in OPERATORS}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def linked(text: str, source: str) -> str:
    """A README with its links made for the site."""

    def link(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = PAGES.get(there) or PAGES.get(f"{there}/README.md")
        if page:
            return f"[{label}]({page}{'#' if anchor else ''}{anchor})"
        if image and there.startswith("docs/"):
            return f"![{label}]({there.removeprefix('docs/')})"
        assert (ROOT / there).exists(), f"{source} links to {target}, which there is not"
        return label if label.startswith("`") or there == label else f"{label} (`{there}`)"

    return FENCE.sub("```console", LINK.sub(link, text))


def answer(command: str, **options: Any) -> Any:  # Any: as argparse has them; JSON
    """What a command of isolith says."""
    return COMMANDS[command].answer(argparse.Namespace(**options))


def support() -> str:
    """The support table, from the reports in the repository."""
    reports = sorted((ROOT / "conformance" / "reports").glob("*.json"))
    table = COMMANDS["table"].text(answer("table", reports=reports))
    return f"""# Support

What each backend has for each operator, and how conformance reports say that it was shown to be right. *hardware*: on
such a device; *interpreter*: in Triton's interpreter on a host; *twin*: on functions that do on a host what the vendor
documents; *declared*: no report shows it. (quick): a part of the cases.

{table}
"""


def operator_list() -> str:
    """All operators, by family, with their first sentences."""
    lines = ["# Operators", "", "Each is a function of `isolith`; `isolith ops NAME` prints the same as its page."]
    for family in dict.fromkeys(operator.family for operator in OPERATORS.values()):
        lines += ["", f"## {family}", "", "| operator | what it does |", "|---|---|"]
        mine = [operator for operator in OPERATORS.values() if operator.family == family]
        lines += [f"| [`{one.name}`]({one.name}.md) | {cell(one.doc.strip().splitlines()[0])} |" for one in mine]
    return "\n".join(lines)


def operator_page(name: str) -> str:
    """One operator's contract."""
    (row,) = answer("ops", operator=name)
    dtypes = [f"- `{argument}` is {', '.join(dtypes)}" for argument, dtypes in row["dtypes"].items()]
    more = [f"- {label}: {', '.join(f'`{one}`' for one in row[key])}" for label, key in WHERE if row[key]]
    parts = [
        f"# {name}",
        prose(row["doc"].strip()),
        "## Signature",
        f"```python\n{signature(name)}\n```",
        "## Shapes and dtypes",
        "```text\n" + re.sub(r"(?<=\]) (?=\S+\[)", "\n", row["shapes"].replace(" -> ", "\n-> ")) + "\n```",
        "\n".join(dtypes),
        "## More",
        "\n".join([*more, f"- its file: `core/isolith/ops/{row['family']}/{name}.py`"]),
    ]
    return "\n\n".join(parts) + "\n"


WHERE = (("writes", "mutates"), ("composed of", "composed_of"), ("kernels", "kernels"))


def signature(name: str) -> str:
    """A call of the operator, an argument on each line."""
    found = OPERATORS[name].signature
    arguments = "".join(f"    {parameter},\n" for parameter in found.parameters.values())
    result = inspect.formatannotation(found.return_annotation)
    return f"{name}(\n{arguments}) -> {result}".replace("torch.Tensor", "Tensor")


def prose(text: str) -> str:
    """A docstring as Markdown: formulas stay as they stand, and no sign of the prose is taken for markup."""
    parts = []
    for part in re.split(r"\n\s*\n", text):
        if all(line.startswith("    ") for line in part.splitlines()):
            parts.append(part)
            continue
        words = re.split(r"(`[^`]*`)", part)
        parts.append("".join(word if word.startswith("`") else SIGNS.sub(r"\\\g<0>", word) for word in words))
    return "\n\n".join(parts)


SIGNS = re.compile(r"[*_<>\[\]|#]")


def cell(text: str) -> str:
    """Text that does not end a table's cell."""
    return text.replace("|", "\\|")
