"""Pages of the documentation that are made and not written: choices, experiments, the API, the project's own files.

A hook of MkDocs (``hooks`` in mkdocs.yml): the pages exist while the site is built and nowhere else. A choice's page
has what its YAML file says of itself, the file, the class that it names (its docstring and its constructor's arguments,
read without importing it), and its row in every table of ``experiments/`` that has one. `generated` needs nothing but
the standard library and PyYAML.
"""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONF, SOURCE, EXPERIMENTS = ROOT / "conf", ROOT / "src", ROOT / "experiments"
ADDED = ("benchmark", "experiment")
"""Groups whose choices are added to a command, as in ``+benchmark=pope``."""
PLACED = {
    "memory_mask": "memory_mask@fusion.sees",
    "pair_head": "+pair_head@dual_encoder.head",
}
"""Groups whose choices are put at a place of the configuration."""
WITH = {"memory_mask": "fusion=lavi", "pair_head": "recipe=contrastive", "text_tower": "recipe=contrastive"}
"""What has to be chosen as well for such a group to have a place."""
TOP = "vlmlab"
"""The page of the modules that lie in no folder."""
OURS = ("hydra", "cell")
"""Folders of conf/ that are not groups to choose from by themselves."""
PROJECT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
FOLDER = re.compile(r"\]\(((?:\.\./)?[a-z0-9_]+)\)")
"""A link to a folder of ``experiments/``, whose page is its README."""
TABLE = re.compile(r"(?:^\|.*\|[ ]*\n?)+", re.MULTILINE)
MARK = re.compile(r"<!-- pages: (\S+) -->")


def on_files(files: Any, config: Any) -> Any:
    """MkDocs asks for the files: add the generated ones and put all into the navigation."""
    from mkdocs.structure.files import File

    pages = generated()
    for address, content in pages.items():
        files.append(File.generated(config, address, content=content))
    known = {address for entry in config.nav for address in _addresses(entry)}
    more = sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name not in known)
    guide = next(entry["Guide"] for entry in config.nav if "Guide" in entry)
    guide += [name for name in more if name not in guide]
    config.nav += [*_navigation(pages), {"Contributing": "contributing.md"}, {"Changelog": "changelog.md"}]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in ``<!-- pages: pattern -->`` with the pages of docs/ that match, and link papers."""
    depth = "../" * page.file.src_uri.count("/")
    markdown = MARK.sub(lambda found: _listed(found[1], depth), markdown)
    parts = CODE.split(markdown)  # text and code in turn
    parts[::2] = [ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text) for text in parts[::2]]
    return "".join(parts)


def generated() -> dict[str, str | bytes]:
    """Every generated page or picture by its address below docs/."""
    pages: dict[str, str | bytes] = {}
    groups = choices()
    rows = list(measured())
    pages["choices/index.md"] = _all_groups(groups)
    for group, names in groups.items():
        pages[f"choices/{group}/index.md"] = _group(group, names)
        for name in names:
            pages[f"choices/{group}/{name}.md"] = _choice(group, name, rows)
    pages |= _experiments()
    pages |= {f"api/{package}.md": _api(package) for package in packages()}
    listed = [f"- [{_dotted(package)}]({package}.md): {_first(_docstring(_folder(package)))}" for package in packages()]
    pages["api/index.md"] = "\n".join(["# API", "", *listed])
    pages |= {address: (ROOT / name).read_text(encoding="utf-8") for address, name in PROJECT.items()}
    return pages


# ------------------------------------------------------------------ choices


def choices() -> dict[str, list[str]]:
    """The names of every group's choices."""
    folders = sorted(folder for folder in CONF.iterdir() if folder.is_dir() and folder.name not in OURS)
    found = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    return {group: names for group, names in found.items() if names}


def words(group: str, name: str) -> str:
    """What chooses it on the command line."""
    if group in PLACED:
        return " ".join(filter(None, (WITH.get(group), f"{PLACED[group]}={name}")))
    many = "-m " if group == "experiment" else ""
    before = f"{WITH[group]} " if group in WITH else ""
    return f"{many}{before}{'+' if group in ADDED else ''}{group}={name}"


def about(file: Path) -> str:
    """The comment at the top of a YAML file, as text."""
    lines = file.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("# @package")]
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#"))
    text = [line[1:] if line.startswith(" ") else line for line in comment]
    return "\n".join(f"\n    {line.strip()}\n" if line.startswith("  ") else _plain(line) for line in text).strip()


def target(file: Path) -> str | None:
    """The class a choice names, in its own file or in the one of the same group that it inherits from."""
    node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if isinstance(node.get("_target_"), str):
        return str(node["_target_"])
    return next((named for named in map(target, bases(file)) if named), None)


