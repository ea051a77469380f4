"""The plug-in that vLLM finds by its entry point, so that it serves exports of ours."""

from __future__ import annotations

ARCHITECTURE = "OpenLMLinearForCausalLM"  # what an export's config.json says


def register() -> None:
    """Tells vLLM of the config and the model class; vLLM calls it once in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig

    import open_lm_linear.hf  # noqa: F401  (transformers then knows the config)

    MODELS_CONFIG_MAP[ARCHITECTURE] = MambaModelConfig  # one block of memory a sequence, however long it grows
    ModelRegistry.register_model(ARCHITECTURE, "open_lm_linear.vllm.model:OpenLMLinearForVLLM")
