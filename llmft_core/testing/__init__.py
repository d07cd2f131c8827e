"""What a plugin author's tests need: contract suites to subclass. Needs pytest and hypothesis, which llmft itself does
not."""

import pytest

# Before they are imported, or it has no effect: a broken promise shows its values.
pytest.register_assert_rewrite(
    "llmft_core.testing.contracts", "llmft_core.testing.dataset", "llmft_core.testing.training_contracts"
)

from llmft_core.testing.contracts import ExtensionContract, StorageBackendContract  # noqa: E402
from llmft_core.testing.dataset import DatasetFormatContract  # noqa: E402
from llmft_core.testing.training_contracts import (  # noqa: E402
    MethodContract,
    ModelFamilyContract,
    StrategyContract,
    TrackerContract,
)

__all__ = [
    "DatasetFormatContract",
    "ExtensionContract",
    "MethodContract",
    "ModelFamilyContract",
    "StorageBackendContract",
    "StrategyContract",
    "TrackerContract",
]
