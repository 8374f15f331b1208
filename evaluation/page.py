"""HTML pages that need no other file: templates, and pictures inside them."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Picture(NamedTuple):
    """What a page shows under a heading. source: a data URI; panels: drawn side by side."""

    title: str
    note: str
    source: str
    panels: int = 1


def write_page(template: str, file: Path, **content) -> None:
    """Fills one of the templates beside this file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(environment.get_template(template).render(**content))


def svg(draw: Callable) -> str:
    """What `draw` returns, a figure, as a data URI."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {"svg.hashsalt": "moesvd", "font.size": 12, "svg.fonttype": "none", "font.family": "sans-serif"}
    ):
        figure, text = draw(), io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue().encode()).decode()
