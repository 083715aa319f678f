"""The runtime: layouts, plans, transfers and the group that drives them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from wavecast.runtime.errors import (
    ActorDied,
    ActorFailed,
    CheckpointError,
    ChecksumMismatch,
    ConfigError,
    GroupClosed,
    LayoutError,
    NotATransferWorker,
    SyncAborted,
    SyncError,
    SyncInProgress,
    SyncTimeout,
    TransportUnavailable,
    UnsupportedEventLoop,
    ValidationError,
    WavecastError,
)
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.mesh import MeshSpec
from wavecast.runtime.layout.shard import FixedShards, Layout, Piece, Place, Shard, describe
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.plan.reshard import ReshardPlan, plan_reshard
from wavecast.runtime.plan.route import Route
from wavecast.runtime.report import HookSeconds, PhaseSeconds, ReplicaVersion, SyncReport, Torn

if TYPE_CHECKING:
    from wavecast.runtime.group import ParameterSyncGroup
    from wavecast.runtime.integrity import ValidationReceipt
    from wavecast.runtime.model_group import ModelGroup
    from wavecast.runtime.transfer.worker import TransferWorker

__all__ = (
    "ParameterSyncGroup",
    "ModelGroup",
    "TransferWorker",
    "SyncOptions",
    "SyncReport",
    "PhaseSeconds",
    "HookSeconds",
    "ReplicaVersion",
    "Torn",
    "Shard",
    "FixedShards",
    "Piece",
    "Place",
    "Layout",
    "Box",
    "MeshSpec",
    "describe",
    "plan_reshard",
    "ReshardPlan",
    "Route",
    "WavecastError",
    "ConfigError",
    "CheckpointError",
    "SyncError",
    "LayoutError",
    "ActorDied",
    "ActorFailed",
    "SyncTimeout",
    "SyncAborted",
    "ChecksumMismatch",
    "ValidationError",
    "TransportUnavailable",
    "NotATransferWorker",
    "GroupClosed",
    "SyncInProgress",
    "UnsupportedEventLoop",
    "ValidationReceipt",
)

# These need ray or torch, which a plan does without: they are imported at first use.
_HEAVY = {
    "ParameterSyncGroup": "wavecast.runtime.group",
    "ValidationReceipt": "wavecast.runtime.integrity",
    "ModelGroup": "wavecast.runtime.model_group",
    "TransferWorker": "wavecast.runtime.transfer.worker",
}


def __getattr__(name: str) -> object:
    module = _HEAVY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    return getattr(importlib.import_module(module), name)
