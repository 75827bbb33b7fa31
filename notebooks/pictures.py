"""What all notebooks share: the systems as pictures, source code as a page, and one style of figures.

    vit(lit=…)          the Vision Transformer, from the image to the logits, its block and its attention opened
    autoencoder(lit=…)  MAE's asymmetric autoencoder
    hpm(lit=…)          one step of HPM: student and teacher, and which way gradients go
    source(function, *lines)    a function's code, the lines of an equation marked
    slide(draw, **sliders)      what a function draws or prints, for the values of sliders

lit: the name of a part, or several, to be drawn in colour. Shapes stand on the arrows: B images, N patches of P x P
pixels and C channels, D the encoder's width, k heads; n patches are hidden, v are visible, d is the decoders' width.
A number in a circle is the equation of the ViT paper that acts there. Importing this module sets matplotlib's style.
"""

import contextlib
import html
import inspect
import io
import textwrap

import ipywidgets
import numpy as np
from IPython.display import HTML, display
from matplotlib import pyplot as plt
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from skimage import data as photographs

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"  # Okabe, Ito
GREY, LINE, LIT = "#F2F2F2", "#777777", "#FFE3B8"
plt.rcParams.update({
    "figure.constrained_layout.use": True, "figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "image.cmap": "viridis",
})  # fmt: skip


# --- Something to move -----------------------------------------------------------------------


def slide(draw, **sliders):
    """Sliders, and below them what draw(name=value, …) leaves: its pyplot figure, or else what it prints.

    sliders: widgets, or (from, to), (from, to, step), lists of choices; they start at draw's own defaults. Unlike
    ipywidgets.interact it needs no Output widget, for which a notebook that is executed by nbconvert may wait forever.
    """
    own = {name: parameter.default for name, parameter in inspect.signature(draw).parameters.items()}
    sliders = {
        name: given
        if isinstance(given, ipywidgets.Widget)
        else ipywidgets.interactive.widget_from_abbrev(given, own[name])
        for name, given in sliders.items()
    }
    picture, text = ipywidgets.Image(format="png"), ipywidgets.HTML()

    def redraw(_=None):
        show, plt.show, said = plt.show, lambda: None, io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                draw(**{name: slider.value for name, slider in sliders.items()})
        finally:
            plt.show = show
        if plt.get_fignums():
            buffer = io.BytesIO()
            plt.gcf().savefig(buffer, format="png")
            plt.close("all")
            picture.value = buffer.getvalue()
        text.value = f"<pre>{html.escape(said.getvalue())}</pre>"

    for slider in sliders.values():
        slider.observe(redraw, "value")
    redraw()
    display(ipywidgets.VBox([*sliders.values(), picture, text]))


# --- Source code -----------------------------------------------------------------------------


def page(function, *lines):
    """The source of a function or class as HTML; a line that contains one of `lines` is marked.

    Raises ValueError if a text of `lines` is in no line.
    """
    code = textwrap.dedent(inspect.getsource(function)).splitlines()
    if lost := [text for text in lines if not any(text in line for line in code)]:
        raise ValueError(f"{function.__qualname__} has no line with {lost[0]!r}; give a part of one")
    colours = HtmlFormatter(noclasses=True, nowrap=True)  # colours in the tags: pages that drop <style> keep them
    rows = []
    coloured = highlight("\n".join(code), PythonLexer(stripnl=False), colours).splitlines()
    for line, text in zip(coloured, code, strict=True):
        marked = any(part in text for part in lines)
        ground = "#FFE3B8" if marked else "transparent"
        rows.append(f'<span style="background: {ground}">{"▶ " if marked else "  "}{line}</span>')
    name = html.escape(f"{function.__module__}.py: {function.__qualname__}")
    style = (
        "font: 90%/1.35 monospace; white-space: pre; overflow-x: auto; color: #222; background: #F8F8F8; padding: 0.6em"
    )
    return f'<div style="color: #666; font-size: 85%">{name}</div><pre style="{style}">{chr(10).join(rows)}</pre>'


