"""The tokenizer of a run: loaded once, its special tokens added, saved with every file that serving stacks read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft_core.errors import InputError
from llmft_core.extensions import ModelFamily
from llmft_core.weights import hub
from llmft_core.weights.cache import cache_folder, locked
from llmft_core.weights.files import TOKENIZER_FILES, is_tokenizer_file
from llmft_core.weights.layout import find_model
from llmft_core.weights.mirror import mirror
from llmft_core.weights.stage import ModelFolder, mirror_place

if TYPE_CHECKING:
    from llmft_core.storage.places import Places

SINGLE_FILES = ("tokenizer.json", "tokenizer.model")
PROBES = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 24",
    "  two spaces, a\ttab and\r\na new line ",
    "Überraschung – 数学 نص 😀 ½",
    "inform",
    " inform",
)


def load_tokenizer(
    model: ModelFolder, override: str, special_tokens: Sequence[str], places: Places, weights_mirror: str = ""
) -> Any:
    """A fast `transformers` tokenizer with these tokens added as special ones, each one id.

    `override` (`model.tokenizer` of the plan) is a folder, a tokenizer.json or tokenizer.model, a URI of one of these,
    or a hub id; empty: the model's own. A hub id is looked for in `weights_mirror` where that is given, as a model is,
    and never on the hub then. Sets a padding token where there is none: unk, else eos; padding is told by
    its position, never by this id. Raises InputError: nothing there, no bos or eos, a token that is not one id.
    """
    folder = tokenizer_folder(model, override, places, weights_mirror)
    tokenizer = _loaded(model.family, folder, override or str(model.path))
    origin = f"tokenizer {override or model.path}"
    for role in ("bos", "eos"):
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise InputError(
                f"{origin}: no {role}_token, so rows could not be told apart; set it in tokenizer_config.json, "
                "or name another with --model.tokenizer FOLDER"
            )
    tokenizer.backend_tokenizer.no_truncation()  # an export may have baked in what its maker used last
    tokenizer.backend_tokenizer.no_padding()
    _add(tokenizer, special_tokens)
    for token in special_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise InputError(f"{origin}: the dataset's token {token!r} becomes {len(ids)} ids, not one; rename it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token_id is not None else tokenizer.eos_token
    return tokenizer


def tokenizer_folder(model: ModelFolder, override: str, places: Places, weights_mirror: str = "") -> Path:
    """This node's folder with the tokenizer's own files: the model's, or that of what `override` names."""
    return _chosen(model, override, places, weights_mirror) if override else model.path


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over what a tokenizer does: ids of probe strings, also after each added token; sizes; added tokens.

    Two tokenizers with the same fingerprint may share prepared data."""
    added = sorted((index, str(token), token.special) for index, token in tokenizer.added_tokens_decoder.items())
    probes = [*PROBES, *(f"x{content}inform {content} inform" for _, content, _ in added)]
    facts = {
        "ids": [tokenizer(probe)["input_ids"] for probe in probes],
        "size": len(tokenizer),
        "added": added,
        "roles": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def save_tokenizer(tokenizer: Any, folder: Path, source_folder: Path) -> None:
    """Write the tokenizer into `folder`, with the older files that transformers 5 no longer writes but serving stacks
    read: special_tokens_map.json, added_tokens.json, and `source_folder`'s tokenizer.model where it is of this
    vocabulary. A folder that does not exist yet appears whole or not at all."""
    if folder.is_dir():
        _write(tokenizer, folder, source_folder)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if folder.is_dir():  # another process of this node was first
            return
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        _write(tokenizer, partial, source_folder)
        os.replace(partial, folder)


def _write(tokenizer: Any, folder: Path, source_folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    extra = [str(token) for token in tokenizer.extra_special_tokens]
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if isinstance(config.pop("extra_special_tokens", None), list):
        config["additional_special_tokens"] = extra  # transformers 4 crashes on a list under the new name
    _write_json(config_path, config)
    named = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    _write_json(folder / "special_tokens_map.json", {**named, "additional_special_tokens": extra} if extra else named)
    beyond = {
        str(token): index
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if index >= tokenizer.vocab_size
    }
    if beyond:
        _write_json(folder / "added_tokens.json", beyond)
    model = source_folder / "tokenizer.model"
    if model.is_file() and model.resolve() != (folder / "tokenizer.model").resolve() and _same_pieces(model, tokenizer):
        shutil.copyfile(model, folder / "tokenizer.model")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _same_pieces(model: Path, tokenizer: Any) -> bool:
    """Whether a sentencepiece file is of this vocabulary, and not of one that `model.tokenizer` replaced."""
    from sentencepiece import SentencePieceProcessor

    try:
        original = SentencePieceProcessor(model_file=str(model))
    except RuntimeError:  # Llama 3's tiktoken file of the same name: its tokenizer.json says all
        return False
    ids = list(range(original.get_piece_size()))
    pieces: list[str] = tokenizer.convert_ids_to_tokens(ids)
    return len(ids) == tokenizer.vocab_size and [original.id_to_piece(index) for index in ids] == pieces


def _add(tokenizer: Any, special_tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    named = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    wanted = [token for token in dict.fromkeys(special_tokens) if token not in named]
    tokens = [AddedToken(token, special=True, normalized=False) for token in wanted]
    if tokens:
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)


def _loaded(family: ModelFamily, folder: Path, origin: str) -> Any:
    try:
        tokenizer = family.load_tokenizer(folder)
    except InputError:
        raise
    except Exception as error:
        # transformers and the Rust library raise whatever a broken file makes them: OSError, ValueError, Exception.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        there = ", ".join(name for name in TOKENIZER_FILES if (folder / name).is_file()) or "no tokenizer files"
        raise InputError(
            f"tokenizer {origin}: cannot be loaded from {there} ({reason}); "
            "fetch it again, or name another with --model.tokenizer FOLDER"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer {origin}: {type(tokenizer).__name__} has no fast version; add a tokenizer.json, "
            "or name another with --model.tokenizer FOLDER"
        )
    return tokenizer


def _chosen(model: ModelFolder, override: str, places: Places, weights_mirror: str) -> Path:
    """A node-local folder with the tokenizer that `override` names."""
    if "://" in override:
        stem, _, last = override.rstrip("/").rpartition("/")
        if last not in SINGLE_FILES:
            folder = mirror(places.place(override), f"tokenizer {override}", is_tokenizer_file)
            return _completed(folder, folder.name, model)
        folder = mirror(places.place(stem), f"tokenizer {override}", lambda name: name == last)
        return _completed(folder, folder.name, model, only=last)
    path = Path(override).expanduser()
    if path.is_file():
        if path.name not in SINGLE_FILES:
            raise InputError(f"tokenizer {override}: give a folder, or a file called {' or '.join(SINGLE_FILES)}")
        key = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return _completed(path.parent, f"{path.name}-{key}", model, only=path.name)
    if path.is_dir():
        if not any((path / name).is_file() for name in (*SINGLE_FILES, "vocab.json", "vocab.txt")):
            raise InputError(f"tokenizer {override}: no {' or '.join(SINGLE_FILES)} in it; give another folder")
        return path
    if hub.is_hub_id(override):
        folder = _from_mirror(override, weights_mirror, places) if weights_mirror else hub.fetch_tokenizer(override)
        return _completed(folder, f"{override.replace('/', '--')}-{folder.name}", model)
    raise InputError(
        f"tokenizer {override}: no such file or folder; "
        f"give a folder, a {' or '.join(SINGLE_FILES)}, a hub id (owner/name) or a URI"
    )


def _from_mirror(repository: str, weights_mirror: str, places: Places) -> Path:
    """The tokenizer's files of a repository in a mirror, in this node's cache."""
    place = find_model(mirror_place(weights_mirror, places), repository, repository, "--model.tokenizer")
    return mirror(place, f"tokenizer {repository}", is_tokenizer_file)


def _completed(source: Path, key: str, model: ModelFolder, only: str = "") -> Path:
    """A folder of the cache with a tokenizer's files and what they lack from the model's own folder: config.json says
    which class reads them, tokenizer_config.json which token ends a text. `only`: of `source`, nothing but this file
    and its tokenizer_config.json."""
    names = (only, "tokenizer_config.json") if only else TOKENIZER_FILES
    copies = {name: source / name for name in names if (source / name).is_file()}
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if name not in copies and (model.path / name).is_file():
            copies[name] = model.path / name
    content = hashlib.sha256()
    for name, path in sorted(copies.items()):
        content.update(f"{name}\0".encode() + path.read_bytes())
    folder = cache_folder() / "tokenizer-sources" / f"{key}-{content.hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            for name, path in copies.items():
                shutil.copyfile(path, partial / name)
            os.replace(partial, folder)
    return folder
