"""What the wire can do: one message of the same bytes between two processes, without anything around it."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ("raw_pair", "ipc_pair")

_SPAWN = "spawn"


def raw_pair(nbytes: int, *, backend: str, repeats: int = 10) -> dict[str, float]:
    """
    Time one send of ``nbytes`` from one process to another, warm; return median, best and worst seconds.

    :param backend: ``"nccl"`` (GPUs 0 and 1) or ``"gloo"``
    """
    return _in_pair(_raw_member, nbytes, backend, repeats)


def ipc_pair(nbytes: int, *, repeats: int = 10) -> dict[str, float]:
    """Time GPU 1 pulling ``nbytes`` out of GPU 0's memory through a CUDA IPC handle, warm."""
    return _in_pair(_ipc_member, nbytes, "ipc", repeats)


def _in_pair(member: Callable[..., None], nbytes: int, backend: str, repeats: int) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    context = mp.get_context(_SPAWN)
    results = context.SimpleQueue()
    handles = context.SimpleQueue()
    processes = [
        context.Process(target=member, args=(rank, port, nbytes, backend, repeats, results, handles))
        for rank in range(2)
    ]
    for process in processes:
        process.start()

    for process in processes:
        process.join()

    if any(process.exitcode for process in processes):
        raise RuntimeError(f"the {backend} ceiling failed: exit codes {[process.exitcode for process in processes]}")

    seconds: list[float] = results.get()
    return {
        "seconds": statistics.median(seconds),
        "best": min(seconds),
        "worst": max(seconds),
        "gigabytes_per_second": nbytes / statistics.median(seconds) / 1e9,
    }


def _join(rank: int, port: int, backend: str) -> torch.device:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cpu")
    if backend != "gloo":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)

    dist.init_process_group("nccl" if backend == "nccl" else "gloo", rank=rank, world_size=2)
    return device


def _raw_member(rank, port, nbytes, backend, repeats, results, handles):  # type: ignore[no-untyped-def]
    device = _join(rank, port, backend)
    buffer = torch.full((nbytes,), rank, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(repeats + 2):
        dist.barrier()
        _finish(device)
        start = time.perf_counter()
        if rank == 0:
            dist.send(buffer, 1)
        else:
            dist.recv(buffer, 0)

        _finish(device)
        seconds.append(time.perf_counter() - start)

    if rank == 1:
        results.put(seconds[2:])

    dist.barrier()
    dist.destroy_process_group()


def _ipc_member(rank, port, nbytes, backend, repeats, results, handles):  # type: ignore[no-untyped-def]
    device = _join(rank, port, backend)
    buffer = torch.full((nbytes,), rank, dtype=torch.uint8, device=device)
    if rank == 0:
        handles.put(buffer)
        dist.barrier()
    else:
        remote = handles.get()
        seconds = []
        for _ in range(repeats + 2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            buffer.copy_(remote)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)

        results.put(seconds[2:])
        del remote
        dist.barrier()

    dist.destroy_process_group()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
