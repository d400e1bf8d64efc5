"""The command: rollouts in, `calibration.json` and `calibration.html` out."""

from __future__ import annotations

import json
from pathlib import Path

from reward_service.app import load_scorer
from reward_service.calibration.page import render
from reward_service.calibration.report import make_report
from reward_service.calibration.rollouts import Analyst, observe, read_rollouts
from reward_service.errors import StartError
from reward_service.home import write_atomically
from reward_service.settings import Settings


def calibrate(
    file: Path,
    out: Path,
    settings: Settings,
    *,
    allow_test: bool = False,
    service_arms: bool = False,
    resamples: int = 1000,
    analyst: Analyst | None = None,
) -> str:
    """Write the report of the rollouts in `file` into the folder `out`; returns the one line to be printed.

    Args:
        service_arms: the trajectories are the service's own arms, in their order.
        analyst: what scores them; None: the scorer of the settings.

    Raises:
        StartError: the file cannot be used, the scorer not be loaded, or the report not be written.
    """
    records = read_rollouts(file, allow_test=allow_test)
    scorer = analyst or load_scorer(settings)
    if not isinstance(scorer, Analyst):
        raise TypeError("the scorer of the settings analyses nothing")
    observed = observe(records, scorer, service_arms=service_arms, settings=settings.scorer.reward)
    try:
        figures = make_report(observed, settings.scorer.weights, resamples=resamples)
    except ValueError as error:
        raise StartError(
            f"{file}: {error} ({observed.failed} questions were not scored); give more questions"
        ) from None
    report = {"file": file.name, "scorer_id": scorer.scorer_id, **figures}
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "calibration.json", json.dumps(report, indent=1) + "\n")
        write_atomically(out / "calibration.html", render(report))
    except OSError as error:
        raise StartError(f"{out}: {error.strerror}; choose a folder that you may write") from None
    auroc = report["discrimination"]["arm"]["s_wm"]["auroc"]
    return (
        f"{report['questions']} questions ({report['questions_failed']} more were not scored), "
        f"{report['arms']} arms: AUROC of s_wm for a right arm {auroc['value']:.3f}; "
        f"see {out / 'calibration.html'}"
    )
