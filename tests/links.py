"""The links of README, docs and notebooks, and the code that these pages show.

    python -m tests.links     put the numbers of lines right, and the code that notebooks show; drop sliders' state

The text of a link to a line of code is code of that line: [`x = block(x)`](vit.py#L12). So the number can be found.
"""

import ast
import importlib
import json
import re
from functools import reduce
from pathlib import Path

from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    ROOT / "tests" / "ledger.md",
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]
LINK = re.compile(r'(?:\]\(|<(?:img|a)[^>]* (?:src|href)=")([^)\s"]+)[)"]')
LINE_OF_CODE = re.compile(r"\[`([^`]+)`\]\(([^)#]+)#L(\d+)\)")
WIDGET = "application/vnd.jupyter.widget-view+json"
ROOMS = {"probes": "downstream.probes"}  # what notebooks import by the last part of its name


def markdown(page):
    """The text of a page; of a notebook, that of its Markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return text


def prose(page):
    """The text of a page without code and formulas, in which brackets are no links."""
    return re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$", "", markdown(page), flags=re.DOTALL)


def anchors(page):
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", markdown(page), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken(page):
    """The relative links of a page that lead nowhere: to no file, no heading, or beyond the last line."""
    found = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            found.append(link)
        elif line := re.fullmatch(r"L(\d+)", anchor):
            if int(line[1]) > len(path.read_text(encoding="utf-8").splitlines()):
                found.append(link)
        elif anchor and anchor not in anchors(path):
            found.append(link)
    return found


def numbered(text, folder):
    """The text, with each link to a line of code leading to the one line that holds its text.

    Raises ValueError if a file has no such line, or several.
    """

    def number(match):
        code, name, _ = match.groups()
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        found = [i for i, line in enumerate(lines, 1) if code in line]
        if len(found) != 1:
            raise ValueError(f"{name} has {len(found)} lines with `{code}`; let the link's text be code of one")
        return f"[`{code}`]({name}#L{found[0]})"

    return LINE_OF_CODE.sub(number, text)


def shown(source):
    """The outputs of a notebook's cell that does nothing but call `pictures.source(…)`, or None if it does more."""
    calls = re.findall(r"^pictures\.source\(.*?\)$", source, flags=re.MULTILINE | re.DOTALL)
    if not calls or re.sub(r"^pictures\.source\(.*?\)$", "", source, flags=re.MULTILINE | re.DOTALL).strip():
        return None
    with plt.rc_context():  # notebooks' style is theirs
        from notebooks import pictures
    outputs = []
    for call in calls:
        function, *lines = ast.parse(call).body[0].value.args
        page = pictures.page(named(ast.unparse(function)), *map(ast.literal_eval, lines))
        data = {"text/html": page.splitlines(keepends=True), "text/plain": ["<IPython.core.display.HTML object>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def named(name):
    """The function or class that a notebook calls `vit.ViT.embed`."""
    module, *attributes = name.split(".")
    return reduce(getattr, attributes, importlib.import_module(ROOMS.get(module, module)))


def with_code_of_today(text):
    """The text of a notebook's file, with the code that its cells show as it is in the modules now.

    Sliders work when a notebook runs; their stored state would be most of the file, and is left out.
    """
    notebook = json.loads(text)
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            cell["outputs"] = shown(source) or [out for out in cell["outputs"] if WIDGET not in out.get("data", ())]
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main():
    for page in PAGES:
        if page.name != "ledger.md":  # tests.exercises writes it
            old = page.read_text(encoding="utf-8")
            new = numbered(old, page.parent)
            if page.suffix == ".ipynb":
                new = with_code_of_today(new)
            if new != old:
                page.write_text(new, encoding="utf-8")
                print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
