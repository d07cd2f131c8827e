"""The plugins keep the contracts of llmft: suites to subclass, and a fixture that says what is tested."""

import pytest
from llmft_plugin_hello.hello import Hello, HelloOptions
from llmft_plugin_hello.hello_disk import HelloDisk, HelloDiskOptions
from llmft_plugin_hello.hello_solo import HelloSolo

from llmft_core import Options, RowProblem
from llmft_core.testing import DatasetFormatContract, StorageBackendContract, StrategyContract


class TestHello(DatasetFormatContract):
    @pytest.fixture
    def extension(self):
        return Hello(HelloOptions())

    def test_a_row_without_a_greeting_is_refused(self, extension):
        problem = extension.parse({"name": "Ada"})
        assert problem == RowProblem("greeting", "must be a text that is not empty, not None")

    def test_rows_come_from_the_source_where_there_is_one(self):
        assert Hello(HelloOptions(source="somewhere")).generate("train") is None


class TestHelloDisk(StorageBackendContract):
    @pytest.fixture
    def extension(self, tmp_path):
        return HelloDisk(HelloDiskOptions(root=tmp_path))


class TestHelloSolo(StrategyContract):
    @pytest.fixture
    def extension(self):
        return HelloSolo(Options())
