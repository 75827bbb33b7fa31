"""What a reader finds in notebooks/ without running them. `.ci/run` executes all of them."""

import json
import re
import sys

import pytest

from tests import exercises, links

PATHS = sorted((exercises.ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def markdown_of(path):
    return "\n".join("".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "markdown")


def test_their_numbers_are_the_reading_order():
    assert [path.name[:3] for path in PATHS] == [f"{i:02}_" for i in range(1, len(PATHS) + 1)]


@every_notebook
def test_a_notebook_is_read_in_one_sitting(path):
    """At most 1,500 words, code and formulas not counted, and 40 cells."""
    words = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$|<[^>]+>", "", markdown_of(path), flags=re.DOTALL).split()
    assert (len(words) <= 1500, len(cells_of(path)) <= 40) == (True, True), (len(words), len(cells_of(path)))


@every_notebook
def test_a_notebook_opens_with_the_picture_of_its_system(path):
    """Drawn, and stored, by the first cell after that which looks for the checkout."""
    opening = cells_of(path)[2]
    assert re.search(r"^pictures\.(vit|autoencoder|hpm)\(", "".join(opening["source"]), flags=re.MULTILINE)
    assert any("image/png" in output.get("data", ()) for output in opening["outputs"])


@every_notebook
def test_outputs_are_stored_as_one_run_from_top_to_bottom_left_them(path):
    """No cell was skipped or run out of order, nothing failed, and nothing but results is shown."""
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 1.5e6, "a page that takes long to open"
    for cell in code:
        assert "execution" not in cell["metadata"], "times of a run are no result"
        for output in cell["outputs"]:
            kind = output["output_type"]
            assert kind != "error", output
            assert output.get("name") != "stderr", f"warnings or a progress bar: {output}"
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            assert not re.search(r"(^|[\s'\"(])/(home|root|tmp|usr|work|Users)/|\r", text), f"a path or a bar: {text}"


@every_notebook
def test_the_code_that_a_notebook_prints_is_the_code_of_today(path):
    text = path.read_text(encoding="utf-8")
    assert links.with_code_of_today(text) == text, "print it anew: python -m tests.links"


def test_outside_a_checkout_the_first_cell_says_what_to_clone(monkeypatch, tmp_path):
    """In one line, and stops; inside, it leads to the root. It is the same cell in all notebooks."""
    (first,) = {"".join(cells_of(path)[1]["source"]) for path in PATHS}
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^clone the repository vit-hpm-from-scratch .*$"):
        exec(first, {})
    monkeypatch.chdir(exercises.ROOT / "notebooks")
    names = {}
    exec(first, names)
    assert (names["root"], sys.path[0]) == (exercises.ROOT, str(exercises.ROOT))


@every_notebook
def test_a_notebook_asks_before_it_tells(path):
    """Questions with folded answers."""
    assert markdown_of(path).count("<details><summary>Answer</summary>") >= 2


def test_every_exercise_stands_in_its_notebook_by_number_and_with_its_command():
    for exercise in exercises.EXERCISES:
        text = markdown_of(exercises.ROOT / exercise.notebook)
        sections = re.findall(r"^## Exercise.*?(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
        (section,) = [section for section in sections if f"`{exercise.name}`" in section]
        heading = re.sub(r"(\d+) to (\d+)", lambda m: str([*range(int(m[1]), int(m[2]) + 1)]), section.split("\n")[0])
        assert str(exercise.number) in re.findall(r"\d+", heading), exercise
        (keywords,) = re.findall(r"^pytest --exercises -k (.+?)(?: *#.*)?$", section, flags=re.MULTILINE)
        assert any(keyword in exercise.name for keyword in keywords.strip('"').split(" or ")), exercise
    for path in PATHS:
        assert "python -m tests.exercises start" in markdown_of(path)
