"""The prompts that ship with the project: chat, summarize and code_edit.

Text and code were written for the project and have its licence (Apache-2.0). A category is one
JSONL file in ``data/``; a new file there is a new category.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from workbench.bench.workloads.checks import as_names, require_choice
from workbench.bench.workloads.prompts import Prompt, PromptWorkload
from workbench.bench.workloads.readers import read_jsonl

DATA_DIR = Path(__file__).parent / "data"


def shipped_categories() -> tuple[str, ...]:
    """Return the names of the categories that ship with the project."""
    return tuple(sorted(path.stem for path in DATA_DIR.glob("*.jsonl")))


def read_category(category: str) -> Iterator[Prompt]:
    """Yield the prompts of one shipped category in file order."""
    for row in read_jsonl(DATA_DIR / f"{category}.jsonl"):
        yield Prompt(
            request_id=row.text("id"),
            category=row.text("category"),
            row=row,
            field="messages",
            messages=row.messages("messages"),
            max_tokens=row.integer("max_tokens", 1),
        )


@dataclass(frozen=True, kw_only=True)
class TextWorkload(PromptWorkload):
    """Prompts that ship with the project.

    Parameters
    ----------
    categories
        One category or several: ``chat`` (open questions), ``summarize`` (passages of about 250
        tokens), ``code_edit`` (answers copy most of the prompt). Several take turns, so that the
        first prompts are of all kinds.
    """

    categories: str | Iterable[str] = ("chat", "summarize", "code_edit")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = as_names("categories", self.categories)
        for name in names:
            require_choice("category", name, shipped_categories())
        object.__setattr__(self, "categories", names)

    @property
    def name(self) -> str:
        """The categories, joined by a plus sign."""
        return "+".join(self.categories)

    def _prompts(self) -> Iterator[Prompt]:
        turns = zip_longest(*(read_category(name) for name in self.categories))
        return (prompt for prompt in chain.from_iterable(turns) if prompt is not None)
