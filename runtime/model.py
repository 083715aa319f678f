"""Which model the command line is about, and how both sides hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wavecast.runtime.checkpoint import Checkpoint
from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.hf import layouts, logical_tensors
from wavecast.runtime.layout.mesh import MeshSpec
from wavecast.runtime.layout.shard import Layout
from wavecast.runtime.presets import preset

__all__ = ("DEFAULT_PRESET", "Sides", "as_table", "describe_sides", "resolve_model")

DEFAULT_PRESET = "tiny-qwen2"


@dataclass(frozen=True, slots=True)
class Sides:
    """
    Layouts of both sides.

    :ivar sources: one a trainer rank
    :ivar replicas: for each replica, one an engine rank
    """

    sources: tuple[Layout, ...]
    replicas: tuple[tuple[Layout, ...], ...]

    @property
    def destinations(self) -> tuple[Layout, ...]:
        """All engine ranks in one flat list, replica after replica."""
        return tuple(layout for replica in self.replicas for layout in replica)


def resolve_model(*, preset_name: str | None, checkpoint: str | None, layers: int | None) -> ModelConfig:
    """
    Return the model's configuration: of a checkpoint, of a preset, or of the default preset.

    :param layers: scale the depth down to so many layers
    :raises ConfigError: when both are given, or the preset is unknown, or a checkpoint is to be scaled down
    :raises CheckpointError: when the checkpoint is missing or damaged
    """
    if checkpoint is not None:
        if preset_name is not None or layers is not None:
            raise ConfigError("--checkpoint brings its own configuration: --preset and --layers do not go with it")

        with Checkpoint.open(checkpoint) as opened:
            opened.check(logical_tensors(opened.config))
            return opened.config

    config = preset(preset_name or DEFAULT_PRESET)
    return config if layers is None else config.with_layers(layers)


def describe_sides(config: ModelConfig, *, src: str, dst: str, replicas: int, dtype: str) -> Sides:
    """
    Return what every rank of both sides holds.

    :param src: the trainers' mesh, such as ``"tp=2,pp=2,dp=2"``
    :param dst: the mesh of one replica
    :raises ConfigError: when a mesh is impossible or does not fit the model
    """
    if replicas < 1:
        raise ConfigError(f"replicas is {replicas}, it must be at least 1")

    sources = layouts(config, MeshSpec.parse(src), dtype=dtype)
    replica = layouts(config, MeshSpec.parse(dst), dtype=dtype)
    return Sides(sources, (replica,) * replicas)


def as_table(title: str, rows: Mapping[str, str]) -> str:
    """Return ``rows`` as aligned lines under ``title``."""
    width = max(len(name) for name in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])
