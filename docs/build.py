"""The documentation site and README.md, made from the notebooks as they stand, outputs included.

Each notebook becomes a page, and those of nbs/paper show what is published of them. Each module becomes
a reference page from its docstrings and docments. Nothing is run but imports.
"""

import argparse
import base64
import logging
import os
import re
import shutil
import sys
import tomllib
from importlib import import_module
from os.path import relpath
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbdev.showdoc import BasicMarkdownRenderer, show_doc

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, PUBLISHED, PAGES = ROOT / "nbs", ROOT / "outputs" / "published", ROOT / "_proc"
DIRECTIVE = re.compile(r"^#\| *(.*?) *\n?$\n?", re.M)
CODE = re.compile(r"(^(?P<fence>```+|~~~+).*?^(?P=fence)[ ]*$|`+[^`\n]+`+)", re.M | re.S)
MATH = re.compile(
    r"\\\$|!\[[^\]]*\]|\$\$(.+?)\$\$"
    r"|(?<![$\w])\$(?!\s)((?:\\.|[^$\\\n]|\n(?!\s*\n))+?)(?<!\s)\$(?![\w$])",
    re.S,
)
TARGET = re.compile(r"(?:(?<=\]\()|(?<=src=\"))(?!\w+:|#)([^)#\s\"]+)")


def outside_code(text, change):
    "`text` with `change` applied to what is neither a code block nor a code span."
    pieces = CODE.split(text)  # text, code, fence, text, ...
    return "".join(change(piece) if i % 3 == 0 else piece for i, piece in enumerate(pieces) if i % 3 < 2)


def mathml(text):
    "LaTeX between dollars as MathML, which needs no script, in a span: at a bare `<math>` Markdown ends the paragraph."

    def formula(match):
        block, inline = match.groups()
        if not (block or inline):  # an escaped dollar, or what a picture shows
            return match[0].lstrip("\\")
        if inline:
            return f"<span>{convert(inline)}</span>"
        numbered = re.sub(r"\\tag\{(.+?)\}", r"\\qquad (\1)", block.strip())
        return f'<span class="display">{convert(numbered, display="block")}</span>'

    return MATH.sub(formula, text)


def lowered(text):
    "`text` with its headings one level down."
    return outside_code(text, lambda piece: re.sub(r"^#(?=#* )", "##", piece, flags=re.M))


def output_markdown(output, picture, alt):
    "One output of a cell as Markdown; `picture(extension, bytes)` stores an image, `alt` describes it."
    if output.output_type == "stream":
        return f"```text\n{output.text.rstrip()}\n```" if output.name == "stdout" else ""
    data = output.get("data", {})
    for kind, extension, read in (("image/png", "png", base64.b64decode), ("image/svg+xml", "svg", str.encode)):
        if kind in data:
            return f"![{alt}]({picture(extension, read(data[kind]))})"
    if "text/markdown" in data:
        text = data["text/markdown"]
        return lowered(text) if re.search(r"^# ", text, re.M) else text
    if "text/html" in data:
        return re.sub(r'<style.*?</style>\s*| border="1" class="dataframe"', "", data["text/html"], flags=re.S)
    return f"```text\n{data['text/plain'].rstrip()}\n```" if "text/plain" in data else ""


def notebook_parts(path, picture):
    "The shown cells of a notebook as Markdown: no cell with `hide`, and the outputs alone of one with `echo: false`."
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        directives, source = DIRECTIVE.findall(cell.source), DIRECTIVE.sub("", cell.source).strip("\n")
        if "hide" in directives or not source.strip():
            continue
        if cell.cell_type == "markdown":
            parts.append(source)
            continue
        alt = next((line.partition(":")[2].strip(' "') for line in directives if line.startswith("fig-alt:")), "")
        if not alt and any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {})):
            raise ValueError(f"{path.name}: a picture has no `#| fig-alt: what it shows`:\n{source}")
        code = "" if "echo: false" in directives else f"```python\n{source}\n```"
        shown = filter(None, [code, *(output_markdown(output, picture, alt) for output in cell.outputs)])
        parts.append("\n\n".join(shown))
    return [part for part in parts if part]


