from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from reward_service.errors import StartError
from reward_service.settings import Settings, load_settings


def load(home: Path, **overrides: object) -> Settings:
    return load_settings(overrides, {"REWARD_SERVICE_HOME": str(home)})


def test_without_a_file_the_service_binds_loopback_only(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert (settings.host, settings.port, settings.max_body_bytes) == ("127.0.0.1", 8080, 1_048_576)
    assert settings.home == tmp_path


def test_without_the_variable_the_folder_is_in_the_home_of_the_user() -> None:
    assert load_settings({}, {}).home == Path.home() / ".reward-service"


def test_options_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    text = "\ufeffport = 9000\nmax_arms = 7\n[scorer]\ncopies_threshold = 0.5\n"  # with a byte order mark
    (tmp_path / "settings.toml").write_text(text, encoding="utf-8")
    settings = load(tmp_path, port=9001, host=None)
    assert (settings.port, settings.max_arms, settings.host) == (9001, 7, "127.0.0.1")
    assert settings.scorer.copies_threshold == 0.5
    assert settings.limits.max_arms == 7


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("prot = 1", ["prot", "known settings", "max_body_bytes"]),
        ("port = 70000", ["port"]),
        ('port = "8080x"', ["port"]),
        ("[scorer]\nweight = 1", ["scorer.weight"]),
        ("drain_s = nan", ["drain_s"]),
        ('judge_url = "http://127.0.0.1:8001/v1"', ["judge_url", "without a path such as /v1"]),
        ('generator_url = "127.0.0.1:8001"', ["generator_url", "http://HOST:PORT"]),
        ('home = "elsewhere"', ["home", "REWARD_SERVICE_HOME"]),
        ("port =", ["settings.toml", "mend or remove"]),
    ],
)
def test_a_bad_file_is_one_line_that_names_what_is_wrong(tmp_path: Path, text: str, names: list[str]) -> None:
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(StartError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("text", "known", "other"),
    [
        ('[scorer]\njuge = "nli"', "judge_model", "max_body_bytes"),
        ("[scorer.reward]\ncorect = 1", "coherence", "judge_model"),
        ("[scorer.reward.length_penalty]\nper_tokens = 1", "free_tokens", "coherence"),
    ],
)
def test_a_misspelt_name_brings_the_names_of_its_own_table(
    tmp_path: Path, text: str, known: str, other: str
) -> None:
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(StartError, match=rf"known settings: .*\b{known}\b") as caught:
        load(tmp_path)
    assert other not in str(caught.value)


def test_a_bad_value_brings_no_list_of_names(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("port = 70000")
    with pytest.raises(StartError, match=r"settings\.toml: port: .*65535") as caught:
        load(tmp_path)
    assert "known settings" not in str(caught.value)


def test_a_bad_option_is_blamed_itself_and_not_the_file(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^--metrics-port: .*65535") as caught:
        load(tmp_path, metrics_port=99_999)
    assert "settings.toml" not in str(caught.value)


def test_settings_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        load(tmp_path).port = 1  # type: ignore[misc]


def test_a_ppo_batch_of_64_arms_of_a_thousand_tokens_fits_the_default_body(tmp_path: Path) -> None:
    # A thousand tokens of English are about 4,000 characters; reasoning and full text are both sent.
    text = "x" * 4000
    arms = [{"id": str(i), "reasoning": text, "full_text": text} for i in range(4)]
    questions = [{"id": str(i), "question": text, "arms": arms} for i in range(16)]
    assert len(json.dumps(questions)) < load(tmp_path).max_body_bytes


def test_the_settings_shown_in_the_readme_are_taken(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "reward_service/README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r'^```toml title="settings.toml"\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
    (tmp_path / "settings.toml").write_text(shown, encoding="utf-8")
    settings = load(tmp_path)
    assert (settings.scorer.judge, settings.scorer.judge_model) == ("llm", "a-judge")
    assert settings.judge_url == "http://127.0.0.1:8001"
