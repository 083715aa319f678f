"""From a ``GPTModel``, or the chunks of one, to shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.config import ModelConfig, require_config
from wavecast.runtime.layout.megatron.layer import LayerReader
from wavecast.runtime.layout.megatron.modules import children, find, part, setting, tensor_ranks
from wavecast.runtime.layout.megatron.names import catalogue, guess_config
from wavecast.runtime.layout.megatron.parameters import Parameters
from wavecast.runtime.layout.megatron.runs import Run
from wavecast.runtime.layout.shard import Shard

__all__ = ("model_config", "shards", "trainable_names")


def shards(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    config: ModelConfig | None = None,
    *,
    vocab_size: int | None = None,
    buffers: bool = True,
) -> list[Shard]:
    """
    Return what this rank holds of a Megatron-core ``GPTModel``, as views of its parameters: nothing is copied.

    Where everything sits is read off the module: a layer's number, the numbers of its experts, the process groups its
    parts carry, and the shapes of its parameters held against those of the checkpoint. Any pipeline layout (uneven,
    virtual) and any tensor, expert and expert tensor parallelism is served, in Transformer Engine's modules and in
    Megatron's own. Left out are rows that pad the vocabulary, multi-token-prediction layers, and adapters around a
    base layer (see :mod:`wavecast.runtime.layout.lora`); every other parameter is accounted for.

    Called on any rank at any time, again at every sync: O(parameters), no communication. Where the model keeps its
    norms' weights less one, the shards of norms are computed, and serve a source only.

    :param model: the model, or the list of its chunks where pipeline stages are virtual; wrappers are looked through
    :param config: the checkpoint's configuration, which decides names and shapes; by default what the model's own
        amounts to (see :func:`model_config`)
    :param vocab_size: rows of the embedding in the checkpoint: needed where ``config`` is not given and the
        vocabulary is padded
    :param buffers: give the bias on the router's scores too (``e_score_correction_bias``), the one buffer that
        checkpoints have. It is trainable unless its update rate is 0: training changes it, without a gradient
    :raises LayoutError: for a parameter that the checkpoint has no tensor for, a tensor of a layer held that the
        model lacks, a shape that is neither the tensor's nor its part, or memory that does not hold plain elements
        (FP8, offloaded)
    """
    return [shard for part in _read(model, config, vocab_size, buffers=buffers) for shard in part.shards]


def trainable_names(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    config: ModelConfig | None = None,
    *,
    vocab_size: int | None = None,
) -> frozenset[str]:
    """
    Return the logical names of what is trained of this rank's part: for ``group.sync(only=...)``.

    Parameters that have ``requires_grad``, and biases on the router's scores that are updated.

    :raises LayoutError: as :func:`shards`, whose parameters these are
    """
    return frozenset(name for part in _read(model, config, vocab_size, buffers=True) for name in part.trainable)


def model_config(model: torch.nn.Module | Sequence[torch.nn.Module], *, vocab_size: int | None = None) -> ModelConfig:
    """
    Return the Hugging Face configuration that a Megatron-core model's own amounts to.

    :param vocab_size: rows of the embedding in the checkpoint; by default the model's, padding included
    :raises LayoutError: when no known family describes the model, or ``vocab_size`` is no positive integer
    """
    chunk = _chunks(model)[0]
    if vocab_size is not None and not (type(vocab_size) is int and vocab_size > 0):
        raise LayoutError(f"vocab_size={vocab_size!r} must be a positive integer")

    return guess_config(
        chunk.config,
        vocab_size=vocab_size or int(cast("int", chunk.vocab_size)),
        tied=bool(chunk.share_embeddings_and_output_weights),
    )


def _read(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    config: ModelConfig | None,
    vocab_size: int | None,
    *,
    buffers: bool,
) -> list[Parameters]:
    chunks = _chunks(model)
    if config is None:
        config = model_config(chunks, vocab_size=vocab_size)

    require_config(config)
    if vocab_size not in (None, config.vocab_size):
        raise LayoutError(f"vocab_size is {vocab_size}, the configuration has {config.vocab_size}")

    return [_read_chunk(chunk, config, buffers=buffers) for chunk in chunks]


def _chunks(model: torch.nn.Module | Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """Return the ``GPTModel`` of each chunk, out of the wrappers (DDP, ``Float16Module``) around it."""
    found: list[torch.nn.Module] = []
    if not isinstance(model, torch.nn.Module | Sequence):
        raise LayoutError(f"{type(model).__name__} is no Megatron-core GPTModel, nor a list of its chunks")

    for wrapper in [model] if isinstance(model, torch.nn.Module) else model:
        chunk: torch.nn.Module | None = wrapper
        while chunk is not None and find(chunk, "decoder") is None:
            chunk = find(chunk, "module")

        if chunk is None:
            raise LayoutError(f"{type(wrapper).__name__} is no Megatron-core GPTModel: it has no decoder")

        found.append(chunk)

    if not found:
        raise LayoutError("the list of chunks is empty")

    return found


def _read_chunk(chunk: torch.nn.Module, config: ModelConfig, *, buffers: bool) -> Parameters:
    tied = bool(chunk.share_embeddings_and_output_weights)
    if tied != config.tie_word_embeddings:
        raise LayoutError(
            f"share_embeddings_and_output_weights is {tied} in the model, tie_word_embeddings is "
            f"{config.tie_word_embeddings} in the configuration"
        )

    known = catalogue(config)
    parameters = Parameters(chunk, known.shapes)
    decoder, embedding, head = part(chunk, "decoder"), find(chunk, "embedding"), find(chunk, "output_layer")
    if embedding is not None:
        _add_vocabulary(parameters, part(embedding, "word_embeddings"), "model.embed_tokens", config.vocab_size)

    for layer in children(decoder, "layers"):
        LayerReader(parameters, config, known, layer, buffers=buffers).read()

    norm = find(decoder, "final_layernorm")
    weight = parameters.claim(norm, "weight") if norm is not None else None
    if weight is not None:
        less = bool(setting(chunk, "layernorm_zero_centered_gamma"))
        parameters.add_whole(weight, "model.norm.weight", one_less=less)

    if head is not None:
        # Tied, a last stage apart from the first keeps the weight in memory of its own; else there is none here.
        _add_vocabulary(parameters, head, "model.embed_tokens" if tied else "lm_head", config.vocab_size)

    parameters.check_all_claimed()
    return parameters


def _add_vocabulary(parameters: Parameters, module: torch.nn.Module, name: str, vocab_size: int) -> None:
    """Add this rank's part of the vocabulary, without the rows that pad it."""
    weight = parameters.claim(module, "weight")
    if weight is None:
        return

    rank, size = tensor_ranks(module)
    rows = weight.shape[0]
    if rows * size < vocab_size:
        raise LayoutError(
            f"{weight.path} has {rows} rows on each of {size} ranks, {name}.weight has {vocab_size}",
            tensor=f"{name}.weight",
        )

    true = min(rows, vocab_size - rank * rows)
    if true > 0:
        parameters.add(weight.rows(true), [Run(name, rank * rows, true)])
