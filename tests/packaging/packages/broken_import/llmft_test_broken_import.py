"""Cannot be imported."""

import a_library_nobody_has  # noqa: F401

llmft_api = 1
