"""Looper's trainer: data, SFT, rollouts and PPO with a reward that stays private behind HTTP.

Importing this package needs only httpx, pydantic, rich, sniffio and stamina. The stages import torch and the
training libraries when they run (`pip install 'looper-trainer[train]'`).
"""

from __future__ import annotations

from looper_trainer.errors import UserError

__all__ = ["UserError", "__version__"]

__version__ = "0.1.0"
