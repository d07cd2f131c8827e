"""Contract suites: what every extension of a kind promises, as tests to subclass. Here storage, and what all share.

    class TestMyDisk(StorageBackendContract):
        @pytest.fixture
        def extension(self, tmp_path):
            return MyDisk(MyDiskOptions(root=tmp_path))

Each suite lists its other fixtures; they have defaults and may be overridden.
"""

from __future__ import annotations

import json
import pickle
import re
import uuid

import pytest

from llmft_core.errors import ChangedMeanwhile, InputError, Problem
from llmft_core.extensions import Extension, StorageBackend
from llmft_core.options import Options, kebab, leaves
from llmft_core.values import Device

_SECRETS = re.compile(r"(secret|password|passwd|token|private-key|access-key|credential)s?$")


class ExtensionContract:
    """What all kinds promise. Not used by itself: each kind's suite includes it."""

    @pytest.fixture
    def extension(self) -> Extension:
        """The extension under test, made with valid options. To be overridden."""
        raise NotImplementedError("override the fixture `extension`: return your extension, made with valid options")

    def test_name_can_be_written_on_a_command_line(self, extension: Extension) -> None:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", extension.name)

    def test_summary_is_one_short_line(self, extension: Extension) -> None:
        assert extension.summary.strip() == extension.summary
        assert 0 < len(extension.summary) <= 100
        assert "\n" not in extension.summary

    def test_options_are_described_and_do_not_hide_the_name(self, extension: Extension) -> None:
        assert issubclass(extension.options_type, Options)
        assert isinstance(extension.options, extension.options_type)
        assert "name" not in map(kebab, extension.options_type.model_fields), "the plan keeps the plugin's name there"
        for path, field in leaves(extension.options_type):
            assert field.description, path
            assert "\n" not in field.description, path

    def test_options_survive_the_plan(self, extension: Extension) -> None:
        """A worker builds the extension again from the plan's JSON: it must get the same options."""
        sent = json.loads(json.dumps(extension.options.model_dump(mode="json", by_alias=True)))
        received = extension.options_type.model_validate(sent)
        assert received == extension.options
        assert type(extension)(received).options == extension.options

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_what_a_node_lacks_says_what_to_do(self, extension: Extension, device: Device) -> None:
        for problem in extension.node_problems(device):
            assert isinstance(problem, Problem)
            assert problem.path, "the flag that it belongs to"
            assert problem.reason
            assert "\n" not in problem.reason


