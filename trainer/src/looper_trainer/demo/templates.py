"""The demo's word-problem templates: a question, the ranges of its numbers, and its worked steps.

A step reads `label: result = left op right`; operands are numbers of the question, earlier results or
constants that the question implies ("a week" is 7). The last result is the answer. `build` in `problems`
rejects draws in which a result is not a whole number from 2 to 999, so no sentence meets "1 apples", a debt
or half a child.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """One problem shape. `ranges` maps a number's letter to its smallest and largest value, both included."""

    name: str
    question: str
    ranges: Mapping[str, tuple[int, int]]
    steps: tuple[str, ...]


# (name, he, his, him)
PEOPLE = (
    ("Ana", "she", "her", "her"),
    ("Ben", "he", "his", "him"),
    ("Cora", "she", "her", "her"),
    ("Dan", "he", "his", "him"),
    ("Ella", "she", "her", "her"),
    ("Finn", "he", "his", "him"),
    ("Grace", "she", "her", "her"),
    ("Hugo", "he", "his", "him"),
    ("Iris", "she", "her", "her"),
    ("Jack", "he", "his", "him"),
    ("Lena", "she", "her", "her"),
    ("Milo", "he", "his", "him"),
    ("Nora", "she", "her", "her"),
    ("Omar", "he", "his", "him"),
    ("Priya", "she", "her", "her"),
    ("Sam", "he", "his", "him"),
)

# Every word of a kind fits wherever the kind is asked for; all are plurals of countable nouns.
WORDS = {
    "thing": ("marbles", "stickers", "beads", "stamps", "shells", "cards", "buttons", "crayons", "badges"),
    "fruit": ("apples", "pears", "plums", "oranges", "peaches", "lemons", "mangoes", "figs"),
    "food": ("cookies", "muffins", "rolls", "cupcakes", "tarts", "buns", "scones", "waffles"),
    "animal": ("hens", "goats", "ducks", "rabbits", "geese", "lambs"),
    "plant": ("roses", "tulips", "daisies", "lilies", "pansies", "violets"),
    "good": ("books", "lamps", "mugs", "bowls", "candles", "kites", "caps", "scarves"),
}

