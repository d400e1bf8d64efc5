"""A tiny random Llama, a tokenizer of single characters, and a scorer without HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from looper_schemas.records import Problem
from looper_schemas.scoring import (
    ArmReward,
    FailedQuestion,
    Limits,
    Purpose,
    Question,
    QuestionError,
    RewardMode,
    ScoredQuestion,
    ServiceInfo,
)
from looper_trainer.ppo.config import PPOConfig
from looper_trainer.ppo.policy import Policy
from looper_trainer.sampling.transformers import TransformersSampler
from looper_trainer.testing import FakeRewardServer

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:+-*/=#?{}'"
EOS_ID = 1


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices: threads only wait for each other, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<eos>": EOS_ID} | {c: i for i, c in enumerate(CHARACTERS, start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # The padding token is the EOS, as in R1-Distill.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        pad_token_id=EOS_ID,
        initializer_range=0.2,  # far from uniform, so that a wrong position or mask shows
    )
    return LlamaForCausalLM(config)


def make_policy(seed: int = 0, **settings: object) -> Policy:
    """A policy whose adapter and value head are not zero, so that nothing holds by accident."""
    policy = Policy(make_model(seed).requires_grad_(False).eval(), lora_rank=4, lora_alpha=8, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 1)
    for weight in [*policy.adapter_parameters(), *policy.value_head.parameters()]:
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return policy


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class CountingScorer:
    """Rewards a completion by the share of its characters that are in `wanted`; knows no HTTP."""

    def __init__(
        self, wanted: str = "7", fail: Callable[[Question, int], bool] = lambda q, step: False
    ) -> None:
        self.wanted = wanted
        self.fail = fail
        self.steps: list[int] = []

    def info(self) -> ServiceInfo:
        limits = Limits(max_questions=64, max_arms=64, max_text_chars=100_000, max_body_bytes=10**7)
        return ServiceInfo(scorer_id="counting", limits=limits, reward_modes=tuple(RewardMode), ranges={})

    def score(
        self, questions: Sequence[Question], *, step: int, purpose: Purpose
    ) -> dict[str, ScoredQuestion | FailedQuestion]:
        self.steps.append(step)
        return {question.id: self._result(question, step) for question in questions}

    def _result(self, question: Question, step: int) -> ScoredQuestion | FailedQuestion:
        if self.fail(question, step):
            return FailedQuestion(id=question.id, error=QuestionError(code="scorer_timeout", retryable=True))
        rewards = [self._reward(arm.full_text or "") for arm in question.arms]
        arms = tuple(
            ArmReward(id=arm.id, reward=reward) for arm, reward in zip(question.arms, rewards, strict=True)
        )
        mean = sum(rewards) / len(rewards)
        return ScoredQuestion(id=question.id, reward=mean, degenerate=False, arms=arms)

    def _reward(self, text: str) -> float:
        return sum(character in self.wanted for character in text) / max(len(text), 1)


@pytest.fixture
def problems() -> list[Problem]:
    return [Problem(id=f"p{i}", question=f"What is {i} + {i}?", answer=str(2 * i)) for i in range(12)]


@pytest.fixture
def ppo_config(base_folder: Path, tmp_path: Path) -> PPOConfig:
    return PPOConfig(
        model=str(base_folder),
        output=tmp_path / "ppo",
        dev_file=None,
        batch_size=4,
        samples_per_question=4,
        mini_batch_size=2,
        max_new_tokens=12,
        learning_rate=1e-2,
        value_learning_rate=1e-2,
        steps=4,
        save_every=1,
        lora_rank=4,
        lora_alpha=8,
        merge=False,
        device="cpu",
        dtype="float32",
    )


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRewardServer]:
    """A reward service that the environment names."""
    with FakeRewardServer(mode="random", seed=3) as server:
        monkeypatch.setenv("LOOPER_REWARD_URL", server.url)
        monkeypatch.setenv("LOOPER_REWARD_KEY", server.key)
        yield server


def build(config: PPOConfig) -> tuple[Policy, TransformersSampler]:
    policy, tokenizer = Policy.load(config)
    return policy, TransformersSampler(policy.model, tokenizer, batch_size=64)
