"""transformers' server on a model of ours, asked by OpenAI's client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from open_lm_linear import serve
from open_lm_linear.cli import UserError
from open_lm_linear.hf.wrap import wrap
from open_lm_linear.model import create_model

LETTERS = [chr(code) for code in range(33, 127)] + ["Ġ"]  # ASCII as byte-level tokenizers spell it, Ġ the space
WORDS = ["<pad>", "<s>", "</s>", *LETTERS]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}>"
PROMPTS = [
    "one",
    "the second prompt is longer",
    "3",
    "a fourth",
    "5 five",
    "six, which goes on and on and on",
    "7?",
    "h",
]
ANSWER = 24


def letters(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, whose text and tokens tell each other exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **special)


def export(folder: Path, template: str | None = TEMPLATE) -> Path:
    torch.manual_seed(3)
    model = create_model(tiny("linear", vocab_size=len(WORDS))).eval()
    wrap(model, tokenizer=letters(template)).save_pretrained(folder)
    letters(template).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as probe:
        return probe.getsockname()[1]


class Server:
    """`python -m open_lm_linear.serve` on an export, in a process of its own."""

    def __init__(self, scratch: Path) -> None:
        self.export, self.temporary, self.port = export(scratch / "tiny"), scratch / "temporary", free_port()
        self.temporary.mkdir()
        self.log = (scratch / "log").open("w+")
        command = [sys.executable, "-m", "open_lm_linear.serve", str(self.export), "--port", str(self.port)]
        environment = {**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=self.log, stderr=subprocess.STDOUT, env=environment
        )

    def wait(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.said()
            try:
                with urllib.request.urlopen(f"http://localhost:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"no server after two minutes:\n{self.said()}")

    def said(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("serve"))
    try:
        made.wait()
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        made.log.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    from openai import OpenAI

    with OpenAI(base_url=f"http://localhost:{server.port}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def complete(client: Any, prompt: str, **options: Any) -> str:
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=ANSWER, **options).choices[0].text


def chat(client: Any, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=ANSWER, temperature=0)
    return answer.choices[0].message.content


def streamed(client: Any, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    options = {"max_tokens": ANSWER, "temperature": 0, "stream": True}
    chunks = client.chat.completions.create(model="tiny", messages=messages, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def generated(folder: Path, text: str) -> str:
    """What follows the prompt when the model is asked without a server."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=ANSWER, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True)


def test_eight_concurrent_requests_are_each_as_if_alone(server: Server, client: Any) -> None:
    alone = [complete(client, prompt, temperature=0) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt, temperature=0), PROMPTS))
    assert together == alone == [generated(server.export, prompt) for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)


def test_chats_streamed_and_whole_at_once_are_each_as_if_alone(server: Server, client: Any) -> None:
    alone = [generated(server.export, f"[user] {prompt} >") for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit((chat, streamed)[i % 2], client, prompt) for i, prompt in enumerate(PROMPTS)]
    assert [job.result() for job in jobs] == alone


def test_temperature_is_what_openai_means(client: Any) -> None:
    """1 where none is given, and not the likeliest token, as it would be by transformers' defaults."""
    drawn = {complete(client, "one") for _ in range(3)}
    warm = {complete(client, "one", temperature=0.9) for _ in range(3)}
    assert len(drawn) == len(warm) == 3


def test_the_client_sees_one_model_and_no_other(client: Any) -> None:
    from openai import BadRequestError

    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(BadRequestError) as raised:
        client.completions.create(model="gpt-4", prompt="a")
    assert "pinned to 'tiny'" in raised.value.response.text


def test_a_terminated_server_leaves_nothing_behind(server: Server) -> None:
    """The last of those that use the server."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0, server.said()
    assert "Traceback" not in server.said()
    assert list(server.temporary.iterdir()) == []


# ---- the folder, without a server ----------------------------------------------------------------------------------


def laid_out(folder: Path, source: Path, **options: Any) -> Path:
    serve._lay_out(serve.ServeArgs(str(source), **options), folder, "cpu")
    return folder


def test_an_export_is_read_and_never_written(tmp_path: Path) -> None:
    source = export(tmp_path / "export", template=None)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    folder = laid_out(tmp_path / "served", source)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert (folder / "model.safetensors").is_symlink()
    settings = json.loads((folder / "generation_config.json").read_text())
    assert (settings["do_sample"], settings["top_k"], settings["eos_token_id"]) == (True, 0, 2)


def test_a_model_without_a_chat_template_gets_a_plain_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = laid_out(tmp_path / "served", export(tmp_path / "export", template=None))
    assert "has no chat template" in capsys.readouterr().out
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False) == "a\nb"


def test_the_plain_template_begins_as_the_tokenizer_does() -> None:
    from tokenizers import processors

    tokenizer = letters(None)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = serve._plain_template(tokenizer)
    messages = [{"role": "user", "content": "a"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer("a")["input_ids"] == [1, WORDS.index("a")]


def test_a_chat_template_given_comes_before_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}!")
    options = {"chat_template": str(tmp_path / "t.jinja")}
    folder = laid_out(tmp_path / "served", export(tmp_path / "export"), **options)
    messages = [{"role": "user", "content": "a"}]
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False) == "a!"


def test_what_is_no_export_is_written_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=64)).eval()
    theirs.save_pretrained(tmp_path / "llama")
    letters().save_pretrained(tmp_path / "llama")
    served = AutoModelForCausalLM.from_pretrained(laid_out(tmp_path / "served", tmp_path / "llama"))
    assert "is no Hugging Face export" in capsys.readouterr().out
    assert type(served).__name__ == "OpenLMLinearForCausalLM"
    ids = torch.tensor([[5, 17, 3, 42]])
    assert relative(served(ids).logits, theirs(ids).logits) < 1e-5


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    source = export(tmp_path / "export")
    (source / "config.json").write_text("{")
    letters().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="config.json of .* is not JSON"):
        laid_out(tmp_path / "served", source, tokenizer=str(tmp_path / "tokenizer"))


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_refused_before_loading(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at localhost:{port}: .*give another --port"):
            serve.run(serve.ServeArgs(str(tmp_path), port=port))
    with pytest.raises(UserError, match="--port 70000 is not a port"):
        serve.run(serve.ServeArgs(str(tmp_path), port=70000))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'open_lm_linear\[serve\]'"):
        serve.run(serve.ServeArgs("anything"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "a@b"}, "--name 'a@b'"),
        ({"device": "toaster"}, "--device 'toaster' is not a device"),
        ({"chat_template": "/no/such.jinja"}, "--chat-template /no/such.jinja cannot be read"),
        ({}, "holds no checkpoint"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, options: dict[str, str], sentence: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UserError, match=sentence) as raised:
            serve.run(serve.ServeArgs(str(tmp_path), port=free_port(), **options))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "\n" not in str(raised.value)
