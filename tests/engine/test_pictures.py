"""What notebooks/pictures.py draws and shows."""

import inspect
import re

import pytest
from matplotlib import pyplot as plt

import vit

with plt.rc_context():  # the notebooks' style is theirs
    from notebooks import pictures

SYSTEMS = {"vit": pictures.VIT, "autoencoder": pictures.AUTOENCODER, "hpm": pictures.HPM}


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    """Figures are kept in place of shown."""
    monkeypatch.setattr(plt, "show", lambda: None)
    yield
    plt.close("all")


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_part_can_be_drawn_in_colour_and_only_on_demand(system):
    """A part named by `lit` is what differs from the picture without; every name of a system's parts works."""

    def drawn(lit):
        getattr(pictures, system)(lit)
        artists = plt.gca().get_children()
        colours = [str(a.get_edgecolor()) for a in artists if hasattr(a, "get_edgecolor")]
        colours += [str(a.get_color()) + str(a.get_linewidth()) for a in artists if isinstance(a, plt.Line2D)]
        plt.close("all")
        return colours

    plain = drawn(())
    for part in SYSTEMS[system]:
        assert drawn(part) != plain, part
    with pytest.raises(ValueError, match="no part 'wheel'; there are "):
        drawn("wheel")


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_text_of_a_picture_is_cut_off_or_lies_on_another(system):
    getattr(pictures, system)()
    figure = plt.gcf()
    figure.canvas.draw()
    page = figure.bbox
    boxes = [(text.get_text(), text.get_window_extent()) for text in plt.gca().texts]
    for i, (words, box) in enumerate(boxes):
        assert page.contains(*box.min), words
        assert page.contains(*box.max), words
        if words != "✕":
            on = [other for other, its in boxes[:i] if other != "✕" and box.padded(-1.5).overlaps(its.padded(-1.5))]
            assert not on, (words, on)


def test_a_page_of_code_is_the_source_with_the_lines_of_an_equation_marked():
    page = pictures.page(vit.Block.forward, "eq. 2", "eq. 3")
    lines = re.sub(r"<[^>]+>", "", page.split("<pre", 1)[1].split(">", 1)[1]).splitlines()
    lines = [
        line.replace("&#39;", "'").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for line in lines
    ]
    source = [line[4:] for line in inspect.getsource(vit.Block.forward).splitlines()]
    assert [line[2:] for line in lines] == source
    assert [line[2:] for line in lines if line.startswith("▶")] == [
        line for line in source if re.search("eq. [23]", line)
    ]
    with pytest.raises(ValueError, match="Block.forward has no line with 'eq. 9'"):
        pictures.page(vit.Block.forward, "eq. 9")


def test_a_slider_redraws_what_a_function_draws_or_prints(monkeypatch):
    """It starts at the function's own value; no Output widget, for which an executed notebook may wait forever."""
    shown = []
    monkeypatch.setattr(pictures, "display", shown.append)

    def draw(n=3):
        print("n is", n)
        if n > 3:
            pictures.plt.plot([0, n])
            pictures.plt.show()

    pictures.slide(draw, n=(1, 5))
    slider, picture, text = shown[0].children
    assert (slider.value, bytes(picture.value), text.value) == (3, b"", "<pre>n is 3\n</pre>")
    slider.value = 5
    assert bytes(picture.value).startswith(b"\x89PNG")
    assert text.value == "<pre>n is 5\n</pre>"
    assert not pictures.plt.get_fignums()
    assert "Output" not in {type(child).__name__ for child in shown[0].children}
