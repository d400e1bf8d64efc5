"""Prompts, presets and the digest that keeps answers of different settings apart."""

from __future__ import annotations

import pytest

from looper_eval.settings import PRESETS, Settings, Shot, changed_fields, resolve_settings
from looper_schemas.prompt import format_prompt, format_target
from looper_trainer.errors import UserError

SHOT = Shot(question="1 + 1?", solution="One and one {a}.", answer="2")


def test_default_settings_ask_exactly_as_training_does() -> None:
    settings = resolve_settings("looper")
    question = "How many {q} and {cot}?"
    assert settings.prompt(question) == format_prompt(question)
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (0.0, 1.0, 256)


def test_worked_examples_are_written_as_sft_writes_them() -> None:
    settings = resolve_settings("looper", shots=(SHOT,))
    assert settings.prompt("2 + 2?") == (
        format_prompt("1 + 1?")
        + " "
        + format_target("One and one {a}.", "2")
        + "\n\n"
        + format_prompt("2 + 2?")
    )


def test_lm_eval_preset_gives_its_question_and_answer_lines() -> None:
    settings = resolve_settings("lm-eval-cot", shots=(Shot(question="1 + 1?", solution="Add.", answer="2"),))
    assert settings.prompt("2 + 2?") == "Q: 1 + 1?\nA: Add. The answer is 2.\n\nQ: 2 + 2?\nA:"
    assert "Q:" in settings.stop


def test_chat_presets_make_turns_and_put_the_system_prompt_first() -> None:
    settings = resolve_settings("deepseek-r1", system="Be brief.", shots=(SHOT,))
    roles = [turn["role"] for turn in settings.messages("2 + 2?")]
    assert roles == ["system", "user", "assistant", "user"]
    assert settings.messages("2 + 2?")[-1]["content"].startswith("2 + 2?\n")
    # DeepSeek's recipe: no system prompt, T 0.6, top_p 0.95.
    plain = resolve_settings("deepseek-r1")
    assert [turn["role"] for turn in plain.messages("2 + 2?")] == ["user"]
    assert (plain.temperature, plain.top_p) == (0.6, 0.95)


@pytest.mark.parametrize(
    "change",
    [
        {"template": "{q}"},
        {"chat": True},
        {"shots": (SHOT,)},
        {"stop": ("\n",)},
        {"max_new_tokens": 257},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"engine": "vllm"},
    ],
)
def test_every_setting_that_can_change_an_answer_changes_the_digest(change: dict[str, object]) -> None:
    plain, other = resolve_settings("looper"), resolve_settings("looper", **change)
    assert plain.digest("m") != other.digest("m")
    assert changed_fields(plain, other) == list(change)


def test_digest_tells_models_apart_and_ignores_the_name_of_the_preset() -> None:
    settings = Settings()
    assert settings.digest("folder:a") != settings.digest("folder:b")
    assert settings.digest("folder:a") == Settings(preset="mine").digest("folder:a")


def test_a_questions_seed_depends_on_seed_and_id_alone() -> None:
    settings = Settings(seed=3)
    seeds = {settings.question_seed(f"q/{n}") for n in range(200)}
    assert len(seeds) == 200
    assert min(seeds) >= 0
    assert settings.question_seed("q/1") == Settings(seed=3, temperature=0.7).question_seed("q/1")
    assert settings.question_seed("q/1") != Settings(seed=4).question_seed("q/1")


@pytest.mark.parametrize(
    ("preset", "change", "complaint"),
    [
        ("best", {}, "unknown preset 'best'; known: looper"),
        ("looper", {"top_p": 0.0}, "--top-p"),
        ("looper", {"temperature": -1.0}, "--temperature"),
        ("looper", {"max_new_tokens": 0}, "--max-new-tokens"),
        ("looper", {"template": "no place"}, "template must contain {q}"),
        ("looper", {"system": "Be brief."}, "needs chat"),
    ],
)
def test_bad_settings_are_one_line_that_names_the_option(
    preset: str, change: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as failure:
        resolve_settings(preset, **change)
    assert complaint in str(failure.value)


def test_every_preset_is_valid() -> None:
    for name in PRESETS:
        assert "QUESTION" in resolve_settings(name).prompt("QUESTION")
