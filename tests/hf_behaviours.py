"""What people expect of a transformers model: run here on the package's class, and alone on exported folders.

`test_hf_modeling.py` imports these tests, and also runs this file by itself in a process where open_lm_linear cannot be
imported; then the environment's EXPORTS says where the folders lie. Nothing here may import the package.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

EXPORTS: dict[str, str] = json.loads(os.environ.get("EXPORTS", "{}"))


class _Nothing:
    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name.split(".")[0] == "open_lm_linear":
            raise ModuleNotFoundError("open_lm_linear is not here", name=name)


if EXPORTS:
    torch.set_num_threads(1)
    sys.meta_path.insert(0, _Nothing)  # type: ignore[arg-type]

PROMPT = [5, 17, 3, 42, 8, 29, 11]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folders() -> dict[str, str]:
    return EXPORTS


@pytest.fixture(params=list(EXPORTS))
def folder(request: pytest.FixtureRequest, folders: dict[str, str]) -> str:
    return str(folders[request.param])


@pytest.fixture
def load() -> Callable[..., Any]:
    from transformers import AutoModelForCausalLM

    def from_folder(folder: str, **options: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
        assert type(model).__module__.startswith("transformers_modules.")
        return model

    return from_folder


@pytest.fixture
def loaded(folder: str, load: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return load(folder)


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref||."""
    assert out.shape == ref.shape
    return ((out.double() - ref.double()).norm() / ref.double().norm()).item()


def is_linear(model: Any) -> bool:
    return model.config.attn_name == "linear"


