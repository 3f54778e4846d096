"""Errors of the model store. All are `ValueError`: each message is for the user to act on."""

from __future__ import annotations

from workbench.core.errors import WorkbenchError


class ModelStoreError(WorkbenchError):
    """A model could not be fetched or opened; the message says why and what to do."""


class UnknownModelError(ModelStoreError):
    """The name is neither in the catalog, nor a Hub id, nor an existing path."""


class BrokenModelError(ModelStoreError):
    """A model folder or file is incomplete, truncated or not what its manifest says."""


class ChecksumError(BrokenModelError):
    """A file's bytes are not those that the catalog or the Hub pins."""


class UnsupportedModelError(ModelStoreError):
    """The file is whole, but of an architecture, tokenizer or format that is not supported."""


class NoDiskSpaceError(ModelStoreError):
    """The disk that holds the store is, or would be, full."""


class ModelsUnavailableError(ModelStoreError):
    """Every source was asked and none answered; the message lists each reason."""


class SourceUnavailableError(Exception):
    """One source does not answer: the next one is asked.

    Not a `ModelStoreError`, so that it cannot reach the user except inside the list that
    `ModelsUnavailableError` gives.
    """
