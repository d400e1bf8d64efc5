"""`looper-eval card`: a model card that claims what the records show, and tells nothing of the reward."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from looper_eval import tables
from looper_eval.manifest import IMPORTED
from looper_eval.page import write_page
from looper_eval.settings import Settings
from looper_eval.summary import Summary, read_results, summarise
from looper_trainer.errors import UserError


def write_card(folder: Path, name: str, baseline: str | None = None, out: Path | None = None) -> Path:
    """Write the card of model `name` and return its path.

    Args:
        folder: results of `looper-eval run`.
        baseline: the model it is compared with; by default the one before it.
        out: the file; by default `<folder>/card-<name>.md`.

    Raises:
        UserError: no such model in `folder`, or nothing to compare it with.
    """
    summary = summarise(read_results(folder))
    if summary.settings.get("preset") == IMPORTED.preset:
        raise UserError(f"{folder}: holds imported answers; a card is for models that were asked here")
    names = [one.name for one in summary.models]
    for wanted in (name, baseline):
        if wanted is not None and wanted not in names:
            raise UserError(f"{folder}: has no finished model {wanted!r}; it has {', '.join(names)}")
    place = names.index(name)
    if baseline is None:
        if place == 0:
            raise UserError(
                f"{name} is the first model of {folder}; name what to compare it with: --baseline MODEL"
            )
        baseline = names[place - 1]
    if names.index(baseline) >= place:
        raise UserError(f"--baseline {baseline}: give a model that stands before {name} in {folder}")
    if not summary.pairs:
        raise UserError(f"{folder}: holds one question only; a card needs more")
    target = out or folder / f"card-{name}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_page(target, card(summary, name, baseline))
    return target


def card(summary: Summary, name: str, baseline: str) -> str:
    """The card of `name` against `baseline` as Markdown, with the metadata that model hubs read."""
    settings = Settings.model_validate(summary.settings)
    one, other = summary.model(name), summary.model(baseline)
    decoding = (
        "greedy decoding"
        if settings.temperature == 0
        else f"temperature {settings.temperature:g}, top_p {settings.top_p:g}, seed {settings.seed}"
    )
    missed = f"{one.unparsed} answers stated no number and {one.truncated} were cut off at the token limit"
    rows = [tables.model_cells(model) for model in (other, one)]
    return f"""---
tags: [math, gsm8k]
model-index:
- name: {name}
  results:
  - task: {{type: text-generation}}
    dataset: {{name: "{tables.dataset_name(summary)}", type: "{tables.dataset_name(summary)}"}}
    metrics: [{{type: accuracy, value: {100 * one.accuracy:.2f}}}]
---

# {name}

{tables.sentence(summary, baseline, name)}

{tables.markdown_table(tables.MODEL_COLUMNS, rows)}

## How this was measured

{summary.n} questions of {tables.dataset_name(summary)} (digest {summary.dataset_digest[:16]}),
{tables.calls(summary)}, {decoding}, at most {settings.max_new_tokens} new tokens,
prompt preset `{settings.preset}`, {len(settings.shots)} worked examples. An answer counts when the number it
finally states equals the gold one; {missed}, and all of these
count as wrong. Intervals are {tables.intervals(summary)}; models are compared question by question.
Measured with looper-eval {version("looper-eval")}.

## Training data and the evaluation set

{_contamination(summary, name)}

## Limits

The figures hold for this dataset, this prompt and this decoding. They say nothing about other kinds of
mathematics, about other languages, or about whether the reasoning before a right answer is right. A reward
model that was used in training, if it is private, is not part of this release and cannot be rebuilt from it.
"""


def _contamination(summary: Summary, name: str) -> str:
    found = summary.contamination.get(name)
    if found is None:
        return "The checkpoint does not record what it was trained on, so this was not checked."
    exact, masked, ngram = (found.touched[kind] for kind in ("exact", "masked", "ngram"))
    text = (
        f"Of the {found.questions} evaluation questions, {exact} stand in the training data word for word, "
        f"{masked} more with other numbers, and {ngram} more share 13 words in a row with a "
        "training question."
    )
    if found.digests_only:
        text += " Of part of the training data only digests were at hand, which tell equal questions alone."
    return text