def _all_groups(groups: dict[str, list[str]]) -> str:
    lines = [
        "# Choices",
        "",
        "Every choice is one YAML file in `conf/<group>`.",
        "",
        "| group | choices |",
        "|---|---|",
    ]
    for group, names in groups.items():
        links = ", ".join(f"[{name}]({group}/{name}.md)" for name in names)
        lines.append(f"| [{group}]({group}/index.md) | {links} |")
    return "\n".join(lines) + "\n"


def _group(group: str, names: list[str]) -> str:
    lines = [
        f"# {group}",
        "",
        f"    python train.py {words(group, '<choice>')}",
        "",
        "| choice | what it is |",
        "|---|---|",
    ]
    for name in names:
        text = _first(about(CONF / group / f"{name}.yaml")) or _first(_class(CONF / group / f"{name}.yaml")[1])
        lines.append(f"| [{name}]({name}.md) | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _choice(group: str, name: str, rows: list[Row]) -> str:
    file = CONF / group / f"{name}.yaml"
    lines = [f"# {group}: {name}", "", about(file), "", f"    python train.py {words(group, name)}", ""]
    lines += [f"`conf/{group}/{name}.yaml`:", "", "```yaml", file.read_text(encoding="utf-8").rstrip(), "```", ""]
    lines += _inherited(file)
    named, docstring, arguments = _class(file)
    if named:
        package = named.split(".")[1]
        link = f"([{_dotted(package)}](../../api/{package}.md))"
        lines += ["## The class", "", f"`{named}` {link}", "", _markdown(docstring), "", *_arguments(arguments), ""]
    here = [row for row in rows if row.group == group and row.choice == name]
    if here:
        lines += ["## Measured", ""]
    for experiment, header in dict.fromkeys((row.experiment, row.header) for row in here):
        cells = [row.cells for row in here if (row.experiment, row.header) == (experiment, header)]
        link = f"[{experiment}](../../experiments/{experiment}/README.md)"
        lines += [f"Of {link}, which says what the numbers are of:", "", header, _rule(header), *cells, ""]
    return "\n".join(lines) + "\n"


def bases(file: Path) -> list[Path]:
    """The files of its own group that a choice inherits from, in order."""
    node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    found = []
    for entry in node.get("defaults", []):
        where, names = ("", [entry]) if isinstance(entry, str) else next(iter(entry.items()))
        if not where.startswith(("/", "override")):
            folder = file.parent / where.partition("@")[0]
            found += [
                folder / f"{name.partition('@')[0]}.yaml" for name in ([names] if isinstance(names, str) else names)
            ]
    return [base for base in dict.fromkeys(found) if base.is_file()]


def _inherited(file: Path) -> list[str]:
    lines = []
    for base in bases(file):
        name = base.relative_to(CONF).as_posix()
        if base.parent == file.parent:
            lines += [f"It inherits from [{base.stem}]({base.stem}.md).", ""]
        else:
            lines += [
                f"It inherits from `{name}`:",
                "",
                "```yaml",
                base.read_text(encoding="utf-8").rstrip(),
                "```",
                "",
            ]
    return lines


def _class(file: Path) -> tuple[str, str, list[tuple[str, str, str]]]:
    """A choice's class: its path, its docstring, and (name, annotation, default) of the constructor's keywords."""
    named = target(file)
    if named is None or not named.startswith("vlmlab."):
        return "", "", []
    module, _, name = named.rpartition(".")
    path = SOURCE / (module.replace(".", "/") + ".py")
    nodes = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    node = next((node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name), None)
    if node is None:
        return named, "", []
    inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    return named, ast.get_docstring(node) or "", _keywords(inits[0]) if inits else []


def _keywords(init: ast.FunctionDef) -> list[tuple[str, str, str]]:
    arguments = init.args.args[1:]
    defaults = [None] * (len(arguments) - len(init.args.defaults)) + list(init.args.defaults)
    pairs = [*zip(arguments, defaults, strict=True), *zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)]
    written = [[ast.unparse(node) if node else "" for node in (name.annotation, value)] for name, value in pairs]
    return [(name.arg, kind, default) for (name, _), (kind, default) in zip(pairs, written, strict=True)]


def _arguments(arguments: list[tuple[str, str, str]]) -> list[str]:
    if not arguments:
        return []
    lines = []
    for name, kind, default in arguments:
        kind, default = kind.replace("|", "\\|"), default.replace("|", "\\|")
        lines.append(f"| `{name}` | `{kind}` | {f'`{default}`' if default else 'given by the model'} |")
    return ["| key | type | default of the class |", "|---|---|---|", *lines]


# ------------------------------------------------------------------ experiments