def source(function, *lines):
    """Show the source of a function or class, the lines marked that contain one of `lines`."""
    display(HTML(page(function, *lines)))


# --- What pictures are drawn with ------------------------------------------------------------


def photograph(side):
    """A cat, (side, side, 3) uint8."""
    cat = Image.fromarray(photographs.chelsea()[:, 75:375])
    return np.asarray(cat.resize((side, side), Image.Resampling.BICUBIC))


class Canvas:
    """A figure of width x height inches without axes, whose parts are grey, but for those in `lit`.

    Raises ValueError for a name in `lit` that is none of `parts`.
    """

    def __init__(self, width, height, parts, lit):
        self.lit = {lit} if isinstance(lit, str) else set(lit)
        if unknown := self.lit - set(parts):
            raise ValueError(f"no part {sorted(unknown)[0]!r}; there are {', '.join(parts)}")
        self.figure = plt.figure(figsize=(width, height), layout=PlaceHolderLayoutEngine(True, True))
        self.ax = self.figure.add_axes((0, 0, 1, 1))
        self.ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.ax.axis("off")

    def colours(self, part):
        return dict(facecolor=LIT, edgecolor=ORANGE, linewidth=2) if part in self.lit else \
            dict(facecolor=GREY, edgecolor=LINE, linewidth=1)  # fmt: skip

    def text(self, x, y, text, size=8.5, color="black", **options):
        self.ax.text(x, y, text, **(dict(ha="center", va="center", fontsize=size, color=color) | options))

    def box(self, x, y, width, height, text, part=None, size=9):
        """A box around (x, y), its text inside."""
        corner = x - width / 2 + 0.05, y - height / 2 + 0.05
        shape = FancyBboxPatch(corner, width - 0.1, height - 0.1, boxstyle="round,pad=0.05", zorder=3)
        shape.set(**self.colours(part))
        self.ax.add_patch(shape)
        self.text(x, y, text, size, zorder=4)

    def frame(self, left, bottom, width, height, title, part=None):
        """A room around other parts, its title at the top left."""
        lit = part in self.lit
        edge = dict(edgecolor=ORANGE if lit else "#CCCCCC", linewidth=2 if lit else 1)
        self.ax.add_patch(Rectangle((left, bottom), width, height, facecolor="white", zorder=0, **edge))
        self.text(left + 0.1, bottom + height - 0.16, title, ha="left", color=ORANGE if lit else "#555555")

    def node(self, x, y, text, part=None):
        """A small circle: + or [;]."""
        circle = Circle((x, y), 0.15, zorder=3)
        circle.set(**self.colours(part))
        self.ax.add_patch(circle)
        self.text(x, y, text, 9, zorder=4)

    def equation(self, x, y, number):
        """An equation's number in a circle."""
        self.ax.add_patch(Circle((x, y), 0.13, facecolor=BLUE, edgecolor="white", zorder=6))
        self.text(x, y - 0.005, number, 8, "white", zorder=7, fontweight="bold")

    def arrow(self, *points, shape="", color=LINE, dashed=False, width=1.2, above=0.12, head=True):
        """An arrow through points, a shape on the middle of its first part, `above` it."""
        *way, (x1, y1) = points
        for start, end in zip(way, way[1:], strict=False):
            self.ax.plot(*zip(start, end, strict=True), color=color, linewidth=width, linestyle="--" if dashed else "-",
                         solid_capstyle="round", zorder=2)  # fmt: skip
        style = "-|>" if head else "-"
        self.ax.add_patch(
            FancyArrowPatch(way[-1], (x1, y1), arrowstyle=style, mutation_scale=9, shrinkA=0, shrinkB=0, color=color,
                            linewidth=width, linestyle="--" if dashed else "-", zorder=2)
        )  # fmt: skip
        if shape:
            (x0, y0), (x1, y1) = points[:2]
            self.text((x0 + x1) / 2, (y0 + y1) / 2 + above, shape, 7.5, "#333333", zorder=5)

    def image(self, x, y, side, pixels, label="", part=None, **options):
        """A picture around (x, y), a label below."""
        box = (x - side / 2, x + side / 2, y - side / 2, y + side / 2)
        self.ax.imshow(pixels, extent=box, zorder=3, **options)
        edge = dict(edgecolor=ORANGE, linewidth=1.8) if part in self.lit else dict(edgecolor=LINE, linewidth=0.8)
        self.ax.add_patch(Rectangle(box[::2], side, side, facecolor="none", zorder=4, **edge))
        self.ax.set(xlim=(0, self.figure.get_figwidth()), ylim=(0, self.figure.get_figheight()))  # imshow moves them
        if label:
            self.text(x, y - side / 2 - 0.08, label, 8, va="top")

    def tiles(self, x, y, side, pixels, hidden=None, label="", part=None):
        """A picture of 4 x 4 patches with gaps, hidden ones (4, 4) in grey, a label below."""
        size, step = 0.82 * side / 4, side / 4
        for row in range(4):
            for column in range(4):
                P = len(pixels) // 4
                patch = pixels[row * P : (row + 1) * P, column * P : (column + 1) * P]
                if hidden is not None and hidden[row, column]:
                    patch = np.full((1, 1, 3), 205, np.uint8)
                middle = x - side / 2 + (column + 0.5) * step, y + side / 2 - (row + 0.5) * step
                self.image(*middle, size, patch, part=part)
        if label:
            self.text(x, y - side / 2 - 0.08, label, 8, va="top")


