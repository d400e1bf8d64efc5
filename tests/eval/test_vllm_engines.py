"""vLLM behind `looper-eval`: over HTTP against a server that speaks its dialect, and in this process.

`test_real_vllm_*` need LOOPER_VLLM_PYTHON: an interpreter with vLLM, scipy, stamina, sniffio, rich, jinja2.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from looper_eval.cli import main
from looper_eval.engines import Ask, EngineOptions, open_engine
from looper_eval.models import ModelSpec, identify, locate
from looper_eval.settings import Settings
from looper_trainer.errors import UserError

FAKE = Path(__file__).parents[1] / "trainer" / "vllm" / "fake_site" / "vllm" / "entrypoints" / "openai"
_spec = importlib.util.spec_from_file_location("fake_vllm_server", FAKE / "api_server.py")
assert _spec is not None
assert _spec.loader is not None
fake_vllm = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_vllm)

Models = tuple[Path, Path]
PYTHON = os.environ.get("LOOPER_VLLM_PYTHON")
real = pytest.mark.skipif(not PYTHON, reason="LOOPER_VLLM_PYTHON names no interpreter with vLLM")


@pytest.fixture
def server(tiny_models: Models) -> Iterator[Any]:
    with fake_vllm.FakeVLLM(model=str(tiny_models[0])) as running:
        yield running


def prompts_of(folder: Path, settings: Settings, questions: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(settings.prompt(question))["input_ids"] for question in questions]


def served(folder: Path, server: Any, settings: Settings, asks: list[Ask]) -> dict[int, list[Any]]:
    options = EngineOptions(vllm={"urls": server.url, "give_up_after_s": "5"})
    engine = open_engine(ModelSpec("m", str(folder)), settings, options)
    try:
        return dict(pair for group in engine.answers([asks[:2], asks[2:]]) for pair in group)
    finally:
        engine.close()


def test_answers_over_http_are_what_the_server_makes_of_prompt_and_seed(
    server: Any, tiny_models: Models
) -> None:
    settings = Settings(engine="vllm", temperature=0.7, max_new_tokens=6)
    questions = ["One?", "Two, and more?", "Three?"]
    asks = [Ask(question, (10 * n, 10 * n + 1)) for n, question in enumerate(questions)]
    found = served(tiny_models[0], server, settings, asks)
    for place, ids in enumerate(prompts_of(tiny_models[0], settings, questions)):
        for number, answer in enumerate(found[place]):
            wanted = fake_vllm.completion("base", ids, 10 * place + number, 6)
            assert (answer.text, answer.finish_reason) == (wanted["text"], wanted["finish"])
            assert answer.tokens_out == len(wanted["ids"])


def test_a_server_of_another_model_is_refused_before_it_is_asked(server: Any, tiny_models: Models) -> None:
    with pytest.raises(UserError, match=r"serves .*m0, not .*m1"):
        served(tiny_models[1], server, Settings(engine="vllm"), [Ask("Q?", (1,))])
    assert server.sampled() == []


def adapter_of(folder: Path, base: Path) -> Path:
    """A rank-2 LoRA adapter of `base` with weights that change its answers, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    model.save_pretrained(str(folder))
    return folder


def test_an_adapter_is_loaded_into_the_server_and_has_an_identity_of_its_own(
    server: Any, tiny_models: Models, tmp_path: Path
) -> None:
    adapter = adapter_of(tmp_path / "adapter", tiny_models[0])
    (adapter / "adapter_model.safetensors").write_text("other weights")  # what the fake server reads
    settings = Settings(engine="vllm", max_new_tokens=6)
    found = served(adapter, server, settings, [Ask("One?", (0,))])
    (ids,) = prompts_of(tiny_models[0], settings, ["One?"])
    assert found[0][0].text == fake_vllm.completion("other weights", ids, None, 6)["text"]
    assert [kind for kind, _ in server.log] == ["load", "unload"]


