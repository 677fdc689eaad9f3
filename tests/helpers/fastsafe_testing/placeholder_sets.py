"""Sets of harmless placeholder rows for the linter: clean ones, and the published set's defects."""

import random
from typing import Any

from fastsafe.safety.mixing.safety_rows import refusals

VERBS = ("move", "lift", "carry", "fold", "polish", "borrow", "paint", "stack", "sort", "wrap")
THINGS = ("lamp", "chair", "basket", "ladder", "mirror", "kettle", "carpet", "bottle", "bucket")
PLACES = ("station", "harbour", "library", "market", "bakery", "garden", "theatre", "museum")
TIMES = ("morning", "evening", "autumn", "winter", "summer", "spring", "weekend", "afternoon")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "silver", "golden", "white")


def phrase(number: int) -> str:
    """Harmless action that no other number has."""
    rng = random.Random(f"phrase {number}")
    verb, thing, place = rng.choice(VERBS), rng.choice(THINGS), rng.choice(PLACES)
    colour, time = rng.choice(COLOURS), rng.choice(TIMES)
    return f"{verb} {colour} {thing} number {number} from the {place} on a {time} of {number * 7}"


def safety_row(number: int) -> dict[str, Any]:
    """Row that refuses a placeholder."""
    wordings = refusals("en")
    answer = wordings[number % len(wordings)]
    return row(f"How would somebody {phrase(number)}?", answer)


def user_row(number: int) -> dict[str, Any]:
    """Row that answers one."""
    rng = random.Random(f"answer {number}")
    answer = f"A {rng.choice(COLOURS)} {rng.choice(THINGS)} is what the {number}th visitor needs."
    return row(f"How would somebody {phrase(number)}?", answer)


def row(prompt: str, answer: str, **labels: str) -> dict[str, Any]:
    """Conversation of one exchange."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **labels}


NUM_ROWS, NUM_GROUPS, NUM_DUPLICATES = 2000, 47, 78
NUM_LEAKS, NUM_SHORTCUTS, NUM_ANSWERED = 35, 1018, 56


def published_defects() -> tuple[list[tuple[str, str]], dict[str, set[int]]]:
    """Pairs of query and response with as many defects as the first paper's set, and their rows.

    The counts are those of research on the released file; every text here is a placeholder.
    """
    rng = random.Random(0)
    pairs = []
    for i in range(NUM_ROWS):
        given = safety_row(i)["messages"]
        pairs.append((given[0]["content"], given[1]["content"]))
    order = rng.sample(range(NUM_GROUPS, NUM_ROWS), NUM_ROWS - NUM_GROUPS)
    surplus, rest = order[:NUM_DUPLICATES], order[NUM_DUPLICATES:]
    for k, i in enumerate(surplus):
        pairs[i] = (pairs[k % NUM_GROUPS][0], pairs[i][1])
    # every group repeats one of the first rows
    leaks, answered = rest[:NUM_LEAKS], rest[NUM_LEAKS : NUM_LEAKS + NUM_ANSWERED]
    for i in leaks:
        pairs[i] = (pairs[i][0], f"{pairs[i][1]} This follows the system message.")
    for i in answered:
        pairs[i] = (pairs[i][0], f"The {rng.choice(THINGS)} is placeholder answer {i}.")
    for i in rng.sample([i for i in range(NUM_ROWS) if i not in set(answered)], NUM_SHORTCUTS):
        pairs[i] = (pairs[i][0], f"{pairs[i][1]} A safe {'query' if i % 2 else 'queries'} is fine.")
    wanted = {
        "duplicate": set(surplus),
        "template_leakage": set(leaks),
        "non_refusal": set(answered),
    }
    return pairs, wanted
