"""The tensors of a model folder: what lies where, and any range of elements of any of them, without mapping a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.errors import LlmftError
from llmft_core.weights.files import INDEX

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
CHUNK = 16 * 2**20
"""Bytes read at once where values have to be converted on their way: what reading needs beside its target."""
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Name of a type in safetensors → in torch. Others belong to quantised models, which are not read here."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, its values in row-major order."""

    path: Path
    offset: int
    """Bytes from the start of the file to its first value."""
    dtype: str
    """Name of the type in safetensors."""
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of `model.safetensors`, or of the files that the index lists, by name.

    Values are read with `pread`: a mapped file would count as memory of the process, and safetensors slices by whole
    rows. `bytes_read` counts the bytes of values that were read.
    """

    def __init__(self, folder: Path) -> None:
        """Raises LlmftError, with the file's name, for a file that is broken or not what the index says."""
        self.tensors: dict[str, StoredTensor] = {}
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        for path, promised in weight_files(folder):
            found = read_header(path)
            if promised is not None and (wrong := promised ^ set(found)):
                raise LlmftError(f"{path}: not the file that {INDEX} lists ({listing(wrong)}): fetch both again")
            if doubled := set(found) & set(self.tensors):
                raise LlmftError(f"{path}: holds tensors that another file holds too ({listing(doubled)})")
            self.tensors |= found

    def read(self, name: str, start: int, into: torch.Tensor) -> None:
        """Fill `into` (1-d, any type and device) with the elements [start, start + len(into)) of a tensor.

        Raises LlmftError where the file ends before them.
        """
        import torch

        stored = self.tensors[name]
        dtype = getattr(torch, DTYPES[stored.dtype])
        if start < 0 or start + len(into) > math.prod(stored.shape):
            raise IndexError(f"{name}: elements {start} to {start + len(into)} of a tensor {stored.shape}")
        offset = stored.offset + start * dtype.itemsize
        if into.dtype == dtype and into.device.type == "cpu" and into.is_contiguous():
            self._read_bytes(stored.path, offset, into)
            return
        buffer = torch.empty(min(len(into), CHUNK // dtype.itemsize), dtype=dtype)
        for done in range(0, len(into), max(1, len(buffer))):
            piece = buffer[: len(into) - done]
            self._read_bytes(stored.path, offset + done * dtype.itemsize, piece)
            into[done : done + len(piece)].copy_(piece)

    def _read_bytes(self, path: Path, offset: int, into: torch.Tensor) -> None:
        import torch

        left = memoryview(into.view(torch.uint8).numpy())
        try:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            while left:
                count = os.preadv(self._files[path], [left], offset)
                if not count:
                    raise LlmftError(f"{path}: ends {len(left)} bytes too early: fetch it again")
                left, offset = left[count:], offset + count
                self.bytes_read += count
        except OSError as error:
            raise LlmftError(f"{path}: cannot be read ({error.strerror})") from error

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


def weight_files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Each file and the names that the index promises of it (None without an index), chosen as transformers does:
    `model.safetensors` before the index. Raises LlmftError where there is neither, or where the index is none."""
    if (folder / SINGLE).is_file():
        yield folder / SINGLE, None
        return
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"a file outside of the folder: {file}")
            files.setdefault(file, set()).add(name)
    except FileNotFoundError:
        raise LlmftError(f"{folder}: neither {SINGLE} nor {INDEX} is there: check the model folder") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmftError(f"{path}: is no index of weights ({error!r}): fetch it again") from error
    for file, names in sorted(files.items()):
        yield folder / file, names


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises LlmftError where header and size do not agree to the byte."""
    try:
        size = path.stat().st_size  # bytes
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(size - 8, LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found, end = parse_header(header, path, 8 + length)
        if end != size:
            raise ValueError(f"{size} bytes, its header says {end}")
    except OSError as error:
        raise LlmftError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LlmftError(f"{path}: is no whole safetensors file ({error}): fetch it again") from error
    return found


def parse_header(header: Mapping[str, Any], path: Path, base: int) -> tuple[dict[str, StoredTensor], int]:
    """Tensors, and the byte behind the last one; `base` is where the first one begins. ValueError for gaps, overlaps
    and sizes that do not fit shape and type."""
    found: dict[str, StoredTensor] = {}
    end = base
    for name, described in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        begin, stop = (base + int(offset) for offset in described["data_offsets"])
        shape = tuple(int(length) for length in described["shape"])
        bits = item_bits(described["dtype"])
        if begin != end or (bits is not None and (stop - begin) * 8 != math.prod(shape) * bits):
            raise ValueError(f"{name} does not lie where and as large as its shape says")
        found[name] = StoredTensor(path, begin, described["dtype"], shape)
        end = stop
    return found, end


def item_bits(dtype: str) -> int | None:
    """Bits of one value: safetensors names its types by them (BF16, F8_E4M3); None where the name has no number."""
    if dtype == "BOOL":
        return 8
    digits = dtype.split("_")[0].lstrip("BCFIU")
    return int(digits) if digits.isdigit() else None


def listing(names: set[str]) -> str:
    """The first few names of many."""
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
