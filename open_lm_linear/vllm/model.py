"""The Transformer as a vLLM model without attention: vLLM owns the states' memory, and schedules and samples.

Loaded by vLLM through `register`; nothing else imports it. Sequences that decode are read as one batch, a token each;
prompts, or the pieces that vLLM cuts them into, one after another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from open_lm_linear.attention.base import Tensor
from open_lm_linear.model import Transformer
from open_lm_linear.vllm.slots import StateLayout, advance, layouts


class StateMemory(nn.Module, MambaBase):
    """One layer's states in vLLM's memory: ``kv_cache`` holds a tensor (slots, ...) for each of the state's."""

    mamba_type = MambaAttentionBackendEnum.LINEAR  # whose metadata says which tokens are whose

    def __init__(self, layout: StateLayout, name: str, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.layout, self.name = layout, name
        self.kv_cache: tuple[Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.layout.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.layout.dtypes


class OpenLMLinearForVLLM(nn.Module, HasInnerState, IsAttentionFree):
    """``self.model``, the package's Transformer as it is: one GPU or CPU, no tensor or pipeline parallelism."""

    has_inner_state: ClassVar[Literal[True]] = True
    is_attention_free: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise ValueError("open_lm_linear models run on one device in vLLM: leave out --tensor-parallel-size.")
        if not vllm_config.model_config.enforce_eager:  # a recorded graph could not follow sequences of any length
            raise ValueError("open_lm_linear models run eagerly in vLLM: give --enforce-eager.")
        self.model = Transformer(vllm_config.model_config.hf_config.to_model_config())
        self.layouts = layouts(self.model)
        names = [maybe_prefix(prefix, f"model.layers.{i}.attention") for i in range(len(self.layouts))]
        self.memories = [StateMemory(*both, vllm_config) for both in zip(self.layouts, names, strict=True)]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.tok_embeddings(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states (N, hidden_dim) of N tokens (N,) at these positions, of whichever sequences vLLM says."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures the memory that a full batch takes
            return self.model.hidden(input_ids[None])[0][0]
        batch = metadata[self.memories[0].name]
        memory, slots = [m.kv_cache for m in self.memories], batch.state_indices_tensor.long()
        out = torch.zeros(len(input_ids), self.model.config.hidden_dim, device=input_ids.device, dtype=self._dtype())

        def read(ids: Tensor, at: Tensor, rows: slice) -> Tensor:
            return advance(self.model, self.layouts, memory, ids, at, slots[rows])

        decodes = batch.num_decodes
        if decodes:
            out[:decodes] = read(input_ids[:decodes, None], positions[:decodes], slice(0, decodes))[:, 0]
        bounds = batch.query_start_loc[decodes : decodes + batch.num_prefills + 1].tolist()
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False), start=decodes):
            out[begin:end] = read(input_ids[None, begin:end], positions[begin : begin + 1], slice(i, i + 1))[0]
        return out

    def _dtype(self) -> torch.dtype:
        return self.model.tok_embeddings.weight.dtype

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.model.logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
