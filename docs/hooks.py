"""What mkdocs makes beside the written pages: the README as the first one, the notebook, the reference of recipes and
commands."""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Pages of the site whose text lies elsewhere in the repository.
BORROWED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# Definitions of the schema that are parts of a recipe, and the keys they stand under.
PARTS = {"Calibration": "calibration", "Evaluate": "evaluate", "Limits": "limits", "KvCache": "limits.kv_cache"}


def on_files(files, config):
    made = {page: _on_site((ROOT / source).read_text()) for page, source in BORROWED.items()}
    made |= {"reference/recipe.md": recipe_page(), "reference/commands.md": commands_page()}
    made["notebook.md"] = notebook_page(json.loads((ROOT / "docs/notebook.ipynb").read_text()))
    made["reference/recipe.schema.json"] = json.dumps(_schema(), indent=1)
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown, page, **_):
    """Links from a page to what lies beside `docs` lead to the site's copy of it."""
    for name, source in BORROWED.items():
        markdown = re.sub(rf"\]\((?:\.\./)+{source}\)", f"]({'../' * page.file.src_uri.count('/')}{name})", markdown)
    return markdown


def _on_site(markdown: str) -> str:
    """Text of the repository's root, with links as they are from the root of the site."""
    markdown = markdown.replace("](docs/", "](")
    for name, source in BORROWED.items():
        markdown = markdown.replace(f"]({source})", f"]({name})")
    return markdown


def _schema() -> dict:
    from moesvd_quant.recipe.schema import recipe_schema

    return recipe_schema()


def recipe_page() -> str:
    """Every key of a recipe, with its default and its meaning."""
    schema = _schema()
    definitions = schema["$defs"]
    lines = [
        "# Keys of a recipe\n",
        "Made from the code. Editors complete and check recipes by [this schema](recipe.schema.json). `moesvd schema` "
        "prints it: write it to a file, and begin a recipe with "
        "`# yaml-language-server: $schema=recipe.schema.json`.\n",
        *_table(schema),
    ]
    for key, title in PARTS.items():
        lines += [f"\n## {title}\n", *_table(definitions[key])]
    for key, options in definitions.items():
        if key.startswith("stage_"):
            lines += [f"\n## Stage `{key.removeprefix('stage_')}`\n", *_table(options)]
    return "\n".join(lines) + "\n"


def _table(options: dict) -> list[str]:
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, about in options["properties"].items():
        default = "required" if name in options.get("required", ()) else f"`{_written(about.get('default'))}`"
        rows.append(f"| `{name}` | {default} | {_meaning(about)} |")
    return rows


def _written(default) -> str:
    if isinstance(default, dict) and default:
        return "see below"
    return "left open" if default is None else json.dumps(default)


def _meaning(about: dict) -> str:
    choices = [str(value) for part in [about, *about.get("anyOf", [])] for value in part.get("enum", [])]
    named = f" (one of {', '.join(choices)})" if choices else ""
    return (about["description"] + named).replace("|", "\\|")


def notebook_page(notebook: dict) -> str:
    """Cells of a notebook as they are stored, with what they printed, showed and drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_shown(output) for output in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        return f"![What the cell draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def commands_page() -> str:
    """Every verb of the command line, from its own help."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from moesvd_quant.cli import app

    command = get_command(app)
    context = command.context_class(command, info_name="moesvd")
    page = get_docs_for_click(obj=command, ctx=context, name="moesvd", title="Commands")
    for name, verb in command.commands.items():  # the list has them cut at 45 letters
        said = verb.help.partition("\n\n")[0].replace("\n", " ")
        page = page.replace(f"* `{name}`: {verb.get_short_help_str()}\n", f"* [`{name}`](#moesvd-{name}): {said}\n")
    return page
