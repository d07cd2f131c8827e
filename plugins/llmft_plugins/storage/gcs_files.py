"""gcsfs's filesystem, with an error that says what it is where Google does not permit something.

Apart from `gcs.py`, because importing gcsfs takes half a second that `llmft --help` should not pay.
"""

from __future__ import annotations

import os
from typing import Any

# Read at import, here and where a worker unpickles it: the experimental half hangs for up to 107 s in gRPC probes.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
from gcsfs.core import GCSFileSystem


class GcsFiles(GCSFileSystem):  # type: ignore[misc]
    """Raises PermissionError for HTTP 403, where gcsfs has a bare OSError: the core must not take it for a fault."""

    async def _call(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._call(*args, **kwargs)
        except OSError as error:
            if type(error) is OSError and str(error).startswith("Forbidden"):
                raise PermissionError(str(error)) from error  # gcsfs itself looks how it begins
            raise
