"""Shards of Megatron-core models, under Hugging Face names, read off the live module."""

from __future__ import annotations

from wavecast.runtime.layout.megatron.model import model_config, shards, trainable_names

__all__ = ("shards", "model_config", "trainable_names")