def test_an_adapter_answers_in_this_process_as_its_merged_model_does(
    tiny_models: Models, tmp_path: Path, dataset_file: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter, merged = adapter_of(tmp_path / "adapter", tiny_models[0]), tmp_path / "merged"
    base = AutoModelForCausalLM.from_pretrained(tiny_models[0], dtype=torch.float32)
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(tiny_models[0]).save_pretrained(merged)
    out = tmp_path / "out"
    call = [
        "run",
        "--dataset",
        str(dataset_file),
        "--out",
        str(out),
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
    ]
    models = [f"base={tiny_models[0]}", f"adapter={adapter}", f"named={adapter}@{tiny_models[0]}"]
    models += [f"merged={merged}"]
    assert main([*call, *(part for model in models for part in ("--model", model))]) == 0
    texts = {
        name: [json.loads(line)["output"] for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("base", "adapter", "named", "merged")
    }
    assert texts["adapter"] == texts["named"] == texts["merged"] != texts["base"]


def test_an_adapters_identity_follows_its_weights_and_its_base(tiny_models: Models, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", tiny_models[0])
    spec = ModelSpec("m", str(adapter))
    assert locate(spec) == (str(tiny_models[0]), adapter)
    mine, on_other = identify(spec), identify(ModelSpec("m", f"{adapter}@{tiny_models[1]}"))
    assert mine.startswith("adapter:")
    assert mine != on_other
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert identify(spec) not in (mine, on_other)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="write ADAPTER@BASE"):
        identify(spec)


class FakeEngine:
    """The part of vLLM's engine that is used: finishes requests in the reverse order of their coming."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any], Any, Any]] = []
        self.aborted: list[str] = []

    def add_request(self, name: str, prompt: dict[str, Any], params: Any, lora_request: Any = None) -> None:
        self.requests.append((name, prompt, params, lora_request))

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        name, prompt, params, _ = self.requests.pop()
        made = fake_vllm.completion("base", prompt["prompt_token_ids"], params.seed, params.max_tokens)
        output = types.SimpleNamespace(text=made["text"], finish_reason=made["finish"], token_ids=made["ids"])
        running = types.SimpleNamespace(request_id="other", finished=False, outputs=[])
        return [running, types.SimpleNamespace(request_id=name, finished=True, outputs=[output])]

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names


@pytest.fixture
def fake_module(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A module `vllm` whose `LLM` is a `FakeEngine`; gives the arguments each was made with."""
    made: list[Any] = []

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            made.append((arguments, self))
            self.llm_engine = FakeEngine()
            self.model = arguments["model"]

        def get_tokenizer(self) -> Any:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.model)

    module = types.ModuleType("vllm")
    module.LLM = LLM  # type: ignore[attr-defined]
    module.SamplingParams = lambda **values: types.SimpleNamespace(**values)  # type: ignore[attr-defined]
    parameters = types.ModuleType("vllm.sampling_params")
    parameters.RequestOutputKind = types.SimpleNamespace(FINAL_ONLY="final")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    return made


def test_in_process_answers_belong_to_their_prompts_and_seeds_whatever_ends_first(
    fake_module: list[Any], tiny_models: Models
) -> None:
    settings = Settings(engine="vllm-in-process", temperature=0.7, max_new_tokens=6, stop=("STOP",))
    options = EngineOptions(vllm={"max_model_len": "128", "compilation": "eager"})
    engine = open_engine(ModelSpec("m", str(tiny_models[0])), settings, options)
    questions = ["One?", "Two, and more?", "Three?"]
    asks = [Ask(question, (10 * n, 10 * n + 1)) for n, question in enumerate(questions)]
    found = dict(pair for group in engine.answers([asks]) for pair in group)
    for place, ids in enumerate(prompts_of(tiny_models[0], settings, questions)):
        texts = [fake_vllm.completion("base", ids, 10 * place + j, 6)["text"] for j in range(2)]
        assert [answer.text for answer in found[place]] == texts
    ((arguments, _),) = fake_module
    assert (arguments["max_model_len"], arguments["enforce_eager"]) == (128, True)
    assert "enable_lora" not in arguments


def test_in_process_requests_that_were_not_waited_for_are_taken_back(
    fake_module: list[Any], tiny_models: Models
) -> None:
    settings = Settings(engine="vllm-in-process", max_new_tokens=6)
    engine = open_engine(ModelSpec("m", str(tiny_models[0])), settings, EngineOptions())
    answers = engine.answers([[Ask("One?", (1,)), Ask("Two?", (2,)), Ask("Three?", (3,))]])
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    ((_, llm),) = fake_module
    assert len(llm.llm_engine.aborted) == 2


def test_the_log_of_a_server_that_does_not_start_is_kept_where_the_error_says(
    tiny_models: Models,
    dataset_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE.parents[2]))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_models[0], broken)
    out = tmp_path / "out"
    call = ["run", "--model", f"m={broken}", "--dataset", str(dataset_file), "--out", str(out)]
    assert main([*call, "--engine", "vllm"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    log = out / "vllm/vllm.log"
    assert error.endswith(f"ValueError: Error: no such model: {broken}; see {log}")
    assert "no such model" in log.read_text()


def test_an_engine_that_dies_is_one_line_and_what_it_answered_is_kept(
    fake_module: list[Any],
    tiny_models: Models,
    dataset_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class EngineDeadError(Exception):
        """As vLLM's, which is no RuntimeError."""

    step = FakeEngine.step

    def dying(self: FakeEngine) -> Any:
        if len(self.requests) == 9:
            raise EngineDeadError
        return step(self)

    def refuse(self: FakeEngine, names: list[str]) -> None:
        raise EngineDeadError

    out = tmp_path / "out"
    call = ["run", "--model", f"m={tiny_models[0]}", "--dataset", str(dataset_file), "--out", str(out)]
    call += ["--engine", "vllm-in-process", "--max-new-tokens", "6"]
    with monkeypatch.context() as patched:
        patched.setattr(FakeEngine, "step", dying)
        patched.setattr(FakeEngine, "abort_request", refuse)
        assert main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: vLLM's engine died")
    assert error.count("\n") == 1
    assert len((out / "m.jsonl").read_text().splitlines()) == 3
    assert main(call) == 0
    assert len((out / "m.jsonl").read_text().splitlines()) == 12


def test_vllm_settings_from_the_command_line_are_checked(
    tiny_models: Models, dataset_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["run", "--model", f"m={tiny_models[0]}", "--dataset", str(dataset_file), "--engine", "vllm"]
    call += ["--out", str(tmp_path / "out")]
    for wrong, complaint in (("colour=red", "--vllm colour"), ("max_num_seqs=0", "--vllm max_num_seqs"),
                             ("urls", "write KEY=VALUE")):  # fmt: skip
        assert main([*call, "--vllm", wrong]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
    assert main([*call[:-4], "--engine", "sglang", *call[-2:]]) == 2
    assert "--engine" in capsys.readouterr().err


@real
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm-in-process", "vllm"])
def test_real_vllm_answers_as_transformers_does(engine: str, dataset_file: Path, tmp_path: Path) -> None:
    from looper_trainer.demo.model import Shape, build_small_llama

    # vLLM's attention on a CPU has no heads narrower than 32.
    shape = Shape(vocabulary=400, width=64, layers=2, heads=2, feed_forward=96, positions=256)
    build_small_llama(tmp_path / "model", dataset_file.parent, 0, shape)
    adapter = adapter_of(tmp_path / "adapter", tmp_path / "model")
    call = [
        "run", "--model", f"adapter={adapter}", "--dataset", str(dataset_file), "--max-new-tokens", "8",
        "--dtype", "float32",
    ]  # fmt: skip
    assert main([*call, "--out", str(tmp_path / "hf"), "--device", "cpu"]) == 0
    vllm = ["--engine", engine, "--vllm", "compilation=eager", "--vllm", "max_model_len=192"]
    vllm += ["--vllm", f"python={PYTHON}"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    interpreter = PYTHON if engine == "vllm-in-process" else sys.executable
    assert interpreter is not None
    command = [interpreter, "-m", "looper_eval.cli", *call, "--out", str(tmp_path / "vllm"), *vllm]
    subprocess.run(command, check=True, env=environment, timeout=540)
    both = [
        {row["id"]: (row["output"], row["finish_reason"], row["tokens_out"]) for row in rows}
        for rows in (
            [json.loads(line) for line in (tmp_path / folder / "adapter.jsonl").read_text().splitlines()]
            for folder in ("hf", "vllm")
        )
    ]
    assert both[0] == both[1]
