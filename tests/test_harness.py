"""A run asked by lmms-eval's requests; its classes are stood in for, since it is not installed here."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests import tiny
from vlmlab.loading import LoadedModel

PICTURES = [Image.fromarray(tiny.picture(k)) for k in (1, 2)]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Messages(SimpleNamespace):
        def model_dump(self) -> dict[str, Any]:
            return {"messages": self.messages}

    there = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {},
        "lmms_eval.api.model": {"lmms": type("lmms", (), {"is_simple": True})},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "lmms_eval.protocol": {"ChatMessages": Messages},
    }  # fmt: skip
    for name, attributes in there.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vlmlab.harness", raising=False)
    yield importlib.import_module("vlmlab.harness")
    sys.modules.pop("vlmlab.harness", None)


def message(role: str, *parts: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "url": p} for p in parts]
    return {"role": role, "content": content}


def test_requests_are_answered_as_the_lab_answers(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    collate = {"max_length": 512, "pack_length": None, "questions": "whole"}
    loaded = LoadedModel(tiny.vlm(), OmegaConf.create({"collate": collate}))
    monkeypatch.setattr(harness, "load", lambda run, **options: loaded)
    found = harness.manifest()
    assert found.model_id == "vlmlab" and found.chat_class_path == "vlmlab.harness.VlmlabChat"
    model = harness.VlmlabChat("run", device="cuda:0", batch_size="4", max_batch_size=None)
    assert not model.is_simple
    docs = [
        [message("user", PICTURES[0], "what colour")],
        [message("system", "yes"), message("user", "see ", PICTURES[0], PICTURES[1], " what")],
        [message("user", PICTURES[1], "how many"), message("assistant", "two"), message("user", "what")],
    ]
    model.task_dict = {"task": {"test": docs}}
    settings = {"max_new_tokens": 5, "temperature": 0, "do_sample": False, "until": ["\n\n"], "top_p": None}
    requests = [SimpleNamespace(args=("", lambda doc: doc, settings, k, "task", "test")) for k in range(3)]
    assert model.generate_until(requests) == [
        loaded.generate(PICTURES[0], "what colour", max_new_tokens=5),
        loaded.generate(PICTURES, "see <image><image> what", max_new_tokens=5, system="yes"),
        loaded.generate(PICTURES[1], "what", max_new_tokens=5, history=[("<image>how many", "two")]),
    ]
    with pytest.raises(Exception, match="chat models are given no options; add --force_simple"):
        model.loglikelihood(requests)
    docs[0] = [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}]
    with pytest.raises(Exception, match="a question has a video; vlmlab reads text and images"):
        model.generate_until(requests[:1])


def test_options_by_the_older_interface(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lmms-eval 0.7 sends them: one request an option, and the lowest number wins; a called target is no option."""
    collate = {"max_length": 512, "pack_length": None, "questions": "whole"}
    loaded = LoadedModel(tiny.vlm(), OmegaConf.create({"collate": collate}))
    monkeypatch.setattr(harness, "load", lambda run, **options: loaded)
    assert harness.manifest().simple_class_path == "vlmlab.harness.VlmlabSimple"
    model = harness.VlmlabSimple("run")
    assert model.is_simple
    model.task_dict = {"task": {"test": [{"image": PICTURES[0], "target": "red"}, {"image": None, "target": "blue"}]}}
    visuals = lambda doc: [doc["image"]] if doc["image"] else []  # noqa: E731

    def request(text: str, what: Any, index: int) -> SimpleNamespace:
        return SimpleNamespace(args=(text, what, visuals, index, "task", "test"))

    options = ["red", "two green squares", "no"]
    asked = [request("what colour", f" {option}", 0) for option in options] + [request("is there", " yes", 1)]
    read: list[int] = []
    see = loaded.model.see
    monkeypatch.setattr(loaded.model, "see", lambda batch: read.append(len(batch.input_ids)) or see(batch))
    found = model.loglikelihood(asked)
    assert read == [1, 1], "the options of one question are read together"
    logs = [*loaded.likelihood(PICTURES[0], "what colour", options), *loaded.likelihood(None, "is there", ["yes"])]
    assert [number for number, _ in found] == [-log for log in logs] and min(found[:3])[0] == -max(logs[:3])
    assert [greedy for _, greedy in found] == [False] * 4
    (perplexity,) = model.loglikelihood([request("what colour", lambda doc: doc["target"], 0)])
    assert perplexity[0] == pytest.approx(logs[0], abs=1e-4)
    settings = {"max_new_tokens": 5, "until": ["\n\n"]}
    said = [SimpleNamespace(args=("what colour", settings, visuals, k, "task", "test")) for k in (0, 1)]
    assert model.generate_until(said) == [
        loaded.generate(PICTURES[0], "what colour", max_new_tokens=5),
        loaded.generate(None, "what colour", max_new_tokens=5),
    ]
    with pytest.raises(Exception, match="an option comes without its question"):
        model.loglikelihood([SimpleNamespace(args=("", "red"))])
    model.task_dict["task"]["test"][1] = {"image": "film.mp4"}
    with pytest.raises(Exception, match="a question has a str that is not an image; vlmlab reads text and images"):
        model.loglikelihood(asked[3:])
