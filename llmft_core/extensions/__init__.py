"""The six kinds of extension. A contract holds what its kind alone can know; the rest belongs to the core.

An extension is a class with a `name`, a one-line `summary` and an `options_type`; it is constructed with its validated
options on the driver, and again on every worker from the same plan, so it holds no state that cannot be rebuilt.
"""

from llmft_core.extensions.base import Extension
from llmft_core.extensions.datasets import DatasetFormat, SourceOptions, Split
from llmft_core.extensions.methods import Method
from llmft_core.extensions.models import ModelFamily
from llmft_core.extensions.storage import RangedReads, StorageBackend, VerifiedUploads
from llmft_core.extensions.strategies import Engine, FillPartition, Fragment, ReadElements, ReadFragment, Strategy
from llmft_core.extensions.trackers import Tracker

API_VERSION = 1
"""Version of these contracts. A plugin module says which one it was written for: `llmft_api = 1`."""

__all__ = [
    "API_VERSION",
    "DatasetFormat",
    "Engine",
    "Extension",
    "FillPartition",
    "Fragment",
    "Method",
    "ModelFamily",
    "RangedReads",
    "ReadElements",
    "ReadFragment",
    "SourceOptions",
    "Split",
    "StorageBackend",
    "Strategy",
    "Tracker",
    "VerifiedUploads",
]
