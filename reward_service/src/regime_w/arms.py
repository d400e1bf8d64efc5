"""The eight arms: eight ways of asking for the same number.

Four are Wolfram arms, which compute: they reach the answer through a formal object (equations, a program
trace, a unit ledger, a chain of goals). Four are Maudlin arms, which ask what makes the answer true: they
perturb a given, explain each step by its cause, rule out a rival reading, run the story backwards. A right
understanding survives both treatments; a lucky pattern rarely does.

Every arm ends with one line `#### n`. Whatever an arm computes about a situation other than the real one
stands between COUNTERFACTUAL_OPEN and COUNTERFACTUAL_CLOSE, always before the final line; a judge that
collects intermediate results leaves that block out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["wolfram", "maudlin"]

COUNTERFACTUAL_OPEN = "<counterfactual>"
COUNTERFACTUAL_CLOSE = "</counterfactual>"

_FORMAT = (
    "Write each calculation as a complete equation with its result, such as 3 * 4 = 12, and keep every digit "
    "until the end. Finish with exactly one line of the form\n#### n\nwhere n is the final number alone: no "
    "unit, no currency sign, no thousands separator. Write nothing after that line."
)

_COUNTERFACTUAL = (
    f"Put everything about a changed or imagined situation between {COUNTERFACTUAL_OPEN} and "
    f"{COUNTERFACTUAL_CLOSE}, each on a line of its own. Close the block before you state the answer, and "
    "never "
    "carry a number out of it: the answer concerns the problem exactly as it is written. "
)

_TASK = "Problem:\n{q}\n\n"


@dataclass(frozen=True)
class ArmSpec:
    """One way of prompting a model. `user_template` holds the placeholder `{q}` once."""

    name: str
    family: Family
    system_prompt: str
    user_template: str
    temperature: float
    top_p: float
    seed: int

    def user_prompt(self, question: str) -> str:
        """The user message for `question`, which is inserted verbatim (braces in it are plain text)."""
        return self.user_template.replace("{q}", question)


def build_all_arms() -> tuple[ArmSpec, ...]:
    """The eight arms; their position is the arm index of the wire contract."""
    return (
        ArmSpec(
            name="equations_first",
            family="wolfram",
            system_prompt=(
                "You translate word problems into algebra before you calculate anything. You trust only what "
                "follows from equations you have written down. " + _FORMAT
            ),
            user_template=_TASK
            + "1. Name every quantity the problem gives or asks for with a letter, its meaning and its "
            "unit.\n"
            "2. Write one equation for each statement of the problem. Use words such as 'half as many' or "
            "'more "
            "than' exactly as they are said, and check on which side of the equation each belongs.\n"
            "3. Only then solve: substitute the givens and work out one unknown at a time.\n"
            "4. Say which letter is asked for, and state its value.",
            temperature=0.6,
            top_p=0.95,
            seed=1009,
        ),
        ArmSpec(
            name="program_trace",
            family="wolfram",
            system_prompt=(
                "You solve a word problem by writing a short straight-line program and running it by hand, "
                "as a "
                "careful interpreter would: no step skipped, no value guessed. " + _FORMAT
            ),
            user_template=_TASK
            + "First write the program: one assignment a line, variables with telling names, the givens "
            "first, no "
            "loops unless something in the story really repeats.\n"
            "Then trace it. For each assignment, in order, write the right-hand side with the current "
            "values put "
            "in, and its result.\n"
            "If a value comes out that the story cannot have (a negative count, half a person), find the "
            "wrong "
            "line, mend it and trace again from there.\n"
            "The last variable must be exactly what is asked.",
            temperature=0.7,
            top_p=0.95,
            seed=2003,
        ),
        ArmSpec(
            name="unit_ledger",
            family="wolfram",
            system_prompt=(
                "You keep books on quantities. Every number in your ledger has a unit, and no entry may be "
                "added "
                "to, or subtracted from, an entry of another unit. " + _FORMAT
            ),
            user_template=_TASK
            + "Open the ledger with each given as an entry: number, unit, and what it counts, including "
            "the unit of "
            "every rate (dollars per hour, pages per day).\n"
            "Note the unit that the answer must have.\n"
            "Post one calculation an entry. A rate times a quantity must cancel units; where units do not "
            "match, "
            "convert first and show the conversion.\n"
            "Close the ledger when an entry has the unit that you noted and counts what is asked.",
            temperature=0.6,
            top_p=0.95,
            seed=3001,
        ),
        ArmSpec(
            name="backward_from_goal",
            family="wolfram",
            system_prompt=(
                "You plan from the goal. Before any arithmetic you ask what you would need to know to "
                "answer, then "
                "what you would need to know for that, until only givens remain. " + _FORMAT
            ),
            user_template=_TASK + "Say in your own words what number is asked for: of what, when, for whom.\n"
            "Goal: write the one operation that would yield it, from quantities that you name.\n"
            "Turn each of these that is not given into a goal of its own, and go on until every goal rests "
            "on "
            "numbers in the problem.\n"
            "Now climb back up: calculate the goals in reverse order, the most basic first, each from "
            "results that "
            "you already have.",
            temperature=0.7,
            top_p=0.95,
            seed=4001,
        ),
        ArmSpec(
            name="perturb_a_given",
            family="maudlin",
            system_prompt=(
                "You understand a quantity when you know how it would change if something else did. You "
                "solve the "
                "problem as it stands, then test that solution by changing one given. "
                + _COUNTERFACTUAL
                + _FORMAT
            ),
            user_template=_TASK + "1. Solve the problem as it is written.\n"
            "2. Pick the given that you think matters most and change it a little. Before calculating, "
            "predict "
            "whether the answer rises, falls or stays, and by how much for each unit of change.\n"
            f"3. Inside {COUNTERFACTUAL_OPEN} ... {COUNTERFACTUAL_CLOSE}, work the changed problem out in "
            "full and "
            "compare with the prediction.\n"
            "4. If they disagree, your solution misuses that given: find where, and correct step 1.\n"
            "5. State the answer to the original problem.",
            temperature=0.7,
            top_p=0.95,
            seed=5003,
        ),
        ArmSpec(
            name="causal_why",
            family="maudlin",
            system_prompt=(
                "You explain before you calculate. A step is allowed only when you can say what in the "
                "story makes "
                "it so; that numbers can be combined is no reason to combine them. " + _FORMAT
            ),
            user_template=_TASK
            + "Tell what happens in the story in order of time, and what each event changes.\n"
            "For every event that changes a quantity write one sentence of the form 'Because ..., the ... "
            "becomes "
            "...', and under it the equation that carries it out.\n"
            "Name any number in the problem that changes nothing, and say why it plays no part.\n"
            "Conclude with the quantity that is asked for, and the chain of causes that fixed it.",
            temperature=0.7,
            top_p=0.95,
            seed=6007,
        ),
        ArmSpec(
            name="rule_out_a_rival",
            family="maudlin",
            system_prompt=(
                "You know that wrong answers mostly come from another reading of the same words. You state "
                "the "
                "reading you adopt, and defeat its strongest rival by what the text says. "
                + _COUNTERFACTUAL
                + _FORMAT
            ),
            user_template=_TASK
            + "1. Quote the phrase that a hasty reader would most easily take wrongly: what 'each', "
            "'remaining', 'as "
            "many again' or a percentage refers to, or whether the first day counts.\n"
            "2. State two readings of it.\n"
            f"3. Inside {COUNTERFACTUAL_OPEN} ... {COUNTERFACTUAL_CLOSE}, follow the reading that you will "
            "reject "
            "until it conflicts with another statement of the problem or with plain sense. If it never "
            "does, say "
            "which reading ordinary usage prefers, and why.\n"
            "4. Solve the problem completely under the reading that remains.",
            temperature=0.8,
            top_p=0.95,
            seed=7001,
        ),
        ArmSpec(
            name="reverse_check",
            family="maudlin",
            system_prompt=(
                "You believe an answer only when the story can be run backwards from it. You solve, then "
                "take your "
                "answer as given and recover one of the original numbers. " + _COUNTERFACTUAL + _FORMAT
            ),
            user_template=_TASK + "1. Solve the problem step by step.\n"
            f"2. Inside {COUNTERFACTUAL_OPEN} ... {COUNTERFACTUAL_CLOSE}, hide one number of the problem, "
            "suppose "
            "that your answer is true, and undo the steps in reverse order until you obtain the hidden "
            "number.\n"
            "3. Compare it with the one in the problem. If they differ, look for the step whose undoing "
            "fails, "
            "correct it, and check once more.\n"
            "4. State the answer that passed.",
            temperature=0.6,
            top_p=0.95,
            seed=8009,
        ),
    )


def family_of(arm: int | None) -> Family | None:
    """The family of the arm with this index; None for a policy sample.

    Raises:
        IndexError: there is no such arm.
    """
    if arm is None:
        return None
    if arm < 0:
        raise IndexError(arm)
    return _FAMILIES[arm]


_FAMILIES: tuple[Family, ...] = tuple(spec.family for spec in build_all_arms())