# --- The systems -----------------------------------------------------------------------------

VIT = ("patches", "embedding", "class token", "positions", "block", "norm", "attention", "residual", "mlp", "head")


def vit(lit=()):
    """The Vision Transformer (its figure 1): above from the image to the logits, below a block and its attention."""
    c = Canvas(11.4, 4.75, VIT, lit)
    cat, y = photograph(96), 3.95
    c.image(0.62, y, 1.0, cat, "image x\n(B, C, H, W)")
    c.arrow((1.16, y), (1.56, y))
    c.tiles(2.12, y, 1.1, cat, label=r"patches $x_p$", part="patches")
    c.arrow((2.72, y), (3.6, y), shape="(B, N, P²C)")
    c.box(3.95, y, 0.7, 0.8, "E", "embedding", 12)
    c.text(3.95, y - 0.48, "patch embedding", 8, va="top")
    c.arrow((4.3, y), (5.0, y), shape="(B, N, D)")
    c.node(5.15, y, "[;]", "class token")
    c.box(5.15, y - 0.85, 0.75, 0.4, r"$x_{class}$", "class token")
    c.text(5.15, y - 1.1, "class token", 8, va="top")
    c.arrow((5.15, y - 0.65), (5.15, y - 0.15))
    c.arrow((5.3, y), (5.95, y))
    c.node(6.1, y, "+", "positions")
    c.box(6.1, y - 0.85, 0.75, 0.4, r"$E_{pos}$", "positions")
    c.text(6.1, y - 1.1, "positions", 8, va="top")
    c.arrow((6.1, y - 0.65), (6.1, y - 0.15))
    c.equation(5.62, y + 0.36, 1)
    c.arrow((6.25, y), (7.2, y), shape=r"$z_0$ (B, 1+N, D)")
    c.box(7.65, y, 0.9, 0.8, "encoder\nblock", "block")
    c.text(7.65, y - 0.48, "L of them", 8, va="top")
    c.arrow((8.1, y), (8.85, y), shape="$z_L$")
    c.box(9.15, y, 0.6, 0.8, "LN", "norm")
    c.text(9.15, y - 0.48, r"of the class token $z_L^0$", 8, va="top")
    c.equation(9.45, y + 0.4, 4)
    c.arrow((9.45, y), (10.15, y), shape="y (B, D)")
    c.box(10.5, y, 0.7, 0.8, "head", "head")
    c.arrow((10.85, y), (11.3, y))
    c.text(10.85, y - 0.48, "logits (B, classes)", 8, va="top")

    c.frame(0.1, 0.12, 5.75, 2.1, "the encoder block: every arrow carries (B, 1+N, D)", "block")
    y = 0.8
    c.text(0.4, y, r"$z_{\ell-1}$", 10)
    c.arrow((0.6, y), (0.98, y))
    c.box(1.22, y, 0.48, 0.6, "LN", "norm")
    c.arrow((1.46, y), (1.72, y))
    c.box(2.03, y, 0.62, 0.6, "MSA", "attention")
    c.arrow((2.34, y), (2.65, y))
    c.node(2.8, y, "+", "residual")
    c.equation(3.1, y - 0.33, 2)
    c.arrow((2.95, y), (3.52, y), shape=r"$z'_\ell$", above=-0.17)
    c.box(3.76, y, 0.48, 0.6, "LN", "norm")
    c.arrow((4.0, y), (4.26, y))
    c.box(4.57, y, 0.62, 0.6, "MLP", "mlp")
    c.arrow((4.88, y), (5.12, y))
    c.node(5.27, y, "+", "residual")
    c.equation(5.5, y - 0.33, 3)
    c.arrow((5.42, y), (5.58, y))
    c.text(5.7, y, r"$z_\ell$", 10)
    way = dict(color=ORANGE, width=2.2) if "residual" in c.lit else {}
    for left, right in ((0.75, 2.8), (3.28, 5.27)):
        c.arrow((left, y), (left, y + 0.65), (right, y + 0.65), (right, y + 0.15), **way)
        c.text((left + right) / 2, y + 0.77, "residual", 8, ORANGE if way else "#333333")

    c.frame(6.05, 0.12, 5.25, 2.1, "MSA, multi-head self-attention: k heads side by side", "attention")
    y = 1.0
    c.text(6.22, y, "z", 10)
    c.arrow((6.32, y), (6.55, y))
    c.box(6.87, y, 0.64, 0.6, r"$U_{qkv}$", "attention")
    c.equation(7.19, y + 0.3, 5)
    c.arrow((7.19, y), (7.8, y), shape="q, k")
    c.box(8.45, y, 1.3, 0.7, "softmax\n" + r"$(q\,k^T / \sqrt{D_h})$", "attention")
    c.equation(9.1, y + 0.35, 6)
    c.arrow((9.1, y), (9.68, y), shape="A")
    c.text(9.39, y - 0.14, "(B, k, T, T)", 7)
    c.box(9.94, y, 0.52, 0.6, "A v", "attention")
    c.equation(10.2, y + 0.3, 7)
    c.arrow((7.4, y), (7.4, y - 0.6), (9.94, y - 0.6), (9.94, y - 0.3))
    c.text(8.6, y - 0.49, "v; each of q, k, v (B, k, T, $D_h$)", 7.5)
    c.arrow((10.2, y), (10.5, y))
    c.box(10.8, y, 0.6, 0.6, r"$U_{msa}$", "attention")
    c.equation(11.08, y + 0.3, 8)
    c.arrow((11.1, y), (11.27, y))
    plt.show()


