"""What a reader finds in notebooks/ without running them. `.ci/run` executes all of them."""

import json
import re
from pathlib import Path

import pytest

PATHS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_there_are_nine_in_reading_order():
    assert [path.name[:3] for path in PATHS] == [f"0{i}_" for i in range(1, 10)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_stored_as_one_run_from_top_to_bottom_left_them(path):
    """No cell was skipped or run out of order, nothing failed, and nothing but results is shown."""
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 1.5e6, "a page that takes long to open"
    for cell in code:
        for output in cell["outputs"]:
            kind = output["output_type"]
            assert kind != "error", output
            assert output.get("name") != "stderr", f"warnings or a progress bar: {output}"
            text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
            assert not re.search(r"(^|[\s'\"(])/(home|root|tmp|usr|work|Users)/|\r", text), f"a path or a bar: {text}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_opens_on_colab_and_asks_before_it_tells(path):
    """A badge that leads to this file, a first cell that fetches the code, and questions with folded answers."""
    first, setup, *_ = cells_of(path)
    assert f"/blob/main/notebooks/{path.name})" in "".join(first["source"])
    assert "".join(setup["source"]) == "".join(cells_of(PATHS[0])[1]["source"]), "the same in all notebooks"
    text = "\n".join("".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "markdown")
    assert text.count("<details><summary>Answer</summary>") >= 2
    assert "## Exercise" in text
