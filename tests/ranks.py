"""Processes that are the ranks of process groups: a function runs on all of them, and what it returns comes back."""

import contextlib
import datetime
import multiprocessing.connection
import os
import pickle
import socket
import time
import traceback

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds: what a test may take


def _free_port():
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def join(rank, num_ranks, port, kind, timeout=TIMEOUT):
    """Makes this process a rank, on its own GPU if there is one for each."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if kind == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    dist.init_process_group(
        kind,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _serve(rank, num_ranks, port, kind, connection):
    join(rank, num_ranks, port, kind)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, num_ranks + 1)}
    while True:
        message = connection.recv_bytes()
        try:
            function, size, args = pickle.loads(message)
            answer = True, function(groups[size], *args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


class Ranks:
    """As many processes as the largest group needs; they live as long as the tests, or until one of them fails."""

    def __init__(self, num_ranks, kind):
        self.num_ranks, self.kind = num_ranks, kind
        self.connections, self.processes = [], []

    def _start(self):
        context, port = multiprocessing.get_context("spawn"), _free_port()
        for rank in range(self.num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.num_ranks, port, self.kind, there), daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, size, function, *args):
        """``function(group, *args)`` on the first ranks; a list of what it returned on each."""
        if not self.processes:
            self._start()
        message = pickle.dumps((function, size, args))
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
    """``function(*args)`` on ranks of their own, where something is to go wrong: exit codes and what they returned.

    ``timeout`` is the process group's.
    """
    context = multiprocessing.get_context("spawn")
    port, answers = _free_port(), context.Queue()
    processes = [
        context.Process(target=_run_once, args=(rank, num_ranks, port, timeout, answers, function, args), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    results = {}
    while not answers.empty():
        rank, answer = answers.get()
        results[rank] = answer
    return codes, results


def _run_once(rank, num_ranks, port, timeout, answers, function, args):
    join(rank, num_ranks, port, "gloo", timeout)
    started = time.monotonic()
    try:
        answer = function(*args)
    except Exception as error:
        answer = error.__class__.__name__, str(error)
    answers.put((rank, (time.monotonic() - started, answer)))
    answers.close()
    answers.join_thread()
    os._exit(0)  # without waiting for ranks that are gone
