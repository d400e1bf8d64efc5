"""Rollouts that the reward service makes itself: its own arms answer, here only the answers arrive.

`looper rollouts --arms service` writes the same records as any rollout. Their policy is what the service
calls its generator, and a question that an arm did not answer, or that could not be scored, keeps no
trajectories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from looper_schemas.records import Problem, RolloutRecord, Trajectory
from looper_schemas.rollout import OpenQuestion, RolledOut
from looper_schemas.scoring import CONTRACT_VERSION, FailedQuestion
from looper_trainer.errors import DataError
from looper_trainer.reward_client import RewardClient

REQUEST_TIMEOUT_S = 600.0  # a request ends when its slowest arm has answered


def service_records(
    client: RewardClient,
    problems: Sequence[Problem],
    *,
    seed: int,
    max_tokens: int,
    questions_per_batch: int,
    policy: str | None = None,
) -> Iterator[RolloutRecord]:
    """A record for each problem, in order.

    Args:
        policy: the generator that made earlier records of the same file, if any.

    Raises:
        RewardUnavailable, RewardRejected, ScorerMismatch: see `looper_trainer.errors`.
        DataError: the service's generator has changed.
    """
    for step, begin in enumerate(range(0, len(problems), questions_per_batch)):
        batch = problems[begin : begin + questions_per_batch]
        questions = [OpenQuestion(id=p.id, question=p.question, gold_answer=p.answer) for p in batch]
        results, generator = client.roll_out(questions, step=step, seed=seed, max_tokens=max_tokens)
        if policy is not None and generator != policy:
            raise DataError(
                f"the service's generator is {generator}, but {policy} made the earlier records; set it "
                "back, or begin a new file"
            )
        policy = generator
        for problem in batch:
            yield _record(problem, results[problem.id], generator, client)


def _record(
    problem: Problem, result: RolledOut | FailedQuestion, generator: str, client: RewardClient
) -> RolloutRecord:
    scored = isinstance(result, RolledOut)
    rewards = {arm.id: arm.reward for arm in result.arms} if isinstance(result, RolledOut) else {}
    return RolloutRecord(
        id=problem.id,
        question=problem.question,
        gold_answer=problem.answer,
        trajectories=tuple(
            Trajectory(
                output=output.output,
                final_answer=output.final_answer,
                reward=rewards[output.id],
                finish_reason=output.finish_reason.value,
                tokens_out=output.tokens_out,
            )
            for output in sorted(result.outputs, key=lambda output: output.arm)
        )
        if isinstance(result, RolledOut)
        else (),
        scores=result.scores if isinstance(result, RolledOut) else None,
        policy=generator,
        scorer_id=client.scorer_id if scored else None,
        reward_mode=client.reward_mode.value,
        contract=CONTRACT_VERSION,
    )
