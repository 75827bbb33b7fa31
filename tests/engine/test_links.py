"""README, docs and notebooks say what is there: links, lines of code, versions."""

import re

import pytest

from tests import links

every_page = pytest.mark.parametrize("page", links.PAGES, ids=lambda page: page.name)


@every_page
def test_links_lead_somewhere(page):
    assert not links.broken(page)


@every_page
def test_links_to_lines_of_code_lead_to_these_lines(page):
    """tests/ledger.md has its own test: it is written anew as a whole."""
    text = page.read_text(encoding="utf-8")
    if page.name != "ledger.md":
        assert links.numbered(text, page.parent) == text, "put them right: python -m tests.links"


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    """No file, no heading, no such line; nothing else, and nothing inside code or formulas."""
    page, code = tmp_path / "page.md", tmp_path / "code.py"
    code.write_text("a = 1\nb = 2\n", encoding="utf-8")
    good = "# One `two`, three\n[a](#one-two-three) [b](code.py#L2) [c](https://nowhere.example/x) $[x](y)$\n"
    page.write_text(good + '[d](none.py) [e](#four) [f](code.py#L3) <img alt="g" src="none.png">\n', encoding="utf-8")
    assert links.broken(page) == ["none.py", "#four", "code.py#L3", "none.png"]
    assert links.numbered("[`b = 2`](code.py#L1)", tmp_path) == "[`b = 2`](code.py#L2)"
    for unclear in ("c", "="):
        with pytest.raises(ValueError, match="lines with"):
            links.numbered(f"[`{unclear}`](code.py#L1)", tmp_path)


def test_the_readme_fits_its_budget():
    assert len((links.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    "page", [page for page in links.PAGES if page.parent.name != "docs"], ids=lambda page: page.name
)
def test_the_code_that_a_page_quotes_is_that_of_hpm(page):
    """Each line of Python in README and notebooks' text is one of hpm.py, in its order. docs/ shows calls, not code."""
    source = iter(line.strip() for line in (links.ROOT / "hpm.py").read_text(encoding="utf-8").splitlines())
    quoted = "\n".join(re.findall(r"```python\n(.*?)```", links.markdown(page), flags=re.DOTALL))
    assert not [line for line in quoted.splitlines() if line.strip() not in source], "not there, or in another order"


def test_one_version_of_ruff_and_all_requirements_are_named_everywhere():
    """requirements.txt is pyproject.toml's list and its extras; pre-commit has the ruff of `.ci/run`."""
    hook, script, project, installed = (
        (links.ROOT / name).read_text(encoding="utf-8")
        for name in (".pre-commit-config.yaml", ".ci/run", "pyproject.toml", "requirements.txt")
    )
    assert re.search(r"rev: v(\S+)", hook)[1] == re.search(r"ruff==(\S+)", script)[1]
    name = re.compile(r"^[\s\"]*([A-Za-z][\w-]+)[>=]=", flags=re.MULTILINE)
    dependencies = project[project.index("dependencies = [") : project.index("parity = [")].replace("[", "\n")
    assert {*name.findall(installed)} == {*name.findall(dependencies.replace(", ", "\n"))}
