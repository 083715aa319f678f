"""Low-rank adapters on any base shards: merged as they are sent, or sent as tensors of their own."""

from __future__ import annotations

from wavecast.runtime.layout.lora.adapter import Adapter, adapter, adapter_only
from wavecast.runtime.layout.lora.attach import attached
from wavecast.runtime.layout.lora.gather import gathered
from wavecast.runtime.layout.lora.merge import merged
from wavecast.runtime.layout.lora.peft import peft_adapters, peft_names

__all__ = ("Adapter", "adapter", "attached", "merged", "adapter_only", "gathered", "peft_adapters", "peft_names")
