"""
A driver that ends in the middle of its second sync, as one that is killed: run by the tests in a process of its own.

    python -m tests.integration.first_driver ADDRESS NAMESPACE
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

import ray

from wavecast.runtime import ModelGroup, ParameterSyncGroup, SyncOptions

__all__ = ("ENGINES", "EXIT_CODE", "OPTIONS", "TRAINER")

TRAINER, ENGINES = "restart-trainer", ("restart-engine-0", "restart-engine-1")
EXIT_CODE = 17
OPTIONS = SyncOptions(transport="gloo", chunk_bytes=1 << 8, in_flight=1, deadline_seconds=60)


async def main(address: str, namespace: str) -> None:
    ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
    trainer = ray.get_actor(TRAINER)
    engines = [ray.get_actor(name) for name in ENGINES]
    group = ParameterSyncGroup(
        ModelGroup("policy", [[trainer]]), ModelGroup("rollout", [[e] for e in engines]), OPTIONS
    )
    await group.sync(5)
    ray.get(trainer.add.remote(1.0))
    # Neither the group nor Ray is told.
    await group.sync(6, progress=lambda receipt: os._exit(EXIT_CODE))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