def places():
    "The page on which each notebook, each published scale and each published table is shown."
    found = {
        path: path.relative_to(NOTEBOOKS).with_suffix(".md")
        for path in NOTEBOOKS.rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    }
    for tables in sorted(PUBLISHED.glob("*/tables")):
        found[tables.parent] = Path("published", f"{tables.parent.name}.md")
        found |= {path: Path("paper", path.name) for path in (*tables.glob("*.md"), *tables.parent.glob("*.md"))}
    return found


def placed(text, folder, page, place):
    "`text` of a file in `folder` with links that hold on `page`; pictures are copied, files without a page named."

    def link(match):
        target = (folder / match[1]).resolve()
        if target in place:
            return relpath(PAGES / place[target], page.parent)
        if not target.is_relative_to(ROOT) or not target.exists():
            return match[0]  # the build warns
        if target.suffix not in (".gif", ".jpg", ".png", ".svg", ".webp"):
            return f"repository:{target.relative_to(ROOT)}"
        copy = PAGES / target.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, copy)
        return relpath(copy, page.parent)

    text = outside_code(text, lambda piece: TARGET.sub(link, piece))
    return re.sub(r"\[([^\[\]]+)\]\(repository:([^)]+)\)", r"\1 (`\2`)", text)


def linked(text, names, depth):
    "`text` with each name of the library in backticks linked to its reference; `names` maps it to its module."

    def link(match):
        name = match[1]
        return f"[`{name}`]({'../' * depth}reference/{names[name]}.md#{name.lower()})" if name in names else match[0]

    blocks = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(b if i % 2 else re.sub(r"(?<![\[`])`(\w+)`(?![\]`])", link, b) for i, b in enumerate(blocks))


def write_page(page, text):
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(outside_code(text, mathml).rstrip() + "\n", encoding="utf-8")


def notebook_page(path, place, names):
    "The page of one notebook, its pictures beside it; what is published of it comes before its code."
    page = PAGES / place[path]
    page.parent.mkdir(parents=True, exist_ok=True)

    def picture(extension, content):
        name = f"{page.stem}_{len(list(page.parent.glob(page.stem + '_*')))}.{extension}"
        (page.parent / name).write_bytes(content)
        return name

    title, *parts = (placed(part, path.parent, page, place) for part in notebook_parts(path, picture))
    files = [file for file in place if place[file] == place[path] and file != path]
    results = {file.relative_to(PUBLISHED).parts[0]: file for file in files}  # claims.md over tables/claims.md
    if results:
        parts = ["## The notebook", *map(lowered, parts)]
    for scale, file in reversed(results.items()):
        text = re.sub(r"\A# .*", f"# Published, scale {scale}", file.read_text(encoding="utf-8"))
        parts.insert(0, lowered(placed(text, file.parent, page, place)))
    write_page(page, linked("\n\n".join([title, *parts]), names, len(place[path].parts) - 1))


def reference_entry(value):
    "Signature, docments and docstring of a function, class or method."
    try:
        entry = show_doc(value, renderer=BasicMarkdownRenderer, title_level=2)._repr_markdown_()
    except NameError:  # a signature that another library wrote, with annotations it does not define
        entry = f"## {value.__qualname__}\n\n*{value.__doc__}*"
    return re.sub(r"\A---\s+(\[source\].*\n)?", "", entry).strip()


def reference_page(module, names):
    "The reference page of a module: signature, docments and docstring of each public name. Returns these names."

    def public(name):
        value = module
        for part in name.split("."):
            if part.startswith("_"):
                return None
            value = getattr(value, part)
        return value if value.__doc__ and callable(value) else None

    documented = {name: value for name in names if (value := public(name))}
    parts = [f"# {module.__name__}", *map(reference_entry, documented.values())]
    write_page(PAGES / "reference" / f"{module.__name__.partition('.')[2]}.md", "\n\n".join(parts))
    return documented.keys()