def padded(rows: list[list[int]], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one batch (B, T) of ids, and its mask."""
    width = max(map(len, rows))
    pad = [[0] * (width - len(row)) for row in rows]
    ids = [p + row if side == "left" else row + p for p, row in zip(pad, rows, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [p + one if side == "left" else one + p for p, one in zip(pad, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def eight_rows() -> list[list[int]]:
    return [torch.randint(2, 61, (length,)).tolist() for length in (12, 3, 1, 9, 12, 5, 2, 7)]


def continued(model: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    """What `generate()` adds to the ids, row by row, greedily."""
    return model.generate(ids, **GREEDY | options)[:, ids.shape[1] :].tolist()


def alone(model: Any, rows: list[list[int]], **options: Any) -> list[list[int]]:
    return [continued(model, torch.tensor([row]), **options)[0] for row in rows]


@pytest.mark.skipif(not EXPORTS, reason="here the package is")
def test_the_package_is_not_here() -> None:
    with pytest.raises(ModuleNotFoundError):
        import open_lm_linear  # noqa: F401


# ---- one pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_logits_of_the_rows_alone(loaded: Any, side: str) -> None:
    rows = eight_rows()
    ids, mask = padded(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = torch.cat([loaded(torch.tensor([row])).logits[0] for row in rows])
        for given in ({"attention_mask": mask}, {"attention_mask": mask, "position_ids": positions}):
            assert relative(loaded(ids, **given).logits[mask.bool()], wanted) < 1e-5
        if side == "left":  # the positions alone tell as much: padding repeats the first one
            for positions_at_padding in (positions, positions.masked_fill(mask == 0, 1)):
                logits = loaded(ids, position_ids=positions_at_padding).logits
                assert relative(logits[mask.bool()], wanted) < 1e-5


def test_a_right_padded_batch_is_scored_as_its_rows(loaded: Any) -> None:
    rows = eight_rows()
    ids, mask = padded(rows, "right")
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        summed = loaded(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(1)).loss
        rest = [torch.tensor([row]) for row in rows if len(row) > 1]
        wanted = sum(loaded(row, labels=row).loss * (row.shape[1] - 1) for row in rest)
    assert relative(summed, wanted) < 1e-5


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(loaded: Any) -> None:
    ids = torch.randint(0, 61, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    out = loaded(ids, labels=labels)
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert relative(out.loss, wanted) < 1e-6
    summed = loaded(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    assert relative(summed, wanted * (labels[:, 1:] != -100).sum() / 40) < 1e-6
    loaded.zero_grad()
    out.loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_positions_that_begin_again_are_packed_documents(loaded: Any) -> None:
    ids = torch.randint(0, 61, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = loaded(ids, position_ids=positions).logits
        assert torch.equal(loaded(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits, packed)
        alone = torch.cat([loaded(part).logits for part in (ids[:, :4], ids[:, 4:])], 1)
    assert relative(packed, alone) < 1e-5


def test_outputs_that_are_asked_for(loaded: Any) -> None:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        out = loaded(ids, output_hidden_states=True, use_cache=False)
        kept = loaded(ids, logits_to_keep=2).logits
        logits = loaded(ids, return_dict=False, use_cache=False)[0]
    states = out.hidden_states
    assert len(states) == 3 and out.past_key_values is None
    assert torch.equal(states[0], loaded.get_input_embeddings()(ids))
    head = loaded.get_output_embeddings() or loaded.get_input_embeddings()
    raw, cap = states[-1] @ head.weight.T, loaded.config.logit_softcap
    assert relative(raw if cap is None else cap * torch.tanh(raw / cap), out.logits) < 1e-6
    assert relative(kept, out.logits[:, -2:]) < 1e-6 and torch.equal(logits, out.logits)
    with pytest.raises(ValueError, match="output_attentions"):
        loaded(ids, output_attentions=True)


# ---- generate ----------------------------------------------------------------------------------------------------


def test_generate_equals_a_loop_of_calls(loaded: Any) -> None:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        out = loaded(ids, use_cache=True)
        texts = []
        for _ in range(10):
            texts.append(int(out.logits[0, -1].argmax()))
            out = loaded(torch.tensor([texts[-1:]]), past_key_values=out.past_key_values)
    wanted = torch.tensor([PROMPT + texts])
    plain: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **plain), wanted)
    assert torch.equal(loaded.generate(ids, use_cache=False, **plain), wanted)
    assert torch.equal(loaded.generate(ids, prefill_chunk_size=3, **plain), wanted)
    embeds = loaded.get_input_embeddings()(ids).detach()
    assert torch.equal(loaded.generate(inputs_embeds=embeds, **plain), wanted[:, len(PROMPT) :])


def test_beam_search_with_the_cache_equals_beam_search_without(loaded: Any) -> None:
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    plain: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    cached = loaded.generate(ids, attention_mask=mask, **plain)
    assert torch.equal(cached, loaded.generate(ids, attention_mask=mask, use_cache=False, **plain))
    assert cached.shape[0] == 4


def test_sampling_with_the_cache_equals_sampling_without(loaded: Any) -> None:
    ids = torch.tensor([PROMPT])
    plain: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "top_p": 0.9, "num_return_sequences": 3}
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(loaded.generate(ids, use_cache=use_cache, eos_token_id=None, **plain))
    assert torch.equal(*texts) and texts[0].shape == (3, len(PROMPT) + 8)


def test_eight_left_padded_rows_continue_as_the_rows_alone(loaded: Any) -> None:
    rows = eight_rows()
    ids, mask = padded(rows)
    wanted = alone(loaded, rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert continued(loaded, ids, attention_mask=mask) == wanted
    assert continued(loaded, ids, attention_mask=mask, position_ids=positions) == wanted
    assert continued(loaded, ids, attention_mask=mask, use_cache=False) == wanted
    assert continued(loaded, ids, attention_mask=mask, prefill_chunk_size=5) == wanted
    assert continued(loaded, ids, attention_mask=torch.ones_like(mask), position_ids=positions) == wanted


def test_the_pipeline_takes_a_batch(folder: str, loaded: Any) -> None:
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    pipe = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
    texts = ["w1 w2 w3 w4", "w9"]
    said = [out[0]["generated_text"] for out in pipe(texts, batch_size=2, **GREEDY)]
    assert said == [pipe(text, **GREEDY)[0]["generated_text"] for text in texts]
    assert all(s.startswith(t) and len(s.split()) > len(t.split()) for s, t in zip(said, texts, strict=True))


def test_threads_share_a_model_and_streamers_say_what_generate_does(folder: str, loaded: Any) -> None:
    from transformers import AutoTokenizer, TextIteratorStreamer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    rows = eight_rows()[:4]
    wanted = [tokenizer.decode(ids) for ids in alone(loaded, rows)]
    states = [loaded(torch.tensor([row]), output_hidden_states=True).hidden_states for row in rows]
    before = loaded(torch.tensor([PROMPT]), use_cache=True).past_key_values
    told, seen, wrong = [""] * 4, [()] * 4, []

    def work(i: int, streamer: Any) -> None:
        try:
            loaded.generate(torch.tensor([rows[i]]), streamer=streamer, **GREEDY)
            for _ in range(3):
                seen[i] = loaded(torch.tensor([rows[i]]), output_hidden_states=True).hidden_states
                fork, one = before.fork(), before.fork()
                for token in rows[i]:  # forks of one past, of which no thread may see another's
                    fork_out = loaded(torch.tensor([[token]]), past_key_values=fork).logits
                one_out = loaded(torch.tensor([rows[i]]), past_key_values=one).logits[:, -1:]
                assert relative(fork_out, one_out) < 1e-4
        except BaseException as error:  # a thread's own failure would pass unseen
            wrong.append(error)

    with torch.no_grad():
        streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60) for _ in rows]
        threads = [threading.Thread(target=torch.no_grad()(work), args=(i, s)) for i, s in enumerate(streamers)]
        for thread in threads:
            thread.start()
        told = ["".join(streamer) for streamer in streamers]
        for thread in threads:
            thread.join()
    assert not wrong, wrong
    assert told == wanted
    for ours, theirs in zip(states, seen, strict=True):
        assert len(ours) == len(theirs) and all(relative(b, a) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_what_a_state_cannot_do_is_refused(loaded: Any) -> None:
    ids = torch.tensor([PROMPT])
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        loaded.generate(ids, prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        loaded.generate(ids, assistant_model=loaded, **GREEDY)
    with pytest.raises(ValueError, match="cannot be cut back"):
        loaded(ids, use_cache=True).past_key_values.crop(3)
    with pytest.warns(UserWarning, match="'quantized' is ignored"):
        loaded.generate(ids, cache_implementation="quantized", **GREEDY)


# ---- the cache ---------------------------------------------------------------------------------------------------


def test_the_memory_of_a_linear_model_does_not_grow(loaded: Any) -> None:
    sizes = []
    with torch.no_grad():
        for length in (10, 1000):
            cache = loaded(torch.randint(61, (1, length)), use_cache=True).past_key_values
            sizes.append(cache.nbytes())
            assert cache.get_seq_length() == length
            assert loaded.generate(torch.randint(61, (1, length)), **GREEDY).shape[1] == length + 8
    if is_linear(loaded):
        assert sizes == [2 * 4 * 8 * 8 * 4] * 2  # layers, heads, K, V, bytes of a float32
    else:
        assert sizes[1] > sizes[0]


def test_a_prompt_is_read_once_and_asked_many_times(loaded: Any) -> None:
    document, questions = torch.randint(2, 61, (1, 20)), [[4, 9], [33]]
    plain: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        read = loaded(document, use_cache=True).past_key_values
        for question in questions:
            whole = torch.cat((document, torch.tensor([question])), 1)
            answer = loaded.generate(whole, past_key_values=copy.deepcopy(read), **plain)
            assert torch.equal(answer, loaded.generate(whole, **plain))
        wide = read.fork()
        wide.batch_repeat_interleave(3)
        assert read.get_seq_length() == 20 and wide.nbytes() == 3 * read.nbytes()
        rows = loaded(torch.tensor([[4], [9], [33]]), past_key_values=wide).logits
        assert relative(rows[1:2], loaded(torch.tensor([[9]]), past_key_values=read).logits) < 1e-5


def test_questions_about_a_document_in_every_way(loaded: Any) -> None:
    """Whole texts, new tokens alone, a batch of questions, several answers, beams: all equal reading it all again."""
    document, questions = torch.randint(2, 61, (1, 20)), [[4, 9, 31], [33], [7, 7]]
    with torch.no_grad():
        read = loaded(document, use_cache=True).past_key_values
    wholes = [torch.cat((document, torch.tensor([q])), 1) for q in questions]
    wanted = [continued(loaded, whole)[0] for whole in wholes]
    assert [continued(loaded, w, past_key_values=read.fork())[0] for w in wholes] == wanted
    for question, answer in zip(questions, wanted, strict=True):
        mask = torch.ones(1, 20 + len(question))
        alone = continued(loaded, torch.tensor([question]), attention_mask=mask, past_key_values=read.fork())
        assert alone == [answer]
    ids, mask = padded(questions)
    mask = torch.cat((torch.ones(3, 20, dtype=mask.dtype), mask), 1)
    wide = read.fork()
    wide.batch_repeat_interleave(3)
    assert continued(loaded, ids, attention_mask=mask, past_key_values=wide) == wanted
    whole, beams = wholes[0], {"num_beams": 3, "num_return_sequences": 2}
    assert continued(loaded, whole, past_key_values=read.fork(), **beams) == continued(loaded, whole, **beams)
    drawn = []
    for given in ({}, {"past_key_values": read.fork()}):
        torch.manual_seed(5)
        drawn.append(continued(loaded, whole, do_sample=True, num_return_sequences=3, **given))
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3
    assert read.get_seq_length() == 20 and read.rows == 1
    for wrong in (document, torch.tensor([[4, 9]])):  # nothing new; new tokens without their mask
        with pytest.raises(ValueError, match="the cache holds 20 tokens"):
            loaded.generate(wrong, past_key_values=read.fork(), **GREEDY)


def test_a_conversation_goes_on_from_its_cache(loaded: Any) -> None:
    text, cache = torch.tensor([PROMPT]), None
    for turn in ([4, 9, 31], [12], [50, 51]):
        text = torch.cat((text, torch.tensor([turn])), 1)
        wanted = loaded.generate(text, **GREEDY)
        out = loaded.generate(text, past_key_values=cache, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(out.sequences, wanted)
        text, cache = out.sequences, out.past_key_values


def test_a_saved_cache_is_restored(loaded: Any, tmp_path: Path) -> None:
    rows = eight_rows()
    ids, mask = padded(rows)
    path = tmp_path / "read.safetensors"
    with torch.no_grad():
        read = loaded(ids, attention_mask=mask, use_cache=True).past_key_values
        read.save(path)
        again = loaded.load_cache(path)
        assert again.get_seq_length() == 12 and again.rows == 8 and again.nbytes() == read.nbytes()
        for name, value in read.past.tensors().items():
            assert torch.equal(again.past.tensors()[name], value) and again.past.tensors()[name].dtype == value.dtype
        more = torch.randint(2, 61, (8, 5))
        whole = loaded(torch.cat((ids, more), 1), attention_mask=torch.cat((mask, torch.ones_like(more)), 1))
        assert relative(loaded(more, past_key_values=again).logits, whole.logits[:, 12:]) < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["read.safetensors"]
    again = loaded.load_cache(path)
    whole = torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    wanted = continued(loaded, whole[0], attention_mask=whole[1])
    assert continued(loaded, whole[0], attention_mask=whole[1], past_key_values=again) == wanted


def test_a_file_that_is_not_this_models_cache_is_refused(
    folders: dict[str, str], load: Callable[..., Any], tmp_path: Path
) -> None:
    linear, softmax = (load(str(folders[name])) for name in ("linear_gqa_qk_norm", "softmax_of_another_family"))
    read = linear(torch.tensor([PROMPT]), use_cache=True).past_key_values
    path = tmp_path / "read.safetensors"
    read.save(path)
    with pytest.raises(ValueError, match="is the cache of another model: its attn_"):
        softmax.load_cache(path)
    with pytest.raises(ValueError, match="cannot be read as a saved cache"):
        linear.load_cache(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="is not a saved cache"):
        linear.load_cache(Path(str(folders["linear_gqa_qk_norm"])) / "model.safetensors")
    with pytest.raises(ValueError, match="there is nothing to save"):
        type(read)().save(path)
    with pytest.raises(ValueError, match="the cache holds 1 row and the input 2"):
        linear(torch.tensor([[3], [4]]), past_key_values=read)
    # Two exports have a class each, so that the one does not even know the other's cache.
    with pytest.raises(ValueError, match="the cache of another model|must be a cache that this model returned"):
        softmax(torch.tensor([[3]]), past_key_values=read)


# ---- compiled steps ----------------------------------------------------------------------------------------------


def compile_here(**options: Any) -> Any:
    """A CompileConfig that compiles on the CPU too, without a C++ compiler."""
    from transformers import CompileConfig

    config = CompileConfig(backend="aot_eager", mode=None, **options)
    config._compile_all_devices = True
    return config


@pytest.mark.filterwarnings("ignore:cache_implementation='static' is ignored")
def test_a_static_cache_gives_the_same_text_compiled_or_not(loaded: Any) -> None:
    torch._dynamo.reset()
    rows = eight_rows()[:3]
    ids, mask = padded(rows)
    wanted = alone(loaded, rows)
    static = {"attention_mask": mask, "cache_implementation": "static", "disable_compile": True}
    assert continued(loaded, ids, **static) == wanted
    compiled = static | {"compile_config": compile_here(fullgraph=True), "disable_compile": False}
    assert continued(loaded, ids, **compiled) == wanted
    assert hasattr(loaded, "_compiled_call") == is_linear(loaded)
    beams = {"num_beams": 3, "num_return_sequences": 3}
    wanted = continued(loaded, ids, attention_mask=mask, **beams)
    assert continued(loaded, ids, **static, **beams) == wanted
    with pytest.raises(ValueError, match="give either past_key_values or cache_implementation"):
        cache = loaded(torch.tensor([PROMPT]), use_cache=True).past_key_values
        loaded.generate(torch.tensor([[*PROMPT, 3]]), past_key_values=cache, cache_implementation="static", **GREEDY)


def test_decode_steps_are_one_graph_that_copies_nothing_from_the_cpu(loaded: Any) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    rows = eight_rows()[:3]
    ids, mask = padded(rows)
    with torch.no_grad():
        eager = loaded(ids, attention_mask=mask, use_cache=True).past_key_values
        if not is_linear(loaded):
            growing = eager.fork(static=True)
            with pytest.raises(ValueError, match="cannot hold what grows"):
                loaded(ids[:, :1], past_key_values=growing)
            return
        static, place = eager.fork(static=True), []
        step = torch.compile(loaded.__call__, backend=backend, fullgraph=True)
        for _ in range(4):
            token = torch.randint(2, 61, (3, 1))
            wanted = loaded(token, past_key_values=eager).logits
            assert relative(step(token, past_key_values=static, use_cache=True).logits, wanted) < 1e-6
            place.append({x.data_ptr() for x in static.past.tensors().values()})
        assert static.get_seq_length() == eager.get_seq_length() == 16
        other = static.fork()
        static.reorder_cache(torch.tensor([2, 0, 0]))
        eager.reorder_cache(torch.tensor([2, 0, 0]))
        wanted = loaded(token, past_key_values=eager).logits
        assert relative(step(token, past_key_values=static, use_cache=True).logits, wanted) < 1e-6
        place.append({x.data_ptr() for x in static.past.tensors().values()})
    assert len(graphs) == 1 and all(p == place[0] for p in place)
    assert other.get_seq_length() == 16 and not place[0] & {x.data_ptr() for x in other.past.tensors().values()}
    assert not [n for n in graphs[0].graph.nodes if n.target in (torch.tensor, torch.as_tensor)]
    static.reset()
    assert static.get_seq_length() == static.nbytes() == 0


@pytest.mark.skipif(not EXPORTS, reason="tracing takes seconds, and once is enough")
@pytest.mark.parametrize("name", ["linear_gqa_qk_norm", "softmax_gqa_tied"])
def test_the_compiled_model_trains_and_scores_as_the_plain_one(
    name: str, folders: dict[str, str], load: Callable[..., Any]
) -> None:
    torch._dynamo.reset()
    loaded = load(folders[name])
    rows = eight_rows()[:3]
    ids, mask = padded(rows, "right")
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for model in (loaded, torch.compile(loaded, backend="eager")):
        loaded.zero_grad()
        out = model(ids, attention_mask=mask, labels=labels, use_cache=False)
        out.loss.backward()
        found.append((out.logits.detach(), torch.cat([p.grad.flatten() for p in loaded.parameters()])))
    assert relative(found[1][0][mask.bool()], found[0][0][mask.bool()]) < 1e-5
    assert relative(found[1][1], found[0][1]) < 1e-4


# ---- loading, devices, training ------------------------------------------------------------------------------------


def test_device_maps_and_dtypes(folder: str, load: Callable[..., Any], tmp_path: Path) -> None:
    ids = torch.tensor([PROMPT])
    plain = load(folder)
    wanted, logits = continued(plain, ids), plain(ids).logits
    split = {"model.tok_embeddings": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    if not plain.config.tie_word_embeddings:
        split["model.output"] = "disk"
    for place in ("auto", {"": "cpu"}, split):
        model = load(folder, device_map=place, offload_folder=tmp_path / "offload")
        assert continued(model, ids) == wanted
        assert relative(model(ids).logits, logits) < 1e-6
    assert any(p.device.type == "meta" for p in model.parameters())  # on disk between the calls
    assert load(folder, dtype="auto").dtype == torch.float32
    half = load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and not list(half.buffers())
    with torch.no_grad():
        out = half(ids, use_cache=True)
    assert relative(out.logits, logits) < 5e-2
    assert half.generate(ids, **GREEDY).shape == (1, len(PROMPT) + 8)
    cache = tmp_path / "half.safetensors"
    out.past_key_values.save(cache)
    dtypes = {x.dtype for x in half.load_cache(cache).past.tensors().values() if x.is_floating_point()}
    assert dtypes == {torch.float32 if is_linear(half) else torch.bfloat16}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer transformers call it activation checkpointing
def test_transformers_own_trainer_trains_it(loaded: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    row = torch.randint(2, 61, (12,)).tolist()
    data = [{"input_ids": row, "labels": row}] * 24
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(tmp_path), num_train_epochs=1, gradient_checkpointing=True, **options, **quiet)
    trainer = Trainer(loaded.train(), args, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loaded.is_gradient_checkpointing and len(losses) == 6 and losses[-1] < 0.8 * losses[0]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer transformers call it activation checkpointing
def test_activation_checkpointing_changes_no_gradient(loaded: Any) -> None:
    ids = torch.tensor([PROMPT])
    gradients = []
    for switch in ("disable", "enable"):
        getattr(loaded, f"gradient_checkpointing_{switch}")()
        assert loaded.model.grad_checkpointing == (switch == "enable") == loaded.is_gradient_checkpointing
        loaded.train().zero_grad()
        loaded(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in loaded.parameters()]))
    assert relative(*gradients) < 1e-6


def test_the_vocabulary_can_grow(loaded: Any, tmp_path: Path) -> None:
    before = loaded(torch.tensor([PROMPT])).logits.detach()
    loaded.resize_token_embeddings(70, mean_resizing=False)
    after = loaded(torch.tensor([[*PROMPT, 69]])).logits
    assert loaded.config.vocab_size == loaded.model.config.vocab_size == 70
    assert relative(after[:, :-1, :61], before) < 1e-6 and after.isfinite().all()
    loaded.save_pretrained(tmp_path)
    again = type(loaded).from_pretrained(tmp_path)
    assert torch.equal(again(torch.tensor([[*PROMPT, 69]])).logits, after)


def test_save_and_load_round_trip(loaded: Any, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    again, info = type(loaded).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))
    assert again.config.to_model_config() == loaded.config.to_model_config()
    assert again.generation_config.eos_token_id == 1 and again.generation_config.pad_token_id == 0


# ---- the page ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not EXPORTS, reason="where the package is, its own class is loaded")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_python_block_of_the_docs_runs(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parent.parent / "docs" / "transformers.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    (tmp_path / "my-model").symlink_to(folders["linear"])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert len(blocks) >= 9 and (tmp_path / "my-tuned-model" / "model.safetensors").exists()
    assert type(names["model"]).__module__.startswith("transformers_modules.")
    assert names["answers"].shape[0] == 2 and names["static"].static and names["read"].get_seq_length() == 9
