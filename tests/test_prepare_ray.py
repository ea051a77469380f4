"""Preparation as tasks of Ray. Where ray is installed: ``pip install ray``; it is large, and not in the dev extra."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from prepare_run import SMALL, config, contents, jsonl, stand_in, texts

from open_lm_linear.cli import UserError
from open_lm_linear.data.prepare import prepare


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_lm_linear.pretrained", stand_in())
    for (module, name), value in SMALL.items():
        monkeypatch.setattr(module, name, value)


def test_a_missing_ray_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts()))
    with pytest.raises(UserError, match="--engine ray needs the package `ray`, which is not installed: pip install"):
        prepare(config(str(tmp_path / "a.jsonl"), tmp_path / "out", engine="ray"))
    assert not (tmp_path / "out" / ".work").exists()


def test_ray_writes_the_same_bytes_and_the_same_errors(tmp_path: Path, monkeypatch: Any) -> None:
    ray: Any = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts()))
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts()) + b"5\n")
    prepare(config(str(tmp_path / "a.jsonl"), tmp_path / "here"))
    ended: list[bool] = []
    with monkeypatch.context() as patch:  # to start a cluster takes long: the first one's is kept for the second
        patch.setattr(ray, "shutdown", lambda: ended.append(True))
        prepare(config(str(tmp_path / "a.jsonl"), tmp_path / "ray", engine="ray", workers=1))
        assert contents(tmp_path / "ray") == contents(tmp_path / "here")
        assert ended == [True] and ray.is_initialized()
        with pytest.raises(UserError, match=r"b\.jsonl line 301 is not a JSON object") as caught:
            prepare(config(str(tmp_path / "b.jsonl"), tmp_path / "bad", engine="ray"))
        assert "\n" not in str(caught.value)
        assert ended == [True]  # a cluster that was there before stays
    ray.shutdown()
