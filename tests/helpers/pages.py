"""Documentation pages taken apart: code, commands, sections, tables; and the template installed.

for span in code_spans(page.read_text()): ...
install_template(copy_of_repository(tmp_path), "my_policy")  # as the guide says
"""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import techniques
from workbench import configuration

REPO = configuration.CONF_DIR.parent
TEMPLATE = "shortest_prompt_first"
GUIDE = REPO / "docs" / "adding_a_technique.md"
_SOURCES = ("kernels", "workbench", "techniques", "experiments", "conf", "scripts", "tests")


def page_id(page: Path) -> str:
    return str(page.relative_to(REPO))


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> list[str]:
    """Inline code, line breaks within it undone."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_fences(text))]


def commands(text: str) -> list[str]:
    """Command lines: in fenced and indented blocks, and inline."""
    lines = [line.strip().split("  #")[0].strip() for line in text.splitlines()]
    found = [*lines, *code_spans(text)]
    return [line for line in found if line.startswith(("python -m ", "make "))]


def section(text: str, heading: str) -> str:
    match = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"no section {heading!r}"
    return match[1]


def table_rows(text: str) -> list[list[str]]:
    """Cells of the rows of all tables of a text, headers left out."""
    rows = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        lines = [line.strip().strip("|") for line in block.strip().splitlines()]
        rows += [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]
    return rows


@functools.cache
def source_text() -> str:
    parts = [(REPO / name).read_text() for name in ("Makefile", "pyproject.toml")]
    for folder in _SOURCES:
        for path in sorted((REPO / folder).rglob("*")):
            is_about_pages = path.name.startswith("test_docs") or path == Path(__file__).resolve()
            if path.suffix in (".py", ".yaml", ".sh") and not is_about_pages:
                parts.append(path.read_text())
    return "\n".join(parts)


@functools.cache
def source_words() -> frozenset[str]:
    return frozenset(re.findall(r"\w+", source_text()))


@functools.cache
def class_members() -> dict[str, set[str]]:
    """Names that the body of each class of ours defines, by the class's name."""
    found: dict[str, set[str]] = {}
    for folder in ("kernels", "workbench", "techniques"):
        for path in sorted((REPO / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    members = found.setdefault(node.name, set())
                    for item in node.body:
                        if isinstance(item, ast.FunctionDef):
                            members.add(item.name)
                        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                            members.add(item.target.id)
    return found


def install_template(tree: Path, name: str) -> None:
    """Do in ``tree`` what the guide's shell lines say, for a technique called ``name``."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    block = next(block for block in blocks if "techniques/_template" in block)
    assert block.startswith(f"name={TEMPLATE}\n")
    script = block.replace(f"name={TEMPLATE}\n", f"name={name}\n")
    subprocess.run(["sh", "-e", "-u", "-c", script], cwd=tree, check=True)


def copy_of_repository(tree: Path) -> Path:
    for folder in ("conf", "techniques", "workbench"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / folder, tree / folder, ignore=ignored)
    return tree


def contents(tree: Path) -> dict[str, bytes]:
    return {str(p.relative_to(tree)): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def use_tree(monkeypatch: pytest.MonkeyPatch, tree: Path) -> None:
    monkeypatch.setattr(configuration, "CONF_DIR", tree / "conf")
    monkeypatch.setattr(techniques, "__path__", [*techniques.__path__, str(tree / "techniques")])


def forget_modules(name: str) -> None:
    for module in [m for m in sys.modules if m.startswith(f"techniques.{name}")]:
        del sys.modules[module]
    if hasattr(techniques, name):
        delattr(techniques, name)
