"""Self-contained HTML pages: our style sheet, light and dark, and no way to load or run anything else.

Templates escape every value, and a content security policy that allows the page's own script by its hash
alone would stop a model's output from running even if one were missed.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from markupsafe import Markup

from looper_eval.svg import CHART_CSS, DARK_COLOURS, LIGHT_COLOURS


def render_page(
    template: str, *, title: str, script: str = "", templates: Path | None = None, **values: Any
) -> str:
    """The page that `template` makes; it extends `page.html.j2`.

    Args:
        script: JavaScript that the page may run; nothing else may.
        templates: a folder with further templates.
    """
    loaders = [PackageLoader("looper_eval"), *([FileSystemLoader(templates)] if templates else [])]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        title=title,
        css=Markup(package_text("page.css") + CHART_CSS),
        light=Markup(LIGHT_COLOURS),
        dark=Markup(DARK_COLOURS),
        script=Markup(script),
        script_source=Markup(f"'sha256-{digest}'" if script else "'none'"),
        **values,
    )


@cache
def package_text(name: str) -> str:
    """A text file of this package's templates."""
    return (files("looper_eval") / "templates" / name).read_text(encoding="utf-8")


def write_page(path: Path, page: str) -> None:
    """Write `page` through a temporary file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
