"""Failures that a user can mend.

    UserError                   one line that says what is wrong and what to do; CLIs exit with code 2
    ├── ConfigError             a setting, a file of settings or a command line
    ├── DataError               a dataset, a split, a record file
    ├── CheckpointError         a folder that should hold a model
    └── RewardError             the reward service (raised by `reward_client`)
        ├── RewardUnavailable   no answer until the deadline
        ├── RewardRejected      a request that the service refuses, or a reply that breaks the contract
        └── ScorerMismatch      the service runs another scorer than this run began with

Everything else is a defect of Looper and keeps its traceback.
"""

from __future__ import annotations

import errno


class UserError(Exception):
    """A failure whose message is one line that says what to do next."""


class ConfigError(UserError):
    """A wrong setting, settings file or command line."""


class DataError(UserError):
    """Input data that cannot be used as asked."""


class CheckpointError(UserError):
    """A model or checkpoint folder that cannot be used."""


class RewardError(UserError):
    """A failure at the boundary to the reward service."""


class RewardUnavailable(RewardError):
    """The reward service gave no usable answer before the deadline."""


class RewardRejected(RewardError):
    """The reward service refuses the request, or its reply breaks the contract."""


class ScorerMismatch(RewardError):
    """The reward service runs another scorer than the one this run is pinned to."""


def refused_file(error: OSError) -> str | None:
    """What the file system refuses, and what to do; None where `error` is about no file."""
    if error.errno == errno.ENOSPC:
        return f"{error.strerror}; make room or choose another disk, then run the same command again"
    return None if error.filename is None else f"{error.filename}: {error.strerror}; choose another path"
