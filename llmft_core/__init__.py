"""The façade: all that a plugin's code imports from llmft."""

from llmft_core.errors import ChangedMeanwhile, InputError, LlmftError, Problem, Problems
from llmft_core.extensions import (
    API_VERSION,
    DatasetFormat,
    Engine,
    Method,
    ModelFamily,
    RangedReads,
    SourceOptions,
    Split,
    StorageBackend,
    Strategy,
    Tracker,
    VerifiedUploads,
)
from llmft_core.hookspecs import hookimpl
from llmft_core.options import Options
from llmft_core.values import (
    IGNORED_LABEL,
    Conversation,
    EncodedExample,
    Message,
    ModelSize,
    Origin,
    Placement,
    RowProblem,
    StepOutcome,
)

__all__ = [
    "API_VERSION",
    "IGNORED_LABEL",
    "ChangedMeanwhile",
    "Conversation",
    "DatasetFormat",
    "EncodedExample",
    "Engine",
    "InputError",
    "LlmftError",
    "Message",
    "Method",
    "ModelFamily",
    "ModelSize",
    "Options",
    "Origin",
    "Placement",
    "Problem",
    "Problems",
    "RangedReads",
    "RowProblem",
    "SourceOptions",
    "Split",
    "StepOutcome",
    "StorageBackend",
    "Strategy",
    "Tracker",
    "VerifiedUploads",
    "hookimpl",
]
