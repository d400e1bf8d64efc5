"""Answers from an endpoint: a real HTTP server that fails and replies as OpenAI-compatible ones do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from looper_eval.cli import main
from looper_eval.endpoint import API_KEY_VARIABLE, EndpointEngine
from looper_eval.engines import Answer, Ask, cut_at_stop, encode, require_chat_template, require_whole
from looper_eval.models import ModelSpec
from looper_eval.settings import Shot, resolve_settings
from looper_schemas.prompt import format_prompt
from looper_trainer.errors import UserError


class Server(ThreadingHTTPServer):
    """Replies 42 to everything; fails the first `failures` requests with `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.status = 0, 503
        self.refuse_from, self.newer = 10**6, False
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        self.reply: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1#tiny"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        if (
            len(self.server.requests) <= self.server.failures
            or len(self.server.requests) >= self.server.refuse_from
        ):
            self.send_error(self.server.status)
            return
        if self.server.newer and "max_tokens" in body:
            self.send_error(400, "use max_completion_tokens")
            return
        asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        text = f"You asked {len(asked)} characters.\nAnswer: #### 42"
        choice = {"finish_reason": "length" if "long" in asked else "stop"}
        choice |= {"message": {"content": text}} if "messages" in body else {"text": text}
        reply = self.server.reply or {"choices": [choice], "usage": {"completion_tokens": 11}}
        payload = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def ask(server: Server, preset: str, *questions: str) -> list[Answer]:
    engine = EndpointEngine(ModelSpec("m", server.url), resolve_settings(preset), concurrency=3)
    try:
        asks = [Ask(question, (seed,)) for seed, question in enumerate(questions)]
        found = dict(pair for group in engine.answers([asks]) for pair in group)
        return [answer for place in range(len(asks)) for answer in found[place]]
    finally:
        engine.close()


def test_completions_get_the_projects_prompt_and_keep_their_order(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    questions = ["1?", "a long one?", "three?"]
    answers = ask(server, "looper", *questions)
    lengths = [len(format_prompt(question)) for question in questions]
    assert [one.text.split()[2] for one in answers] == [str(n) for n in lengths]
    assert [one.finish_reason for one in answers] == ["stop", "length", "stop"]
    assert {one.tokens_out for one in answers} == {11}
    for path, body, authorization in server.requests:
        assert (path, authorization) == ("/v1/completions", "Bearer secret")
        assert body["temperature"] == 0
        assert (body["model"], body["max_tokens"]) == ("tiny", 256)


def test_chat_presets_use_the_chat_route(server: Server) -> None:
    ask(server, "deepseek-r1", "What is 6 * 7?")
    path, body, authorization = server.requests[0]
    assert (path, authorization) == ("/v1/chat/completions", None)
    assert body["messages"][0]["role"] == "user"
    assert (body["temperature"], body["top_p"]) == (0.6, 0.95)


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(server: Server) -> None:
    server.failures = 2
    (answer,) = ask(server, "looper", "What?")
    assert answer.text.endswith("#### 42")
    assert len(server.requests) == 3
    server.failures, server.status = 99, 401
    with pytest.raises(UserError, match="the endpoint answers 401"):
        ask(server, "looper", "What?")
    assert len(server.requests) == 4


def test_an_outage_is_one_line_that_names_the_model(server: Server, tmp_path: Path) -> None:
    server.failures = 3
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "What?", "answer": "#### 42"}\n')
    call = ["run", "--model", f"m={server.url}", "--dataset", str(questions), "--out", str(tmp_path / "out")]
    done = subprocess.run(  # a process of its own: pytest takes what libraries log
        [sys.executable, "-m", "looper_eval.cli", *call], capture_output=True, text=True, check=True
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("model m: Server error '503 Service Unavailable' for url")
    assert line.endswith("; trying again")


@pytest.mark.parametrize("reply", [{"error": "x"}, {"choices": []}, [1], {"choices": [{"index": 0}]}])
def test_a_reply_of_another_shape_is_refused_and_never_an_empty_answer(server: Server, reply: Any) -> None:
    server.reply = reply
    with pytest.raises(UserError, match="not an OpenAI completion"):
        ask(server, "looper", "What?")


def test_answers_end_at_the_first_stop_string() -> None:
    answer = Answer("It is 4.\n\nQ: Next? A: 5", "length", 12)
    assert cut_at_stop(answer, ("</s>", "Q:")) == Answer("It is 4.\n\n", "stop", 12)
    assert cut_at_stop(answer, ("###",)) == answer
    assert cut_at_stop(answer, ()) == answer


def test_a_whole_run_against_an_endpoint_counts_what_it_answered(server: Server, tmp_path: Path) -> None:
    data, out = tmp_path / "q.jsonl", tmp_path / "out"
    rows = [("Is it 42?", 42), ("Is it long?", 42), ("Is it 7?", 7)]
    data.write_text("".join(json.dumps({"question": q, "answer": f"#### {a}"}) + "\n" for q, a in rows))
    assert main(["run", "--model", f"m={server.url}", "--dataset", str(data), "--out", str(out)]) == 0
    (model,) = json.loads((out / "summary.json").read_text())["models"]
    assert (model["correct"], model["wrong"], model["truncated"], model["tokens_max"]) == (1, 1, 1, 11)
    assert len(server.requests) == 3
    assert main(["run", "--model", f"m={server.url}", "--dataset", str(data), "--out", str(out)]) == 0
    assert len(server.requests) == 3


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


def test_a_chat_template_gets_system_prompt_examples_and_question_as_turns(
    tiny_models: tuple[Path, Path],
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models[0])
    settings = resolve_settings(
        "deepseek-r1", system="Be brief.", shots=(Shot(question="1 + 1?", solution="Add.", answer="2"),)
    )
    with pytest.raises(UserError, match="no chat template"):
        require_chat_template(tokenizer, settings)
    tokenizer.chat_template = CHAT
    require_chat_template(tokenizer, settings)
    asked = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    text = (
        f"<system>Be brief.\n<user>{asked.format('1 + 1?')}\n<assistant>Add.\nAnswer: #### 2\n"
        f"<user>{asked.format('2 + 2?')}\n<assistant><think>\n"
    )
    ids = encode(tokenizer, settings, "2 + 2?", frozenset())
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_service_that_knows_the_limit_by_its_newer_name_is_asked_by_that(server: Server) -> None:
    server.newer = True
    answers = ask(server, "looper", "One?", "Two?")
    assert all(one.text.endswith("#### 42") for one in answers)
    assert {("max_completion_tokens" in body) for _, body, _ in server.requests[-1:]} == {True}


def test_answers_that_came_before_a_failure_are_handed_over_first(server: Server) -> None:
    engine = EndpointEngine(ModelSpec("m", server.url), resolve_settings("looper"), concurrency=1)
    server.refuse_from, server.status = 3, 401
    answers = engine.answers([[Ask(f"{n}?", (n,)) for n in range(6)]])
    assert [place for _ in range(2) for place, _ in next(answers)] == [0, 1]
    with pytest.raises(UserError, match="401"):
        next(answers)
    engine.close()


def test_files_that_no_loader_reads_do_not_make_a_model_less_than_whole(
    tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    pointer = "version https://git-lfs.github.com/spec/v1\n"  # what a clone without git-lfs leaves
    single = shutil.copytree(tiny_models[0], tmp_path / "single")
    model = AutoModelForCausalLM.from_pretrained(single)
    sharded = shutil.copytree(single, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(sharded, max_shard_size="50KB")
    pickled = shutil.copytree(single, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (single / "model.safetensors.index.json").write_text("[]")
    for folder in (single, sharded, pickled):
        (folder / "consolidated.safetensors").write_text(pointer)
        require_whole(ModelSpec("m", str(folder)))
        AutoModelForCausalLM.from_pretrained(folder)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1

    adapter = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(adapter))
    (adapter / "value_head.safetensors").write_text(pointer)
    spec = ModelSpec("m", f"{adapter}@{tiny_models[0]}")
    require_whole(spec)
    (adapter / "adapter_model.safetensors").write_text(pointer)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is no whole file of weights"):
        require_whole(spec)
