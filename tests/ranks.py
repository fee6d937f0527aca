"""Processes that are the ranks of process groups: a function runs on all of them, and what it returns comes back."""

import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interpreter import patch_once_a_launch

from sre_triton import messages
from sre_triton.compiled import inductor

TIMEOUT = 60  # seconds: what a test may take

# Ranks are forked from a process that has imported PyTorch, which takes seconds, and done nothing with it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sre_triton", "torch.distributed", "torch._inductor"])


def _join(rank, num_ranks, folder, kind, timeout=TIMEOUT):
    """Makes this process a rank in the tests' surroundings (conftest.py), with a GPU of its own if the kind is nccl."""
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.simplefilter("error", category)
    # What torch 2.11 and Triton 3.6 run into themselves.
    themselves = "should not be instantiated", "torch.jit.script.* is deprecated", "Conversion of an array", "Profiler"
    for text in themselves:
        warnings.filterwarnings("ignore", f".*{text}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    messages._warned.update(messages.ONCE)
    inductor._uncompiled.add("cpu")
    patch_once_a_launch()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if kind == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    dist.init_process_group(
        kind,
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )


def on_cpu(value):
    """Tensors, and what holds them, as they travel from one process to another."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, (list, tuple)):
        items = map(on_cpu, value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _serve(rank, num_ranks, folder, kind, connection):
    _join(rank, num_ranks, folder, kind)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, num_ranks + 1)}
    while True:
        message = connection.recv_bytes()
        try:
            function, size, args = pickle.loads(message)
            answer = True, on_cpu(function(groups[size], *args))
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


class Ranks:
    """As many processes as the largest group needs; they live as long as the tests, or until one of them fails."""

    def __init__(self, num_ranks, kind, folder):
        self.num_ranks, self.kind, self.folder = num_ranks, kind, folder
        self.connections, self.processes = [], []

    def _start(self):
        folder = tempfile.mkdtemp(dir=self.folder)
        for rank in range(self.num_ranks):
            here, there = CONTEXT.Pipe()
            args = rank, self.num_ranks, folder, self.kind, there
            process = CONTEXT.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, size, function, *args):
        """``function(group, *args)`` on the first ranks; a list of what it returned on each."""
        if size > self.num_ranks:
            pytest.skip(f"needs {size} GPUs")
        if not self.processes:
            self._start()
        message = pickle.dumps((function, size, on_cpu(args)))
        for connection in self.connections[:size]:
            connection.send_bytes(message)
        deadline, answers = time.monotonic() + TIMEOUT, {}
        while len(answers) < size:
            waiting = [connection for connection in self.connections[:size] if connection not in answers]
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            for connection in ready:
                succeeded, answers[connection] = pickle.loads(connection.recv_bytes())
                if not succeeded:
                    rank = self.connections.index(connection)
                    self.close()  # the others may wait for it
                    raise AssertionError(f"on rank {rank} of {size}:\n{answers[connection]}")
            if not ready:
                ranks = [self.connections.index(connection) for connection in waiting]
                self.close()
                raise AssertionError(f"ranks {ranks} of {size} did not answer within {TIMEOUT} seconds")
        return [answers[connection] for connection in self.connections[:size]]

    def close(self):
        """End the processes."""
        for process in self.processes:
            process.kill()
        self.connections, self.processes = [], []


def spawn(num_ranks, function, *args, timeout):
    """``function(rank, *args)`` on ranks of their own, where something is to go wrong.

    ``timeout`` is the process group's. Returns, of those ranks that did not end before, seconds and what was returned
    or raised.
    """
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(num_ranks):
            here, there = CONTEXT.Pipe()
            given = rank, num_ranks, folder, timeout, there, function, args
            processes.append((CONTEXT.Process(target=_run_once, args=given, daemon=True), here))
            processes[-1][0].start()
            there.close()
        for rank, (process, connection) in enumerate(processes):
            try:
                if connection.poll(TIMEOUT):
                    answers[rank] = connection.recv()
            except EOFError:  # it has died
                pass
            process.join(TIMEOUT)
            process.kill()
    return answers


def _run_once(rank, num_ranks, folder, timeout, connection, function, args):
    _join(rank, num_ranks, folder, "gloo", timeout)
    started = time.monotonic()
    try:
        answer = function(rank, *args)
    except Exception as error:
        answer = error
    connection.send((time.monotonic() - started, answer))
    connection.close()
    os._exit(0)  # without waiting for ranks that are gone