class StorageBackendContract(ExtensionContract):
    """Fixtures: `extension`. Set `reachable = False` where its filesystem cannot be opened in a test."""

    reachable = True

    def _skip_unless_reachable(self) -> None:
        if not self.reachable:
            pytest.skip("its filesystem is not opened here")

    def test_scheme_is_one_of_an_address(self, extension: StorageBackend) -> None:
        assert re.fullmatch(r"[a-z][a-z0-9+.-]*", extension.scheme)
        uri = extension.uri("bucket/key")
        assert uri.endswith("bucket/key")
        assert "://" not in uri or uri.startswith(f"{extension.scheme}://")  # files are often written without a scheme

    def test_no_secret_is_an_option(self, extension: StorageBackend) -> None:
        """Options are saved with every checkpoint; credentials come from the ambient chain."""
        secrets = [path for path, _ in leaves(extension.options_type) if _SECRETS.search(path)]
        assert not secrets

    def test_root_is_a_path_or_an_input_error(self, extension: StorageBackend) -> None:
        try:
            root = extension.root()
        except InputError:  # what to do then is its message's job
            return
        assert isinstance(root, str)
        assert "://" not in root, "a path of the filesystem, without the scheme"

    def test_it_knows_whether_nodes_share_it(self, extension: StorageBackend) -> None:
        assert extension.shared_by_nodes() in (True, False)

    def test_an_error_is_explained_in_one_line(self, extension: StorageBackend) -> None:
        for error in (PermissionError("denied"), FileNotFoundError("gone"), TimeoutError("slow"), OSError(28, "full")):
            line = extension.explain(error, "bucket/runs/x")
            assert "bucket/runs/x" in line
            assert "\n" not in line

    def test_filesystem_pickles(self, extension: StorageBackend) -> None:
        """It travels to the workers."""
        self._skip_unless_reachable()
        filesystem = extension.filesystem()
        assert type(pickle.loads(pickle.dumps(filesystem))) is type(filesystem)

    def test_what_is_written_is_read_listed_and_deleted(self, extension: StorageBackend) -> None:
        self._skip_unless_reachable()
        filesystem = extension.filesystem()
        folder = f"{extension.root()}/contract-{uuid.uuid4().hex}" if extension.root() else uuid.uuid4().hex
        path = f"{folder}/deeper/data.bin"
        written = bytes(range(256)) * 40
        try:
            filesystem.makedirs(f"{folder}/deeper", exist_ok=True)
            filesystem.pipe_file(path, written)
            assert filesystem.cat_file(path) == written
            assert filesystem.cat_file(path, start=256, end=300) == written[256:300]  # weights are read in ranges
            assert filesystem.info(path)["size"] == len(written)
            assert [found.rsplit("/", 1)[-1] for found in filesystem.find(folder)] == ["data.bin"]
            filesystem.pipe_file(path, b"replaced")
            assert filesystem.cat_file(path) == b"replaced"
            filesystem.rm_file(path)
            filesystem.invalidate_cache()
            assert not filesystem.exists(path)
            with pytest.raises(FileNotFoundError):
                filesystem.cat_file(path)
        finally:
            if filesystem.exists(folder):
                filesystem.rm(folder, recursive=True)

    def _file(self, extension: StorageBackend) -> str:
        return "/".join(filter(None, [extension.root(), f"contract-{uuid.uuid4().hex}"]))

    def test_ranged_reads_are_of_one_version(self, extension: StorageBackend) -> None:
        """Where it offers them."""
        self._skip_unless_reachable()
        reads = extension.ranged_reads()
        if reads is None:
            pytest.skip("it offers none")
        filesystem, path = extension.filesystem(), self._file(extension)
        with pytest.raises(FileNotFoundError):
            reads.describe(path)
        filesystem.pipe_file(path, bytes(range(256)))
        try:
            size, version = reads.describe(path)
            assert size == 256
            buffer = bytearray(60)
            reads.read_into(path, version, 100, memoryview(buffer)[10:60])
            assert buffer == bytes(10) + bytes(range(100, 150))
            with pytest.raises(ConnectionError):
                reads.read_into(path, version, 250, memoryview(bytearray(10)))
            filesystem.pipe_file(path, bytes(256))
            with pytest.raises(ChangedMeanwhile):
                reads.read_into(path, version, 0, memoryview(buffer))
        finally:
            filesystem.rm_file(path)

    def test_verified_uploads_appear_whole(self, extension: StorageBackend) -> None:
        """Where it offers them."""
        self._skip_unless_reachable()
        writes = extension.verified_uploads()
        if writes is None:
            pytest.skip("it offers none")
        filesystem, path = extension.filesystem(), self._file(extension)
        writes.put(path, memoryview(b"small"))
        assert filesystem.cat_file(path) == b"small"
        filesystem.rm_file(path)
        assert writes.unfinished(path) is None
        parts = [b"1" * writes.least_part, b"22"]
        upload = writes.begin(path)
        tags = [writes.put_part(path, upload, number, memoryview(part)) for number, part in enumerate(parts, 1)]
        assert not filesystem.exists(path)
        again = extension.verified_uploads()
        assert again is not None
        assert again.unfinished(path) == upload, "another process finds it"
        assert again.parts(path, upload) == {1: (len(parts[0]), tags[0]), 2: (2, tags[1])}
        again.complete(path, upload, tags)
        assert filesystem.info(path)["size"] == writes.least_part + 2
        dropped = writes.begin(path)
        writes.abandon(path, dropped)
        assert writes.unfinished(path) is None
        filesystem.rm_file(path)
