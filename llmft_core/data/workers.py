"""Encoding on all cores of this machine: processes that get blocks and give back arrays, in the order of the blocks."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from multiprocessing.connection import Connection, Pipe, wait
from tempfile import TemporaryFile
from typing import IO

from llmft_core.data.blocks import Block
from llmft_core.data.encode_blocks import BlockEncoder, EncodedBlock, Failure, Work, checked, span
from llmft_core.errors import LlmftError

SMALL = 8
"""Blocks that this process encodes itself, with the tokenizer's own threads, in the time that workers take to start."""

SINGLE_THREADED = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""A worker has one core: its libraries must not start threads for all of them."""

FileName = Callable[[int], str]
"""The name of the file with this index, for messages."""


class LocalEngine:
    """Encodes blocks on this machine. A context manager: workers end with the block, also after an error."""

    def __init__(self, work: Work, processes: int | None) -> None:
        """`processes`: how many; None: one a core if there is enough to do; 0: none but this one."""
        self._work = work
        self._asked = processes
        self._here: BlockEncoder | None = None
        self._pool: _Pool | None = None

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.end()

    def encode(self, blocks: Iterator[Block], file_name: FileName) -> Iterator[EncodedBlock]:
        """Each block's rows, in order. Raises LlmftError or InputError, in one line that names file and line, where a
        format fails, a tag is no token, or a worker is lost; and whatever `blocks` raises."""
        if self._pool is None and not self._asked:
            begin = list(islice(blocks, SMALL + 1)) if self._asked is None else []
            blocks = chain(begin, blocks)
            if len(begin) <= SMALL:
                yield from self._encode_here(blocks, file_name)
                return
        if self._pool is None:
            self._pool = _Pool(self._work, self._asked or len(os.sched_getaffinity(0)))
        yield from self._pool.encode(blocks, file_name)

    def _encode_here(self, blocks: Iterator[Block], file_name: FileName) -> Iterator[EncodedBlock]:
        if self._here is None:
            self._here = BlockEncoder(self._work)
        for block in blocks:
            yield checked(self._here.answer(block, file_name(block.file)))


@dataclass
class _Task:
    """A block on its way."""

    block: Block
    file: str  # its name
    answer: EncodedBlock | Failure | None = None


class _Worker:
    """One process, and what it is at. A program of its own rather than a fork: a fork would inherit the locks of
    threads that it does not have, and starting it does not run the user's script again, as `spawn` does."""

    def __init__(self, work: IO[bytes]) -> None:
        self.connection, theirs = Pipe()
        self.task: _Task | None = None
        self._ready = False
        try:
            # -P: a file in the working folder must not be taken for a library.
            code = f"from llmft_core.data.workers import work; work({theirs.fileno()}, {work.fileno()})"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), work.fileno()],
                env={**os.environ, **SINGLE_THREADED},
            )
        finally:
            theirs.close()

    def begin(self, task: _Task) -> None:
        self.task = task
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended: that is said where its answer is read
            self.connection.send((task.block, task.file))

    def receive(self) -> None:
        """Read the answer to the block, or that the process is ready. Raises LlmftError where it cannot work, or has
        ended instead."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            code = self._process.wait()
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise LlmftError(
                f"{self._whereabouts()} ended ({reason}): if memory ran out, take fewer with "
                "--data.processes N; 0 encodes in this process"
            ) from error
        if self.task is not None:
            self.task.answer, self.task = answer, None
        elif isinstance(answer, Failure):
            raise answer.kind(answer.message)

    def _whereabouts(self) -> str:
        if self.task is None:
            return "a process that was to encode rows"
        return f"{span(self.task.block, self.task.file)}: the process that encoded these rows"

    def end(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.wait()


class _Pool:
    """Workers that each have one block at a time. In memory are at most so many blocks that wait for a worker as there
    are workers, and twice as many that are with workers or wait to be returned in order."""

    def __init__(self, work: Work, processes: int) -> None:
        self._processes = processes
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._work = TemporaryFile()  # noqa: SIM115  closed by `end`; every worker reads it by itself
        try:
            pickle.dump(sys.path, self._work)
            pickle.dump(work, self._work)
            self._work.flush()
        except Exception as error:
            self._work.close()
            raise LlmftError(
                f"dataset format {work.dataset.name} cannot be sent to worker processes ({type(error).__name__}: "
                f"{error}): tell its author; --data.processes 0 encodes in this process"
            ) from error

    def encode(self, blocks: Iterator[Block], file_name: FileName) -> Iterator[EncodedBlock]:
        read: deque[Block] = deque()  # not given to a worker yet
        tasks: deque[_Task] = deque()  # in order
        more = True
        while more or read or tasks:
            while self._idle and read and len(tasks) < 2 * self._processes:
                block = read.popleft()
                tasks.append(_Task(block, file_name(block.file)))
                self._idle.pop().begin(tasks[-1])
            if tasks and tasks[0].answer is not None:
                yield checked(tasks[0].answer)
                tasks.popleft()
                continue
            if len(read) > 0 and not self._idle and len(self._workers) < self._processes:
                self._workers.append(_Worker(self._work))
            can_read = more and len(read) < self._processes
            busy = [worker for worker in self._workers if worker not in self._idle]
            ready = wait([worker.connection for worker in busy], timeout=0 if can_read else None)
            for worker in busy:
                if worker.connection in ready:
                    worker.receive()
                    self._idle.append(worker)
            if not ready and can_read:
                found = next(blocks, None)
                more = found is not None
                if found is not None:
                    read.append(found)

    def end(self) -> None:
        for worker in self._workers:
            worker.end()
        self._work.close()


def work(connection_fd: int, work_fd: int) -> None:
    """The whole life of a worker. It ends when the driver closes the connection, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which then ends us
    connection = Connection(connection_fd)
    encoder = _encoder(os.pread(work_fd, os.fstat(work_fd).st_size, 0))
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(encoder if isinstance(encoder, Failure) else None)
        while not isinstance(encoder, Failure):
            connection.send(encoder.answer(*connection.recv()))


def _encoder(pickled: bytes) -> BlockEncoder | Failure:
    try:
        stream = BytesIO(pickled)
        sys.path[:] = pickle.load(stream)
        return BlockEncoder(pickle.load(stream))
    except Exception as error:  # noqa: BLE001  raised by the driver
        return Failure(
            f"the dataset format cannot be made again in a worker process ({type(error).__name__}: {error}): it must "
            "be in a module that can be imported; --data.processes 0 encodes in this process",
        )