HIDDEN = np.array([[1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1]], bool)  # 12 of 16: 75 %
AUTOENCODER = ("mask", "encoder", "mask tokens", "decoder", "target", "loss")


def autoencoder(lit=()):
    """MAE's asymmetric autoencoder: a large encoder for the visible patches alone, a small decoder for all."""
    c = Canvas(11.4, 3.5, AUTOENCODER, lit)
    cat, y = photograph(96), 2.5
    c.image(0.62, y, 1.0, cat, "image x\n(B, C, H, W)")
    c.arrow((1.16, y), (1.62, y))
    c.tiles(2.2, y, 1.1, cat, HIDDEN, "mask M: n of N patches\nare hidden", "mask")
    c.arrow((2.8, y), (3.8, y), shape="(B, v, P²C)")
    c.text(3.3, y - 0.16, "visible ones", 7.5)
    c.box(4.35, y, 1.1, 1.3, "encoder\n" + r"$f_\theta$", "encoder", 11)
    c.text(4.35, y - 0.73, "a ViT, deep and wide", 8, va="top")
    c.arrow((4.9, y), (5.85, y), shape="(B, 1+v, D)")
    c.node(6.0, y, "[;]", "mask tokens")
    c.box(6.0, y - 1.0, 1.1, 0.45, "mask token", "mask tokens", 8.5)
    c.text(6.0, y - 1.26, "n times, each with its\nposition, (B, n, d)", 8, va="top")
    c.arrow((6.0, y - 0.78), (6.0, y - 0.15))
    c.arrow((6.15, y), (7.15, y), shape="(B, 1+N, d)")
    c.box(7.55, y, 0.8, 0.9, "decoder\n" + r"$d_\varphi$", "decoder")
    c.text(7.55, y - 0.52, "small", 8, va="top")
    c.arrow((7.95, y), (9.05, y), shape="(B, n, P²C)")
    c.text(8.5, y - 0.16, "hidden ones", 7.5)
    c.box(9.45, y, 0.8, 0.6, "metric\n" + r"$\mathcal{M}$", "loss")
    c.arrow((9.85, y), (10.35, y))
    c.text(
        10.85, y, r"$L_{rec}$" + "\na loss for each\nhidden patch\n(B, n)", 8.5, ORANGE if "loss" in c.lit else "black"
    )
    c.box(9.45, 1.0, 1.3, 0.5, r"target $\mathcal{T}$", "target")
    c.text(9.45, 0.7, "what is to be said of a hidden patch:\nits pixels, or features", 8, va="top")
    c.arrow((0.62, 1.5), (0.62, 0.12), (8.2, 0.12), (8.2, 1.0), (8.8, 1.0))
    c.text(3.6, 0.24, "the whole image", 7.5)
    c.arrow((9.45, 1.25), (9.45, y - 0.3))
    c.text(9.95, 1.7, "(B, n, P²C)", 7.5)
    plt.show()