class Row(NamedTuple):
    """A row of a table of an experiment that is about one choice of one group."""

    experiment: str
    group: str
    choice: str
    header: str
    cells: str


def measured() -> Iterator[Row]:
    """The rows of all tables of ``experiments/`` with a group for a heading and one of its choices for an entry."""
    groups = choices()
    for page in sorted(EXPERIMENTS.glob("*/README.md")):
        for table in TABLE.findall(page.read_text(encoding="utf-8")):
            header, *body = table.strip().splitlines()
            names = [cell.strip() for cell in header.strip("| ").split("|")]
            for line in body[1:]:
                entries = [cell.strip().strip("`") for cell in line.strip("| ").split("|")]
                for group, entry in zip(names, entries, strict=False):
                    if entry in groups.get(group, ()):
                        yield Row(page.parent.name, group, entry, header, line)


def _experiments() -> dict[str, str | bytes]:
    pages: dict[str, str | bytes] = {}
    for page in sorted(EXPERIMENTS.rglob("*.md")):
        text = page.read_text(encoding="utf-8").replace("../../README.md", "../../index.md")
        pages[f"experiments/{page.relative_to(EXPERIMENTS).as_posix()}"] = FOLDER.sub(r"](\1/README.md)", text)
    for ending in ("png", "csv", "yaml"):
        for file in sorted(EXPERIMENTS.glob(f"*/*.{ending}")):
            pages[f"experiments/{file.relative_to(EXPERIMENTS).as_posix()}"] = file.read_bytes()
    return pages


# ------------------------------------------------------------------ API


def packages() -> list[str]:
    """The folders of the package that have modules, the outermost ones."""
    folders = sorted(path for path in (SOURCE / "vlmlab").iterdir() if (path / "__init__.py").is_file())
    return [TOP, *(folder.name for folder in folders if any(folder.rglob("[a-z]*.py")))]


def _api(package: str) -> str:
    folder = _folder(package)
    lines = [f"# {_dotted(package)}", "", _markdown(_docstring(folder)), ""]
    for file in sorted(folder.glob("*.py") if package == TOP else folder.rglob("*.py")):
        if not file.name.startswith("_"):
            module = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
            lines += [f"::: {module}", "    options:", "      heading_level: 2", ""]
    return "\n".join(lines)


def _dotted(package: str) -> str:
    return "vlmlab" if package == TOP else f"vlmlab.{package}"


def _folder(package: str) -> Path:
    return SOURCE / "vlmlab" / ("" if package == TOP else package)


def _docstring(folder: Path) -> str:
    return ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""


# ------------------------------------------------------------------ text and navigation


def _plain(text: str) -> str:
    """Text in which nothing is taken for a tag: ``<`` is written out where it is not in code."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def _markdown(docstring: str) -> str:
    """A docstring whose sections are headings in bold and whose entries are lists."""
    lines = []
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", line):
            lines += [f"**{line.removesuffix(':')}**", ""]
        elif found := re.fullmatch(r"    (\*{0,2}\w+): (.*)", line):
            lines.append(f"- `{found[1]}`: {_plain(found[2])}")
        else:
            lines.append(_plain(line) if not line.startswith("     ") else "    " + _plain(line.strip()))
    return "\n".join(lines)


def _first(text: str) -> str:
    """The first sentence, or what there is of one, in one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    found = re.match(r"(.+?[.:])(?:\s[A-Z]|$)", paragraph)
    return found[1] if found else paragraph


def _rule(header: str) -> str:
    return "|" + "---|" * (header.count("|") - 1)


def _listed(pattern: str, depth: str) -> str:
    pages = sorted(page.name for page in (ROOT / "docs").glob("*.md") if fnmatch.fnmatch(page.name, f"{pattern}.md"))
    titles = {name: (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name in pages}
    return "\n".join(f"- [{title}]({depth}{name})" for name, title in titles.items())


def _addresses(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        for value in entry.values():
            for inner in value if isinstance(value, list) else [value]:
                yield from _addresses(inner)


def _navigation(pages: dict[str, str | bytes]) -> list[Any]:
    chosen: list[Any] = ["choices/index.md"]
    for group, names in choices().items():
        chosen.append({group: [f"choices/{group}/index.md", *({name: f"choices/{group}/{name}.md"} for name in names)]})
    tried: list[Any] = ["experiments/README.md"]
    for address in sorted(pages):
        if address.startswith("experiments/") and address.endswith(".md") and address not in tried:
            tried.append({address.removeprefix("experiments/").removesuffix(".md").removesuffix("/README"): address})
    reference = ["api/index.md", *({_dotted(package): f"api/{package}.md"} for package in packages())]
    return [{"Choices": chosen}, {"Experiments": tried}, {"API": reference}]
