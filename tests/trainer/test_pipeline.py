"""`looper run`: every stage of a file, once; what is done is skipped and what is stale is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from looper_trainer.config import load_config, save_resolved
from looper_trainer.data import PrepareDataConfig
from looper_trainer.errors import ConfigError
from looper_trainer.pipeline import plan
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.rollouts import RolloutsConfig
from looper_trainer.sft import SFTStageConfig
from looper_trainer.testing import FakeRewardServer


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(
        '[prepare_data]\ninput = "raw"\n[sft]\nepochs = 1.0\n[rollouts]\nlimit = 5\n[ppo]\nsteps = 3\n',
        encoding="utf-8",
    )
    return tmp_path / "run.toml"


def standings(file: Path) -> dict[str, str]:
    return {step.name: step.standing for step in plan(file)}


def finish(file: Path, stage: str) -> None:
    """Leave behind what the stage leaves behind when it has finished."""
    if stage == "prepare-data":
        prepared = load_config(PrepareDataConfig, file, {})
        save_resolved(prepared, prepared.output, f"{prepared.name}_config")
        (prepared.output / "gsm8k_dev.jsonl").touch()
    elif stage == "sft":
        taught = load_config(SFTStageConfig, file, {})
        save_resolved(taught, taught.output)
        (taught.output / "config.json").touch()
    elif stage == "rollouts":
        rolled = load_config(RolloutsConfig, file, {})
        save_resolved(rolled, rolled.output.parent, f"{rolled.output.stem}_config")
        rolled.output.touch()
    else:
        trained = load_config(PPOConfig, file, {})
        save_resolved(trained, trained.output)
        (trained.output / "merged").mkdir()
        (trained.output / "merged" / "config.json").touch()


def test_stages_are_done_one_after_the_other(config_file: Path) -> None:
    stages = ["prepare-data", "sft", "rollouts", "ppo"]
    for number, stage in enumerate(stages):
        expected = ["done"] * number + ["to do"] * (4 - number)
        assert standings(config_file) == dict(zip(stages, expected, strict=True))
        finish(config_file, stage)
    assert set(standings(config_file).values()) == {"done"}


def test_an_interrupted_ppo_is_resumed(config_file: Path) -> None:
    for stage in ("prepare-data", "sft", "rollouts"):
        finish(config_file, stage)
    state = Path("checkpoints/ppo_rl/checkpoints/step_00001/state.json")
    state.parent.mkdir(parents=True)
    state.touch()
    assert standings(config_file)["ppo"] == "interrupted"


def test_a_result_of_other_settings_is_stale_and_says_which(config_file: Path) -> None:
    for stage in ("prepare-data", "sft", "rollouts", "ppo"):
        finish(config_file, stage)
    text = config_file.read_text(encoding="utf-8")
    config_file.write_text(text.replace("epochs = 1.0", "epochs = 2.0\nlog_every = 3"), encoding="utf-8")
    sft = next(step for step in plan(config_file) if step.name == "sft")
    assert (sft.standing, sft.reason) == ("stale", "was made with another epochs")


def test_a_result_of_an_earlier_version_is_done_although_its_settings_are_refused_today(
    config_file: Path,
) -> None:
    for stage in ("prepare-data", "sft", "rollouts", "ppo"):
        finish(config_file, stage)
    (saved,) = Path("data").glob("*rollouts_config.toml")
    text = saved.read_text(encoding="utf-8")
    assert 'vllm_args = ""\n' in text
    # Without a setting that came later, with one whose partner was not asked for then.
    earlier = text.replace('vllm_args = ""\n', "").replace(
        'vllm_max_model_len = "none"', "vllm_max_model_len = 512"
    )
    saved.write_text(earlier, encoding="utf-8")
    rollouts = next(step for step in plan(config_file) if step.name == "rollouts")
    assert (rollouts.standing, rollouts.reason) == ("stale", "was made with another vllm_max_model_len")
    saved.write_text(text.replace('vllm_args = ""\n', ""), encoding="utf-8")
    assert standings(config_file)["rollouts"] == "done"


def test_what_was_made_from_an_earlier_result_is_stale(config_file: Path) -> None:
    for stage in ("prepare-data", "sft", "rollouts", "ppo"):
        finish(config_file, stage)
    Path("checkpoints/sft/config.json").unlink()
    assert standings(config_file) == {
        "prepare-data": "done",
        "sft": "to do",
        "rollouts": "stale",
        "ppo": "stale",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no stage to run"),
        ("[merge]\n", "holds no stage to run"),
        ("[sft\n", "not valid TOML"),
        ("[sft]\nepoch = 1\n", "unknown setting of .sft.: epoch; did you mean epochs"),
    ],
)
def test_a_file_that_cannot_be_run_is_named(config_file: Path, text: str, expected: str) -> None:
    config_file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=expected):
        list(plan(config_file))


@pytest.fixture
def server() -> Iterator[FakeRewardServer]:
    with FakeRewardServer(key="k") as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_does_every_stage_and_again_does_nothing(
    server: FakeRewardServer, tiny_model: Path, gsm8k_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(
        f'[prepare_data]\ninput = "{gsm8k_file}"\n'
        f'[sft]\nmodel = "{tiny_model}"\nmode = "full"\nepochs = 1\nbatch_size = 8\n'
        "[rollouts]\nlimit = 5\nmax_new_tokens = 8\n"
        "[ppo]\nsteps = 1\nbatch_size = 4\nmini_batch_size = 2\nsamples_per_question = 2\n"
        "max_new_tokens = 8\neval_every = 0\nlora_rank = 2\n",
        encoding="utf-8",
    )

    def looper(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "looper_trainer.cli", *arguments],
            cwd=tmp_path,
            env=os.environ | {"LOOPER_REWARD_URL": server.url, "LOOPER_REWARD_KEY": "k"},
            capture_output=True,
            text=True,
            check=False,
        )

    planned = looper("run", "run.toml", "--plan")
    assert planned.stdout.count("to do") == 4, planned.stderr
    assert not (tmp_path / "data").exists()
    done = looper("run", "run.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "checkpoints/ppo_rl/merged/config.json").exists()
    asked = len(server.requests)
    again = looper("run", "run.toml")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(": done, ") == 4
    assert len(server.requests) == asked
    shown = looper("status")
    assert shown.returncode == 0
    assert "checkpoints/ppo_rl: step 1 of 1, complete" in shown.stdout
    (sft,) = [line for line in shown.stdout.splitlines() if "checkpoints/sft: " in line]
    assert ", complete" in sft
    assert "data/gsm8k_train.jsonl: 32 questions" in shown.stdout
    last = json.loads((tmp_path / "checkpoints/ppo_rl/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 1