PREDICTED = np.array(
    [[0.3, 0.5, 0.6, 0.2], [0.4, 0.9, 1.0, 0.3], [0.5, 0.8, 0.9, 0.4], [0.2, 0.6, 0.7, 0.1]]
)  # of the picture
HPM = ("teacher", "mask", "encoder", "decoder", "target", "reconstruction loss", "predictor", "predicted loss",
       "momentum", "gradient")  # fmt: skip


def hpm(lit=()):
    """One step of HPM: the teacher says what is hard, the mask hides it, the student learns; then θ_t follows θ_s."""
    c = Canvas(11.4, 5.6, HPM, lit)
    cat, up, low, last = photograph(96), 4.5, 2.15, 0.75
    c.frame(1.5, 3.78, 5.1, 1.4, r"teacher $\theta_t$: no gradient", "teacher")
    c.frame(3.3, 0.12, 6.5, 2.88, r"student $\theta_s$")
    c.image(0.65, 3.1, 1.0, cat, "image x\n(B, C, H, W)")
    c.arrow((0.65, 3.6), (0.65, up), (1.75, up))
    c.box(2.3, up, 1.1, 0.8, "encoder\n" + r"$f_{\theta_t}$", "teacher")
    c.arrow((2.85, up), (3.85, up), shape="(B, 1+N, D)")
    c.box(4.4, up, 1.1, 0.8, "predictor\n" + r"$d_{\psi_t}$", "teacher")
    c.arrow((4.95, up), (6.95, up))
    c.text(5.65, up + 0.14, r"$\hat L^t$ (B, N)", 8)
    c.image(7.45, up, 0.9, PREDICTED, "predicted loss\nof each patch", "teacher", vmin=0, vmax=1.1)
    c.arrow((7.95, up), (8.6, up))
    c.box(9.6, up, 2.0, 0.9, "hide the hardest\n" + r"(a share $\alpha_t$ of n)," + "\nothers at random", "mask")
    way = dict(color=ORANGE, width=2.2) if "mask" in c.lit else {}
    c.arrow((9.6, up + 0.45), (9.6, 5.42), (1.2, 5.42), (1.2, 3.4), (1.95, 3.4), (1.95, low + 0.58), **way)
    c.text(8.6, 5.29, "mask M (B, N)", 8, ORANGE if way else "black")
    c.arrow((1.17, 2.9), (1.6, 2.9), (1.6, low + 0.58))
    c.tiles(1.8, low, 1.1, cat, HIDDEN, "x ⊙ M: n are hidden", "mask")
    c.arrow((2.4, low), (3.6, low), shape="(B, v, P²C)")
    c.box(4.15, low, 1.1, 0.8, "encoder\n" + r"$f_{\theta_s}$", "encoder")
    c.arrow((4.7, low), (6.0, low), shape="+ mask tokens")
    c.box(6.55, low, 1.1, 0.8, "decoder\n" + r"$d_\varphi$", "decoder")
    c.arrow((7.1, low), (8.2, low), shape="(B, n, P²C)")
    c.box(8.9, low, 1.4, 0.8, r"$L_{rec}$ $=$ $\mathcal{M}$" + "\nfor each patch", "reconstruction loss")
    c.box(8.9, 3.4, 1.4, 0.42, r"target $\mathcal{T}$ of x", "target", 8.5)
    c.arrow((8.9, 3.19), (8.9, low + 0.4))
    c.box(6.55, last, 1.1, 0.8, "predictor\n" + r"$d_{\psi_s}$", "predictor")
    c.arrow((5.55, low), (5.55, last), (6.0, last))
    c.text(5.5, 1.5, "(B, 1+N, d)", 7.5, ha="right")
    c.arrow((7.1, last), (8.2, last), shape=r"$\hat L$ (B, n)")
    c.box(8.9, last, 1.4, 0.8, r"$L_{pred}$" + "\nfor each pair", "predicted loss")
    c.arrow((8.9, low - 0.4), (8.9, last + 0.4))
    c.text(8.98, 1.45, "true losses\n(B, n)", 7.5, ha="left")
    c.arrow((9.6, low), (10.3, low), (10.3, 1.65))
    c.arrow((9.6, last), (10.3, last), (10.3, 1.25))
    c.box(10.55, 1.45, 1.2, 0.4, r"$L = L_{rec} + L_{pred}$", None, 7.5)
    way = dict(color=ORANGE, width=2.2) if "momentum" in c.lit else {}
    c.arrow((4.15, 3.0), (4.15, 3.78), **way)
    update = r"$\theta_t \leftarrow m\,\theta_t + (1 - m)\,\theta_s$, after each step"
    c.text(4.25, 3.4, update, 8.5, ORANGE if way else "black", ha="left")

    back = dict(color=PINK, dashed=True, width=2.4 if "gradient" in c.lit else 1.3)
    c.arrow((8.2, low - 0.27), (7.1, low - 0.27), **back)
    c.arrow((6.0, low - 0.27), (4.7, low - 0.27), **back)
    c.arrow((8.2, last - 0.27), (7.1, last - 0.27), **back)
    c.arrow((6.0, last - 0.27), (4.15, last - 0.27), (4.15, low - 0.4), **back)
    c.text(8.9, 1.45, "✕", 16, PINK, fontweight="bold", zorder=6)
    c.arrow((9.95, 0.42), (10.35, 0.42), **back)
    c.text(10.42, 0.42, "gradient", 8, ha="left")
    c.text(10.15, 0.22, "✕", 12, PINK, fontweight="bold")
    c.text(10.42, 0.22, "stopped", 8, ha="left")
    plt.show()
