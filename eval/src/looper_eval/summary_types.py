"""Contents of `summary.json`, field by field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95


class Frozen(BaseModel):
    """Base of every part: immutable, closed, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Share(Frozen):
    """`correct` of `n` answers, with Wilson's interval, or of several samples a clustered one."""

    n: int
    correct: int
    accuracy: float
    interval: tuple[float, float]


class Recorded(Frozen):
    """The score that an imported file gives a model, and the answers on which this summary differs."""

    accuracy: float
    differing: int


class ModelSummary(Share):
    """One model's result. correct + wrong + unparsed + truncated = n answers.

    Where several samples were drawn, `pass_at` holds the unbiased pass@k for several k, and `majority` the
    accuracy of the most frequent answer of all samples.
    """

    name: str
    place: str
    wrong: int
    unparsed: int
    truncated: int
    graders: dict[str, Share]
    recorded: dict[str, Recorded] = {}
    pass_at: dict[str, float] = {}
    majority: float | None = None
    standard_error: float
    tokens_mean: float | None
    tokens_median: float | None
    tokens_max: int | None
    settings_digest: str


class Table(Frozen):
    """Questions by which of two models answers them correctly (more than half of its samples)."""

    both: int
    only_a: int
    only_b: int
    neither: int


class PairSummary(Frozen):
    """b minus a, question by question. `p` is exact McNemar's, or for several samples a question that of the
    paired t-test on question means; `p_holm` corrects for all pairs here."""

    a: str
    b: str
    difference: float
    se: float
    interval: tuple[float, float]
    table: Table
    p: float
    p_holm: float
    minimum_detectable_difference: float


class BreakdownRow(Frozen):
    """Results on the questions of one level, by model."""

    level: str
    n: int
    models: dict[str, Share]


class Contamination(Frozen):
    """Evaluation questions found in what a model was trained on.

    `files` could be read; of `digests_only` equal questions alone are told. `touched` counts evaluation
    questions by their most certain look; `hits` are (look, evaluation id, training id, what is shared).
    """

    files: tuple[str, ...]
    digests_only: tuple[str, ...]
    questions: int
    touched: dict[str, int]
    hits: tuple[tuple[str, str, str, str], ...]


class Coherence(Frozen):
    """How a model's coherence scores go with its correctness, on the questions that could be scored.

    `auroc` is of the score against the correctness of the single recorded answer, `auroc_plurality` against
    that of the samples' most frequent answer; None where all or none are correct. `selective` holds
    (share of questions kept, accuracy on them), the most coherent first.
    """

    samples: int
    scored: int
    unscored: int
    degenerate: int
    scorer_id: str
    mean: float
    auroc: float | None
    auroc_plurality: float | None
    plurality_accuracy: float
    selective: tuple[tuple[float, float], ...]
    components: dict[str, float | None]


class Summary(Frozen):
    """Contents of `summary.json`."""

    dataset: str
    dataset_digest: str
    n: int
    samples: int = 1
    grader: str
    confidence: float
    settings: dict[str, object]
    models: tuple[ModelSummary, ...]
    unfinished: tuple[str, ...]
    pairs: tuple[PairSummary, ...]
    breakdowns: dict[str, tuple[BreakdownRow, ...]]
    contamination: dict[str, Contamination] = {}
    coherence: dict[str, Coherence] = {}

    def model(self, name: str) -> ModelSummary:
        """The result of the model `name`."""
        return next(one for one in self.models if one.name == name)


Verdicts = list[list[bool]]
"""For each question, which of the samples are right."""