TEMPLATES: tuple[Template, ...] = (
    Template(
        "boxes_minus_gift",
        "{name} buys {a} boxes of {thing} with {b} {thing} in each box. {He} gives {c} {thing} to {name2}. "
        "How many {thing} does {name} have left?",
        {"a": (2, 9), "b": (4, 12), "c": (2, 9)},
        ("Bought: t = a * b", "Left: r = t - c"),
    ),
    Template(
        "two_shelves",
        "One shelf holds {a} rows of {b} {good}. Another shelf holds {c} {good}. How many {good} are there "
        "in all?",
        {"a": (2, 9), "b": (4, 12), "c": (2, 9)},
        ("First shelf: t = a * b", "In all: r = t + c"),
    ),
    Template(
        "bakery_trays",
        "A bakery bakes {a} trays of {b} {food}. By noon it sells {c} {food}. How many {food} are left?",
        {"a": (2, 9), "b": (4, 12), "c": (2, 9)},
        ("Baked: t = a * b", "Left: r = t - c"),
    ),
    Template(
        "share_after_loss",
        "{name} has {a} {thing}. {He} loses {b} of them and shares the rest equally among {c} friends. How "
        "many {thing} does each friend get?",
        {"a": (14, 80), "b": (2, 9), "c": (2, 6)},
        ("Rest: t = a - b", "Each friend: r = t / c"),
    ),
    Template(
        "weekly_savings",
        "{name} saves ${a} every week. After {b} weeks {he} buys a coat for ${c}. How many dollars does "
        "{name} have left?",
        {"a": (3, 12), "b": (3, 9), "c": (6, 20)},
        ("Saved: t = a * b", "Left: r = t - c"),
    ),
    Template(
        "two_pay_rates",
        "{name} earns ${a} an hour on weekdays and ${b} an hour on weekends. This week {he} worked {c} "
        "hours on weekdays and {d} hours on the weekend. How many dollars did {name} earn?",
        {"a": (5, 10), "b": (6, 12), "c": (2, 5), "d": (2, 5)},
        ("Weekdays: s = a * c", "Weekend: t = b * d", "Total: r = s + t"),
    ),
    Template(
        "twice_as_many",
        "{name} has {a} {thing} and finds {b} more. {name2} now has twice as many {thing} as {name}. "
        "How many {thing} do they have together?",
        {"a": (3, 30), "b": (2, 29)},
        ("{name}: s = a + b", "{name2}: t = s * 2", "Together: r = s + t"),
    ),
    Template(
        "times_as_many_lost",
        "{name} picks {a} {fruit}. {name2} picks {b} times as many but drops {c} of them. How many {fruit} "
        "does {name2} keep?",
        {"a": (4, 12), "b": (2, 9), "c": (2, 9)},
        ("Picked: t = a * b", "Kept: r = t - c"),
    ),
    Template(
        "pages_per_day",
        "A book has {a} pages. {name} reads {b} pages a day for {c} days. How many pages are left to read?",
        {"a": (40, 99), "b": (5, 12), "c": (2, 7)},
        ("Read: t = b * c", "Left: r = a - t"),
    ),
    Template(
        "bus_stops",
        "A bus starts with {a} people. At the first stop {b} people get off and {c} get on. At the next "
        "stop {d} people get on. How many people are on the bus now?",
        {"a": (20, 50), "b": (2, 9), "c": (2, 9), "d": (2, 9)},
        ("After getting off: s = a - b", "After the first stop: t = s + c", "Now: r = t + d"),
    ),
    Template(
        "tickets",
        "A ticket costs ${a} for an adult and ${b} for a child. How many dollars do {c} adults and {d} "
        "children pay?",
        {"a": (8, 12), "b": (3, 7), "c": (2, 6), "d": (2, 6)},
        ("Adults: s = a * c", "Children: t = b * d", "Total: r = s + t"),
    ),
    Template(
        "garden_rows",
        "{name} plants {a} rows of {plant} with {b} {plant} in each row. Then {he} plants {c} more. Later "
        "{d} {plant} wilt. How many {plant} are healthy?",
        {"a": (2, 9), "b": (4, 10), "c": (2, 9), "d": (2, 9)},
        ("Rows: s = a * b", "Planted: t = s + c", "Healthy: r = t - d"),
    ),
    Template(
        "change_from_bill",
        "{name} buys {a} {good} at ${b} each and pays with ${c}. How many dollars of change does {he} get?",
        {"a": (3, 9), "b": (3, 9), "c": (30, 99)},
        ("Cost: t = a * b", "Change: r = c - t"),
    ),
    Template(
        "half_sold",
        "A shop has {a} {good}. It sells half of them in the morning and {b} more in the afternoon. How "
        "many {good} are left?",
        {"a": (20, 90), "b": (2, 20)},
        ("Morning: s = a / 2", "After the morning: t = a - s", "Left: r = t - b"),
    ),
    Template(
        "eggs_for_days",
        "{name}'s farm has {a} hens. Each hen lays {b} eggs a month. {He} sells {c} eggs. How many eggs "
        "remain?",
        {"a": (2, 9), "b": (4, 12), "c": (2, 9)},
        ("Laid: t = a * b", "Remaining: r = t - c"),
    ),
    Template(
        "train_cars",
        "A train has {a} cars with {b} seats each. {c} seats are empty. How many seats are taken?",
        {"a": (2, 9), "b": (6, 12), "c": (2, 12)},
        ("Seats: t = a * b", "Taken: r = t - c"),
    ),
    Template(
        "equal_bags",
        "{name} has {a} red {thing} and {b} blue {thing}. {He} puts them into bags of {c}. How many bags "
        "does {he} fill?",
        {"a": (4, 30), "b": (4, 30), "c": (2, 6)},
        ("In all: t = a + b", "Bags: r = t / c"),
    ),
    Template(
        "swimming_laps",
        "{name} swims {a} laps of {b} meters on Monday and {c} meters on Tuesday. How many meters does {he} "
        "swim in all?",
        {"a": (2, 9), "b": (10, 12), "c": (10, 40)},
        ("Monday: t = a * b", "In all: r = t + c"),
    ),
    Template(
        "two_classes_buses",
        "One class has {a} children and another has {b}. They ride in vans that hold {c} children each. "
        "How many full vans do they need?",
        {"a": (10, 40), "b": (10, 40), "c": (3, 8)},
        ("Children: t = a + b", "Vans: r = t / c"),
    ),
    Template(
        "fence_boards",
        "A fence has {a} sections with {b} boards each. {name} has painted {c} boards. How many boards are "
        "still to paint?",
        {"a": (2, 9), "b": (5, 12), "c": (2, 10)},
        ("Boards: t = a * b", "To paint: r = t - c"),
    ),
    Template(
        "aquarium",
        "A tank holds {a} liters. Each of {b} buckets adds {c} liters to the {d} liters already in it. How "
        "many liters are still missing?",
        {"a": (40, 99), "b": (3, 6), "c": (4, 10), "d": (4, 10)},
        ("Added: s = b * c", "In the tank: t = d + s", "Missing: r = a - t"),
    ),
    Template(
        "toys_per_day",
        "A factory makes {a} toys a day for {b} days. {c} of the toys fail a test. How many toys pass?",
        {"a": (4, 12), "b": (2, 9), "c": (2, 9)},
        ("Made: t = a * b", "Passed: r = t - c"),
    ),
    Template(
        "age_sum",
        "{name} is {a} years old. {name2} is {b} years older than {name}. What will the sum of their ages "
        "be in {c} years?",
        {"a": (6, 25), "b": (2, 9), "c": (2, 9)},
        ("{name2} now: s = a + b", "Sum now: t = a + s", "Both grow: u = c * 2", "Sum then: r = t + u"),
    ),
    Template(
        "craft_profit",
        "{name} sells {a} {good} for ${b} each. The material costs ${c} for each of them. How many dollars "
        "of profit does {he} make?",
        {"a": (3, 9), "b": (8, 20), "c": (2, 12)},
        ("Profit on one: t = b - c", "Profit: r = t * a"),
    ),
    Template(
        "chairs",
        "A hall has {a} rows of {b} chairs. {name} brings {c} more chairs and {name2} brings {d}. How many "
        "chairs are there now?",
        {"a": (2, 8), "b": (4, 10), "c": (2, 9), "d": (2, 9)},
        ("Rows: s = a * b", "With {name}'s: t = s + c", "Now: r = t + d"),
    ),
    Template(
        "rope_pieces",
        "{name} has a rope of {a} meters. {He} cuts off {b} pieces of {c} meters each. How many meters of "
        "rope are left?",
        {"a": (40, 99), "b": (2, 8), "c": (4, 10)},
        ("Cut off: t = b * c", "Left: r = a - t"),
    ),
    Template(
        "phone_calls",
        "{name} calls {a} people an hour for {b} hours. {c} people do not answer. How many people answer?",
        {"a": (4, 12), "b": (2, 9), "c": (2, 10)},
        ("Calls: t = a * b", "Answered: r = t - c"),
    ),
    Template(
        "dozens",
        "{name} buys {a} dozen {food}. {name2} eats {b} and {name3} eats {c}. How many {food} are left?",
        {"a": (2, 7), "b": (2, 12), "c": (2, 12)},
        ("Bought: s = a * 12", "Eaten: t = b + c", "Left: r = s - t"),
    ),
    Template(
        "weeks_to_days",
        "{name} practices the piano {a} minutes a day. How many minutes does {he} practice in a week if "
        "{he} skips {b} minutes in total?",
        {"a": (4, 20), "b": (3, 40)},
        ("Plan: t = a * 7", "Practiced: r = t - b"),
    ),
    Template(
        "cows_and_sheep",
        "A farm has {a} cows and {b} times as many sheep. It sells {c} sheep. How many sheep remain?",
        {"a": (4, 12), "b": (2, 9), "c": (2, 10)},
        ("Sheep: t = a * b", "Remaining: r = t - c"),
    ),
    Template(
        "fewer_than",
        "{name} has {a} {thing}. {name2} has {b} fewer than {name}. {name3} has {c} more than {name2}. How "
        "many {thing} does {name3} have?",
        {"a": (20, 60), "b": (2, 9), "c": (2, 9)},
        ("{name2}: t = a - b", "{name3}: r = t + c"),
    ),
    Template(
        "three_day_total",
        "{name} picks {a} {fruit} on Monday, {b} more than that on Tuesday and {c} on Wednesday. How many "
        "{fruit} does {he} pick in all?",
        {"a": (5, 20), "b": (2, 9), "c": (5, 12)},
        ("Tuesday: s = a + b", "Two days: t = a + s", "In all: r = t + c"),
    ),
    Template(
        "groups_of_children",
        "{a} children form teams of {b}. Each team gets {c} {good}. How many {good} are needed?",
        {"a": (12, 72), "b": (2, 9), "c": (2, 9)},
        ("Teams: t = a / b", "Needed: r = t * c"),
    ),
    Template(
        "boat_coupon",
        "{name} rents a boat for {b} hours at ${c} an hour and has a coupon for ${a} off. "
        "How many dollars does {he} pay?",
        {"a": (2, 9), "b": (2, 9), "c": (4, 12)},
        ("Price: t = b * c", "Pays: r = t - a"),
    ),
    Template(
        "painted_tiles",
        "A wall has {a} rows of {b} tiles. Each row has {c} blue tiles and the others are white. How many "
        "tiles are white?",
        {"a": (2, 9), "b": (8, 20), "c": (2, 11)},
        ("White in a row: t = b - c", "White: r = t * a"),
    ),
    Template(
        "two_trips",
        "{name} cycles {a} miles an hour for {b} hours and then {c} miles an hour for {d} hours. How many "
        "miles does {he} cycle?",
        {"a": (6, 12), "b": (2, 6), "c": (6, 12), "d": (2, 6)},
        ("First part: s = a * b", "Second part: t = c * d", "Total: r = s + t"),
    ),
    Template(
        "library_returns",
        "A library has {a} books. On Monday {b} books are borrowed. On Tuesday {c} books are borrowed and "
        "{d} are returned. How many books are there now?",
        {"a": (50, 99), "b": (3, 12), "c": (3, 9), "d": (2, 9)},
        ("After Monday: s = a - b", "After borrowing: t = s - c", "Now: r = t + d"),
    ),
    Template(
        "cups_per_pitcher",
        "{name} fills {a} pitchers with {b} cups of juice each. {c} guests drink {d} cups each. How many "
        "cups of juice are left?",
        {"a": (4, 9), "b": (6, 12), "c": (3, 9), "d": (2, 4)},
        ("Filled: s = a * b", "Drunk: t = c * d", "Left: r = s - t"),
    ),
    Template(
        "photo_album",
        "An album has {a} pages with {b} photos on each page. {name} adds {c} photos on a new page and "
        "removes {d}. How many photos are in the album?",
        {"a": (2, 8), "b": (4, 10), "c": (2, 9), "d": (2, 9)},
        ("Pages: s = a * b", "After adding: t = s + c", "In the album: r = t - d"),
    ),
    Template(
        "saving_for_bike",
        "A bike costs ${a}. {name} has ${b} and earns ${c} a week. How many dollars does {he} still need "
        "after {d} weeks?",
        {"a": (50, 99), "b": (5, 20), "c": (4, 9), "d": (3, 6)},
        ("Earned: s = c * d", "Has: t = b + s", "Needs: r = a - t"),
    ),
    Template(
        "pens_and_yard",
        "{name} has {a} {animal} in each of {b} pens and {c} {animal} in the yard. {He} sells {d} "
        "{animal}. How many {animal} are left?",
        {"a": (2, 9), "b": (4, 10), "c": (2, 9), "d": (2, 9)},
        ("Pens: s = a * b", "In all: t = s + c", "Left: r = t - d"),
    ),
    Template(
        "equal_piles",
        "{name} stacks {a} coins in equal piles of {b}. {He} gives away {c} piles. How many piles are left?",
        {"a": (16, 90), "b": (2, 9), "c": (2, 9)},
        ("Piles: t = a / b", "Left: r = t - c"),
    ),
    Template(
        "price_drop",
        "A bag costs ${a}. Its price falls by ${b}. {name} buys {c} bags at the new price. How many "
        "dollars does {he} pay?",
        {"a": (12, 30), "b": (2, 9), "c": (2, 9)},
        ("New price: t = a - b", "Pays: r = t * c"),
    ),
    Template(
        "points_in_games",
        "{name} scores {a} points in each of {b} games. {name2} scores {c} points fewer than {name} in "
        "all. How many points do they score together?",
        {"a": (4, 12), "b": (2, 9), "c": (2, 9)},
        ("{name}: s = a * b", "{name2}: t = s - c", "Together: r = s + t"),
    ),
    Template(
        "water_bottles",
        "A team of {a} players drinks {b} bottles of water each. The coach brought {c} bottles and buys "
        "{d} more. How many bottles are left?",
        {"a": (5, 12), "b": (2, 5), "c": (30, 60), "d": (5, 20)},
        ("Drunk: s = a * b", "Brought: t = c + d", "Left: r = t - s"),
    ),
    Template(
        "letters_home",
        "{name} writes {a} letters a month. {name2} writes {b} letters a month. How many more letters than "
        "{name} does {name2} write in {c} months?",
        {"a": (3, 12), "b": (12, 22), "c": (2, 9)},
        ("More in a month: t = b - a", "More: r = t * c"),
    ),
)
