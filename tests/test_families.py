"""Every family against transformers, both ways: its checkpoint in, the same logits; ours out, the same logits again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative

import open_lm_linear as oll
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer
from open_lm_linear.pretrained import open_source
from open_lm_linear.pretrained.copies import convert, prepare
from open_lm_linear.pretrained.families import FAMILIES, from_hugging_face, to_hugging_face

TOKENS = 45
IDS = torch.arange(2 * TOKENS).view(2, TOKENS) * 7 % 61
ROPE = {"rope_theta": 5000.0}
YARN = {**ROPE, "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
EAGER = ("gemma2", "mamba")  # SDPA cannot cap logits, and there is nothing for it to do
LONG = {"short_factor": [1.0, 1.3, 1.7], "long_factor": [1.5, 2.5, 6.0]}

# model_type, what its config adds to SIZES. Contexts of 16 are outrun by the 45 tokens.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama1": ("llama", {"num_key_value_heads": 6}),
    "llama2_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_all_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama_linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.5}}),
    "llama_dynamic": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "llama_yarn": ("llama", {"rope_parameters": YARN, "max_position_embeddings": 48}),
    "llama_yarn_every_option": (
        "llama",
        {
            "rope_parameters": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4}
            | {"truncate": False}
        },
    ),
    "llama_yarn_attention_factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.25}}),
    "llama3": ("llama", {"rope_parameters": {"rope_theta": 500000.0}}),
    "llama3_1": ("llama", {"rope_parameters": {**ROPE, **LLAMA3, "rope_type": "llama3", "factor": 8.0}}),
    "llama3_2_tied": (
        "llama",
        {"rope_parameters": {**ROPE, **LLAMA3, "rope_type": "llama3", "factor": 32.0}, "tie_word_embeddings": True},
    ),
    "mistral_v0_1": ("mistral", {"sliding_window": 11}),
    "mistral_v0_3": ("mistral", {"sliding_window": None, "head_dim": 14}),
    "mistral_tied": ("mistral", {"sliding_window": 7, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2_5_tied_windows": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 14}),
    "qwen3_everything": (
        "qwen3",
        {
            "head_dim": 10,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
            "rope_parameters": YARN,
        },
    ),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 100000.0}}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3_everything": (
        "smollm3",
        {
            "no_rope_layers": [0, 1, 0],
            "attention_bias": True,
            "mlp_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 13}),
    "phi3_partial": ("phi3", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.67}, "tie_word_embeddings": True}),
    "phi3_longrope": (
        "phi3",
        {
            "rope_parameters": {**ROPE, **LONG, "rope_type": "longrope"},
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 64,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2_everything": (
        "olmo2",
        {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": {**YARN, "factor": 2.0}},
    ),
    "gemma2": ("gemma2", {"head_dim": 10, "sliding_window": 9, "query_pre_attn_scalar": 7}),
    "gemma2_everything": (
        "gemma2",
        {
            "head_dim": 6,
            "sliding_window": 5,
            "attention_bias": True,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 10, "sliding_window": 9, "query_pre_attn_scalar": 12}),
    "gemma3_everything": (
        "gemma3_text",
        {
            "head_dim": 10,
            "sliding_window": 9,
            "attention_bias": True,
            "final_logit_softcapping": 2.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_theta": 9000.0, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 300.0, "rope_type": "default"},
            },
        },
    ),
    "mamba": ("mamba", {"intermediate_size": 72, "layer_norm_epsilon": 2e-5}),
    "mamba_everything": (
        "mamba",
        {
            **{"intermediate_size": 108, "expand": 3, "state_size": 5, "conv_kernel": 3, "time_step_rank": 4},
            **{"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
        },
    ),
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 29,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-5,
    "pad_token_id": 0,
}


def random_model(folder: Path, kind: str, **fields: Any) -> Any:
    """A random model of transformers whose every parameter matters, saved to ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZES, **fields})
    implementation = "eager" if kind in EAGER else "sdpa"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()
    for name, param in model.named_parameters():
        torch.nn.init.normal_(param, 0.5 if "norm" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


def their_logits(model: Any, cut: int | None = None) -> torch.Tensor:
    """All logits in one call, or with a cache: ``cut`` tokens and then one by one."""
    with torch.no_grad():
        model(
            IDS[:, :2], use_cache=False
        )  # with dynamic scaling transformers remembers the longest call until a short one
        if cut is None:
            return model(IDS, use_cache=False).logits
        name = "cache_params" if model.config.model_type == "mamba" else "past_key_values"
        out = model(IDS[:, :cut], use_cache=True)
        parts = [out.logits]
        for t in range(cut, TOKENS):
            out = model(IDS[:, t : t + 1], **{name: out[name]}, use_cache=True)
            parts.append(out.logits)
    return torch.cat(parts, 1)


def our_logits(model: Transformer, cut: int | None = None) -> torch.Tensor:
    with torch.no_grad():
        if cut is None:
            return model(IDS)[0]
        logits, _, past = model(IDS[:, :cut], use_cache=True)
        parts = [logits]
        for t in range(cut, TOKENS):
            logits, _, past = model(IDS[:, t : t + 1], past_key_values=past, use_cache=True)
            parts.append(logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_comes_in_and_goes_out_with_the_same_logits(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kind, fields = CASES[case]
    theirs = random_model(tmp_path / "theirs", kind, **fields)
    ours = oll.load_pretrained(tmp_path / "theirs")
    assert relative(our_logits(ours), their_logits(theirs)) < 1e-5
    assert relative(our_logits(ours, 13), their_logits(theirs, 13)) < 1e-5
    assert relative(our_logits(ours, 30), their_logits(theirs, 30)) < 1e-5

    source = open_source(str(tmp_path / "theirs"))
    assert ModelConfig.from_json(json.loads(json.dumps(source.config.to_json()))) == source.config
    convert(prepare(source, format="hf"), tmp_path / "back")
    implementation = "eager" if kind in EAGER else "sdpa"
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation=implementation).eval()
    assert type(back) is type(theirs)
    assert torch.equal(their_logits(back), their_logits(theirs))

    convert(prepare(source), tmp_path / "ours")
    again = oll.load_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert torch.equal(our_logits(again), our_logits(ours))


@pytest.mark.parametrize("case", ["llama_all_biases", "qwen3_everything", "olmo2_everything", "gemma3_everything"])
def test_the_layout_of_rotary_rows_can_be_chosen(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    random_model(tmp_path / "theirs", kind, **fields)
    halves = oll.load_pretrained(tmp_path / "theirs")
    pairs = oll.load_pretrained(tmp_path / "theirs", positional_embedding_type="llama_rotary")
    assert pairs.config.positional_embedding_type == "llama_rotary"
    key = "layers.0.attention.in_proj.weight"
    assert not torch.equal(halves.state_dict()[key], pairs.state_dict()[key])
    assert relative(our_logits(pairs), our_logits(halves)) < 1e-5
    source = open_source(str(tmp_path / "theirs"))
    convert(prepare(source, positional_embedding_type="llama_rotary"), tmp_path / "pairs")
    # Out again to transformers' layout: the rows come back as they were.
    convert(prepare(open_source(str(tmp_path / "pairs")), format="hf"), tmp_path / "back")
    back = oll.load_pretrained(tmp_path / "back")
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in halves.state_dict().items())


@pytest.mark.parametrize("case", sorted(case for case, (kind, _) in CASES.items() if kind != "mamba"))
def test_the_swap_works_for_every_family(case: str, tmp_path: Path) -> None:
    kind, fields = CASES[case]
    random_model(tmp_path, kind, **fields)
    teacher = oll.load_pretrained(tmp_path)
    student = oll.load_pretrained(tmp_path, attn_name="linear")
    before, after = teacher.state_dict(), student.state_dict()
    assert set(after) - set(before) == student.new_keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert student.config.sliding_window is None and student.config.attn_logit_softcap is None
    assert student.config.rotary_scaling == teacher.config.rotary_scaling
    whole = our_logits(student)
    assert whole.isfinite().all()
    if "dynamic" not in case and "longrope" not in case:  # those alone depend on the cut, as in transformers
        assert relative(our_logits(student, 20), whole) < 1e-4


def test_every_family_is_covered() -> None:
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


SCALINGS = {
    "linear:2.5": {"rope_type": "linear", "factor": 2.5},
    "dynamic:2": {"rope_type": "dynamic", "factor": 2.0},
    "yarn:4": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3:8": {**LLAMA3, "rope_type": "llama3", "factor": 8.0},
}


@pytest.mark.parametrize("text", SCALINGS)
def test_a_scaling_by_flag_is_that_of_transformers(text: str, tmp_path: Path) -> None:
    """`Llama2-7B*`: a model of 16 tokens' context run on 45 with its rotary stretched."""
    from transformers import AutoModelForCausalLM

    random_model(tmp_path, "llama", max_position_embeddings=16)
    rope = {"rope_theta": 10000.0, **SCALINGS[text]}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=rope, attn_implementation="sdpa").eval()
    plain = oll.load_pretrained(tmp_path)
    ours = oll.load_pretrained(tmp_path, rotary_scaling=text)
    assert relative(our_logits(ours), their_logits(theirs)) < 1e-5
    assert relative(our_logits(ours, 10), their_logits(theirs, 10)) < 1e-5
    assert relative(our_logits(ours), our_logits(plain)) > 1e-2


def test_base_and_scale_by_flag(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    random_model(tmp_path, "llama")
    rope = {"rope_theta": 77000.0, "rope_type": "linear", "factor": 3.0}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=rope, attn_implementation="sdpa").eval()
    ours = oll.load_pretrained(tmp_path, rotary_base_frequency=77000.0, rotary_scale=3.0)
    assert relative(our_logits(ours), their_logits(theirs)) < 1e-5


@pytest.mark.parametrize("text", ["yarn", "yarn:", "yarn:0.5", "yarn:nan", "longrope:4", "4", "yarn:4:5"])
def test_a_scaling_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    random_model(tmp_path, "llama")
    with pytest.raises(UserError, match="is not KIND:FACTOR"):
        oll.load_pretrained(tmp_path, rotary_scaling=text)


REFUSED = {
    "another family": ({"model_type": "gpt_neox", "rotary_pct": 0.25}, "'gpt_neox' is not supported; .*rotary_pct"),
    "activation": ({"hidden_act": "relu"}, "the config field hidden_act = 'relu' cannot be represented"),
    "quantised": ({"quantization_config": {"bits": 4}}, "the config field quantization_config"),
    "rope type": ({"rope_parameters": {**ROPE, "rope_type": "proportional", "factor": 1.0}}, "rope_type = 'propor"),
    "partial rotary": ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    "no layers": ({"num_hidden_layers": None}, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_beyond_us_is_refused_by_its_field(case: str) -> None:
    fields, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence) as error:
        from_hugging_face({"model_type": "llama", **SIZES, **fields}, source="X/config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"post_embed_norm": True}, {"ffn_type": "gelu"}, {"rotary_rounding": "bfloat16"}, {"v_head_dim": 4}]
    + [{"model_norm": "default_layer_norm"}],
)
def test_what_no_family_has_is_not_written_as_one(change: dict[str, Any]) -> None:
    config = ModelConfig(36, 2, 6, 61, model_norm="rms_norm", intermediate_dim_ffn=29)
    family, values = to_hugging_face(config)
    assert family.model_type == "llama" and values["num_key_value_heads"] == 6
    with pytest.raises(UserError, match="no family of transformers"):
        to_hugging_face(ModelConfig(**{**vars(config), **change}))
