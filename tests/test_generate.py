"""Generation: the cache changes nothing, sampling stays within its filters, text streams in whole characters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from open_lm_linear import generate as generation
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.generate import Sampling, Stats, generate, next_token, prefill, probabilities, stream, stream_text
from open_lm_linear.model import Transformer, create_model

VOCAB = 61
ATTENTIONS = ["softmax", "linear"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads only cost time at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(attn_name: str) -> Transformer:
    config = ModelConfig(
        hidden_dim=32,
        n_layers=2,
        n_heads=4,
        n_heads_kv=2,
        vocab_size=VOCAB,
        intermediate_dim_ffn=48,
        attn_name=attn_name,
    )
    torch.manual_seed(0)
    model = create_model(config).eval()
    with torch.no_grad():  # logits far enough apart that an argmax is no matter of rounding
        model.head_weight().mul_(4)
    return model


def prompt(rows: int = 2, tokens: int = 13, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attn_name", ATTENTIONS)
def test_greedy_with_cache_equals_recomputing(attn_name: str) -> None:
    model, ids = tiny(attn_name), prompt()
    cached = generate(model, ids, max_new_tokens=12)
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids)


@pytest.mark.parametrize("attn_name", ATTENTIONS)
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_prefill_in_pieces_equals_one_piece(attn_name: str, chunk: int) -> None:
    model, ids = tiny(attn_name), prompt()
    whole, past = prefill(model, ids)
    pieces, past_of_pieces = prefill(model, ids, chunk=chunk)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    assert past_of_pieces.nbytes() == past.nbytes()
    torch.testing.assert_close(whole, model(ids)[0][:, -1].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attn_name", ATTENTIONS)
@pytest.mark.parametrize("chunk", [4, 2048])
def test_left_padded_rows_equal_the_rows_alone(attn_name: str, chunk: int) -> None:
    model, ids = tiny(attn_name), prompt(3)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    mask[2, :12] = 0
    options = {"max_new_tokens": 9, "repetition_penalty": 1.3}
    together = generate(model, ids, attention_mask=mask, prefill_chunk=chunk, **options)
    for row in range(3):
        alone = generate(model, ids[row : row + 1, mask[row] == 1], **options)
        assert torch.equal(together[row, ids.shape[1] :], alone[0, -9:])


def test_top_k_of_one_is_greedy() -> None:
    model, ids = tiny("linear"), prompt()
    drawn = generate(model, ids, max_new_tokens=8, temperature=1.5, top_k=1, seed=3)
    assert torch.equal(drawn, generate(model, ids, max_new_tokens=8))


def test_probabilities_stay_within_top_k_and_top_p() -> None:
    p = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]])
    torch.testing.assert_close(
        probabilities(p.log(), Sampling(1.0, top_k=2)), torch.tensor([[0, 0.4, 0, 0.25, 0]]) / 0.65
    )
    torch.testing.assert_close(
        probabilities(p.log(), Sampling(1.0, top_p=0.6)), torch.tensor([[0, 0.4, 0, 0.25, 0]]) / 0.65
    )
    torch.testing.assert_close(probabilities(p.log(), Sampling(1.0, top_p=0.01)), torch.tensor([[0, 1.0, 0, 0, 0]]))
    torch.testing.assert_close(probabilities(p.log(), Sampling(2.0)), p.sqrt() / p.sqrt().sum())
    assert probabilities(p.log() * 100, Sampling(1e-6)).isfinite().all()


@pytest.mark.parametrize(("sampling", "allowed"), [(Sampling(1.0, top_k=3), 3), (Sampling(1.0, top_p=0.5), None)])
def test_draws_stay_within_the_set(sampling: Sampling, allowed: int | None) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    inside = probabilities(logits, sampling)[0] > 0
    assert allowed is None or int(inside.sum()) == allowed
    drawn = next_token(logits.expand(4000, -1), sampling, generator=torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(inside.nonzero()[:, 0].tolist())


def test_seed_makes_sampling_reproducible() -> None:
    model, ids = tiny("linear"), prompt()
    options = {"max_new_tokens": 20, "temperature": 1.0}
    first = generate(model, ids, seed=5, **options)
    assert torch.equal(first, generate(model, ids, seed=5, **options))
    assert torch.equal(first, generate(model, ids, generator=torch.Generator().manual_seed(5), **options))
    assert not torch.equal(first, generate(model, ids, seed=6, **options))


def test_repetition_penalty_lowers_what_has_occurred() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    seen = torch.tensor([[True, False, True, False]])
    assert next_token(logits, Sampling(), seen).item() == 0
    assert next_token(logits, Sampling(repetition_penalty=2.0), seen).item() == 1
    strong = generate(tiny("linear"), prompt(), max_new_tokens=30, repetition_penalty=1e9)
    for row in strong.tolist():
        new = row[13:]
        assert len(set(new)) == len(new) and not set(new) & set(row[:13])


def test_eos_ends_a_row_and_then_all() -> None:
    model, ids = tiny("softmax"), prompt()
    free = generate(model, ids, max_new_tokens=12)[:, 13:]
    eos = next(int(t) for t in free[0] if t not in free[1])
    at = free[0].tolist().index(eos)
    out = generate(model, ids, max_new_tokens=12, eos_token_id=eos)[:, 13:]
    assert out[0].tolist() == free[0, : at + 1].tolist() + [eos] * (11 - at)
    assert torch.equal(out[1], free[1])
    alone = generate(model, ids[:1], max_new_tokens=12, eos_token_id=[eos, 0])
    assert alone.shape[1] == 13 + 1 + min(free[0].tolist().index(t) for t in (eos, 0) if t in free[0])


def test_on_token_and_stats_follow_the_generation() -> None:
    model, ids, seen, stats = tiny("linear"), prompt(), [], Stats()
    out = generate(model, ids, max_new_tokens=5, on_token=seen.append, stats=stats)
    assert torch.equal(torch.stack(seen, 1), out[:, 13:])
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_steps) == (13, 5, 4)
    assert stats.state_bytes == 2 * 2 * 4 * 8 * 8 * 4  # rows, layers, heads, K, V, float32
    assert "state 0.00 MB" in stats.summary() and stats.decode_seconds > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.5}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_k": -1}, "--top-k"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "no tokens"),
        ({"input_ids": torch.tensor([[1, VOCAB]])}, f"token id {VOCAB}"),
        ({"input_ids": torch.tensor([[-1, 2]])}, "token id -1"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "on the left"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict, words: str) -> None:
    arguments = {"input_ids": torch.tensor([[1, 2]]), "max_new_tokens": 3} | options
    with pytest.raises(UserError, match=words):
        generate(tiny("linear"), **arguments)
    if "max_new_tokens" in options or "input_ids" in options:
        with pytest.raises(UserError, match=words):  # before the first token is asked for
            stream(tiny("linear"), **arguments)


class Bytes:
    """A tokenizer whose ids are bytes, and 0 a special token."""

    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")


def test_text_streams_in_whole_characters() -> None:
    text = "naïve 漢字 🙂!"
    pieces = list(stream_text(Bytes(), [*text.encode(), 0]))
    assert pieces == list(text)
    assert list(stream_text(Bytes(), "é".encode()[:1])) == ["\ufffd"]  # an unfinished character still comes out
    assert list(stream_text(Bytes(), [])) == []


def test_the_command_streams_text_and_says_what_it_took(monkeypatch, capsys) -> None:
    from open_lm_linear import pretrained

    config = ModelConfig(hidden_dim=32, n_layers=1, n_heads=4, vocab_size=256, attn_name="linear")
    model = create_model(config)
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda source: Bytes())
    monkeypatch.setattr(pretrained, "load_pretrained", lambda source, **_: model)
    args = generation.Args("somewhere", "hello", max_new_tokens=4, device="cpu")
    generation.run(args)
    out = capsys.readouterr()
    expected = generate(model, torch.tensor([list(b"hello")]), max_new_tokens=4, eos_token_id=0)[0, 5:]
    assert out.out.rstrip("\n") == Bytes().decode(expected.tolist()).rstrip("\n")
    assert out.err.startswith("prefill 5 tokens at ")
    with pytest.raises(UserError, match="no chat template"):
        generation.run(generation.Args("somewhere", "hello", chat=True, device="cpu"))
    with pytest.raises(UserError, match="--input-text"):
        generation.run(generation.Args("somewhere", ""))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attn_name", ATTENTIONS)
def test_a_model_that_is_laid_out_says_the_same(attn_name: str, dtype: torch.dtype, tied: bool, monkeypatch) -> None:
    from open_lm_linear.ops.native import native_library
    from open_lm_linear.ops.rows import RowsParameter

    if native_library() is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    model = create_model(ModelConfig(48, 2, 4, 61, attn_name=attn_name, weight_tying=tied)).to(dtype).eval()
    ids, before = prompt(), {name: value.clone() for name, value in model.state_dict().items()}
    _, past = prefill(model, ids)
    expected, _ = prefill(model, ids[:, :1], past=past)
    assert generation.lay_out(model) is model and generation.lay_out(model) is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fast = {name for name, p in model.named_parameters() if type(p) is RowsParameter}
    matrices = {name for name, p in model.named_parameters() if p.dim() == 2 and "tok_embeddings" not in name}
    assert fast == matrices | ({"tok_embeddings.weight"} if tied else set())
    products, times = set(), RowsParameter.times
    monkeypatch.setattr(RowsParameter, "times", lambda w, x, b: products.add(id(w)) or times(w, x, b))
    logits, _ = prefill(model, ids[:, :1], past=past)
    assert products == (set() if model.step is not None else {id(p) for p in model.parameters() if id(p) in products})
    assert products or attn_name == "linear"
    assert (logits - expected).norm() < (1e-5 if dtype == torch.float32 else 0.02) * expected.norm()


def test_one_row_of_bfloat16_takes_torchs_own_product_and_gives_onednn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("linear").bfloat16(), prompt(1, 3)
    onednn, seen, hidden = torch.backends.mkldnn, [], model.hidden
    before = onednn.enabled

    def watched(*args, **kwargs):
        seen.append(onednn.enabled)
        if kwargs.get("past") == "broken":
            raise RuntimeError
        return hidden(*args, **kwargs)

    monkeypatch.setattr(model, "hidden", watched)
    _, past = prefill(model, ids)
    prefill(model, ids[:, :1], past=past)
    with pytest.raises(RuntimeError):
        prefill(model, ids[:, :1], past="broken")  # type: ignore[arg-type]
    assert seen == [before, False, False] and onednn.enabled == before