def rank(path):
    "Where a page stands in its tab: the front page, the claims, the tables, the figures, the rest."
    return [not path.stem.startswith(kind) for kind in ("index", "claims", "table", "figure")], path.stem


def published_page(folder, place):
    "The page of a published scale: the count of its claims, and a line that leads to each table and figure."
    page = PAGES / place[folder]
    parts = [f"# Published results, scale {folder.name}", "## Tables and figures"]
    for table in sorted(folder.glob("tables/*.md"), key=rank):
        title = notebook_parts(NOTEBOOKS / "paper" / f"{table.stem}.ipynb", None)[0]
        heading, purpose = re.match(r"# (.*)\n+> (.*)", title).groups()
        parts.append(f"- [{heading}](../paper/{table.name}): {purpose}")
    claims = folder / "tables" / "claims.md"
    if claims.exists():
        parts.insert(1, lowered(placed(claims.read_text(encoding="utf-8"), claims.parent, page, place)))
    write_page(page, "\n\n".join(parts))


def navigation():
    "The tabs of the site, each with its pages in order; the notebooks by shelf, as on the front page."

    def pages(folder):
        return [str(path.relative_to(PAGES)) for path in sorted(PAGES.glob(f"{folder}/*.md"), key=rank)]

    parts = re.findall(r"^- \*\*(\w+)\*\*: (\[.*)", (PAGES / "index.md").read_text(encoding="utf-8"), re.M)
    shelves = [{part: re.findall(r"\((\w+\.md)\)", links)} for part, links in parts]
    return [
        {"Notebooks": ["index.md", *shelves]},
        {"Results": pages("published") + pages("paper")},
        {"Runs": pages("runs")},
        {"Reference": pages("reference")},
    ]


def write_pages():
    "All pages of the site, as Markdown."
    shutil.rmtree(PAGES, ignore_errors=True)
    names, place = {}, places()
    for module, symbols in import_module("heed_nb._modidx").d["syms"].items():
        own = [name.removeprefix(f"{module}.") for name in symbols]
        for name in reference_page(import_module(module), own):
            names[name] = module.partition(".")[2]
    for path in place:
        if path.suffix == ".ipynb":
            notebook_page(path, place, names)
        elif path.is_dir():
            published_page(path, place)


def readme():
    "README.md's text, from nbs/index.ipynb."

    def picture(extension, content):
        raise ValueError("nbs/index.ipynb has a picture as an output; README.md can only show pictures that are files")

    note = "<!-- made from nbs/index.ipynb by `make readme` -->\n\n"
    text = "\n\n".join(notebook_parts(NOTEBOOKS / "index.ipynb", picture)) + "\n"
    text = outside_code(text, lambda piece: re.sub(r"(?<=\]\()(?!\w+:)([^)#\s]+\.ipynb)", r"nbs/\1", piece))
    return note + re.sub(r"(?<=\]\(|[ (=]\")\.\./", "", text)  # nbs/ lies one folder below README.md


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="write README.md and no site")
    parser.add_argument("--site", type=Path, default=ROOT / "site", help="where the site goes")
    arguments = parser.parse_args()
    if arguments.readme:
        (ROOT / "README.md").write_text(readme(), encoding="utf-8")
        return
    write_pages()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config = load_config(
        str(ROOT / "mkdocs.yml"),
        site_dir=str(arguments.site.resolve()),
        strict=True,
        nav=navigation(),
        repo_url=project.get("urls", {}).get("Repository"),
    )
    build(config)
    print(f"{arguments.site / 'index.html'}: {len(list(arguments.site.rglob('*.html')))} pages")


if __name__ == "__main__":
    os.environ["NO_MKDOCS_2_WARNING"] = "true"
    sys.exit(main())
