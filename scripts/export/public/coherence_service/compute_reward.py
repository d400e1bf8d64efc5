"""Where the coherence service would be: the reward is computed by a private service, not here.

python coherence_service/compute_reward.py    # says how to call it, and exits 2
"""

from __future__ import annotations

import sys
from typing import NoReturn

HOW = (
    "call the private coherence service: set LOOPER_REWARD_URL and LOOPER_REWARD_KEY (or "
    "LOOPER_REWARD_KEY_FILE), then use "
    "looper_trainer.reward_client.RewardClient.from_environment(run_id=...).score(...); without a service, "
    "`python -m looper_trainer.testing` serves public rewards (see coherence_service/README.md)"
)


class PrivateReward(NotImplementedError):
    """The reward is not computed in this repository; the message says how to ask for it."""


def compute_reward(*_arguments: object, **_options: object) -> NoReturn:
    """Answer every call with where the reward comes from.

    Raises:
        PrivateReward: always.
    """
    raise PrivateReward(HOW)


if __name__ == "__main__":
    print(f"error: {HOW}", file=sys.stderr)
    sys.exit(2)
