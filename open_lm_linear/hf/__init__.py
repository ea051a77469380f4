"""The model in transformers: importing this registers it, so that Auto classes load exports without remote code."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from open_lm_linear.hf.modeling import OpenLMLinearCache, OpenLMLinearConfig, OpenLMLinearForCausalLM

AutoConfig.register(OpenLMLinearConfig.model_type, OpenLMLinearConfig, exist_ok=True)
AutoModelForCausalLM.register(OpenLMLinearConfig, OpenLMLinearForCausalLM, exist_ok=True)

__all__ = ["OpenLMLinearCache", "OpenLMLinearConfig", "OpenLMLinearForCausalLM"]
