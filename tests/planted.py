"""Sound data, and faults that are planted in it: each returns the files' rows and the recipe's changes."""

import csv
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = tuple[str, str]
Plant = Callable[[list[Row], list[Row], random.Random], Sequence[str] | None]

_SUBJECTS = "the film|this story|our waiter|the hotel room|that small phone|the new teacher|my garden|her last novel|\
the old bridge|a long journey|their kitchen|the city museum|our first meeting|the evening concert|his bicycle".split(
    "|"
)
_VERBS = "seemed|looked|felt|turned out|became|remained|was called|appeared".split("|")
_GOOD = "wonderful|charming|pleasant|delightful|splendid|brilliant|lovely|superb".split("|")
_BAD = "dreadful|boring|terrible|tedious|shabby|hopeless|horrible|clumsy".split("|")
_ENDS = "when we came back from the coast|although nobody had told us about it|because the weather changed so quickly|\
after several weeks of patient work|while the neighbours were watching|and the children talked about it for days|\
as far as anybody could remember|before the winter began|in spite of everything we had read|\
once the guests had gone home|since the owner sold the house|until the lights went out again".split("|")
_WHO = "Anna|Peter|Maria|Thomas|Julia|Martin|Helen|Robert|Laura|George|Emma|Walter".split("|")
GERMAN = (
    "Gestern haben wir im Garten lange über die Bücher gesprochen, die uns der Lehrer empfohlen hatte.",
    "Die Nachbarn wissen nicht, warum der Zug heute schon wieder eine halbe Stunde zu spät gekommen ist.",
    "Wenn das Wetter morgen besser wird, fahren wir mit den Kindern an den See und bleiben bis zum Abend.",
)
RUSSIAN = "Вчера мы долго говорили о книгах, которые нам посоветовал учитель"  # noqa: RUF001


def sentence(drawn: random.Random, words: Sequence[str]) -> str:
    """A sentence that is like no other one."""
    pick = drawn.choice
    parts = [pick(_SUBJECTS), pick(_VERBS), pick(words), pick(_ENDS), f"said {pick(_WHO)} to {pick(_WHO)},"]
    return " ".join([*parts, f"and {pick(_SUBJECTS)} {pick(_VERBS)} another matter {pick(_ENDS)}"])


def reviews(count: int, seed: int) -> list[Row]:
    """Texts of two labels, which follow from several words."""
    drawn = random.Random(seed)
    return [
        (sentence(drawn, _GOOD if number % 2 else _BAD), "good" if number % 2 else "bad") for number in range(count)
    ]


def write(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as a CSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentences(count: int) -> list[dict[str, Any]]:
    """Tagged words, in which each name is a person and each city a place."""
    drawn, cities = random.Random(3), "Paris London Berlin Madrid Vienna Prague".split()
    rows = []
    for _ in range(count):
        nameless = [word for word in sentence(drawn, _GOOD).split() if word.strip(",") not in _WHO]
        words = [drawn.choice(_WHO), *nameless[:18], "in", drawn.choice(cities)]
        rows.append({"words": words, "tags": ["B-PER", *["O"] * (len(words) - 2), "B-LOC"]})
    return rows


def chats(count: int) -> list[dict[str, Any]]:
    """Questions with an answer each."""
    drawn = random.Random(5)
    return [{"prompt": sentence(drawn, _GOOD) + "?", "completion": sentence(drawn, _BAD)} for _ in range(count)]


def _each(change: Callable[[str], str], every: int = 10) -> Plant:
    """Change every tenth text."""

    def plant(train: list[Row], test: list[Row], drawn: random.Random) -> None:
        train[::every] = [(change(text), label) for text, label in train[::every]]

    return plant


def _texts(texts: Sequence[str]) -> Plant:
    """Put some texts in the place of the first ones."""

    def plant(train: list[Row], test: list[Row], drawn: random.Random) -> None:
        train[: len(texts)] = [(text, label) for text, (_, label) in zip(texts, train, strict=False)]

    return plant


def _duplicates(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train += [train[0]] * 40


def _conflicting(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train += [(f" {text.upper()}", "good") for text, label in train[:12] if label == "bad"]


def _leakage(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    test[:8] = [(text.capitalize(), label) for text, label in train[:8]]


def _near(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train += [(f"{text} today", label) for text, label in train[:30]]


def _near_leakage(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    test[:8] = [(f"{text} today", label) for text, label in train[:8]]


def _typo(train: list[Row], test: list[Row], drawn: random.Random) -> Sequence[str]:
    named = {"good": "positive", "bad": "negative"}
    for rows in (train, test):
        rows[:] = [(text, named[label]) for text, label in rows]
    train[:40:2] = [(text, "negativ") for text, _ in train[:40:2]]
    return ["task.labels=null"]


def _rare(train: list[Row], test: list[Row], drawn: random.Random) -> Sequence[str]:
    train[:4] = [(text, "neutral") for text, _ in train[:4]]
    return ["task.labels=null"]


def _dominant(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train[:] = [row for number, row in enumerate(train) if row[1] == "good" or number % 20 == 0]


def _missing(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    test[:] = [row for row in test if row[1] == "good"]


def _shifted(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train[:] = [row for number, row in enumerate(train) if row[1] == "good" or number % 6 == 0]


def _few(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    del train[60:]


def _one_word(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train[:] = [(f"{text} [src{label == 'good':d}]", label) for text, label in train]


def _length(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train[:] = [(text if label == "good" else text[: 40 + drawn.randrange(20)], label) for text, label in train]


def _flipped(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train[:20] = [(text, "good" if label == "bad" else "bad") for text, label in train[:20]]


def _cut_off(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train[:] = [(text[:100], label) for text, label in train]


def _ids(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train[:] = [(f"user_{number:05d}", label) for number, (_, label) in enumerate(train)]


def _constant(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train[: len(train) * 2 // 3] = [("see the attached file", label) for _, label in train[: len(train) * 2 // 3]]


def _few_texts(train: list[Row], test: list[Row], drawn: random.Random) -> None:
    train[:] = [(train[number % 6][0], label) for number, (_, label) in enumerate(train)]


CLASSIFICATION: dict[str, Plant] = {
    "duplicates": _duplicates,
    "conflicting_duplicates": _conflicting,
    "leakage": _leakage,
    "near_duplicates": _near,
    "near_leakage": _near_leakage,
    "similar_labels": _typo,
    "rare_label": _rare,
    "dominant_label": _dominant,
    "missing_label": _missing,
    "shifted_labels": _shifted,
    "few_rows": _few,
    "cut_texts": _each(lambda text: f"{text} {text}"),
    "long_texts": _texts([" ".join(sentence(random.Random(n), _GOOD) for n in range(40))]),
    "short_texts": _texts(["ok"]),
    "same_length": _cut_off,
    "mojibake": _each(lambda text: f"{text}, in the cafÃ©"),
    "replacement_characters": _each(lambda text: f"{text}, in the caf\ufffd"),
    "markup": _each(lambda text: f"<p>{text}<br/></p>"),
    "html_entities": _each(lambda text: f"{text} &amp; more"),
    "control_characters": _each(lambda text: f"{text}\x07"),
    "invisible_characters": _each(lambda text: text.replace("e", "e\u200b", 1)),
    "escapes": _each(lambda text: text.replace(", and", r".\n\nAnd", 1)),
    "placeholder_texts": _texts(["null", "N/A", "[deleted]", "None"]),
    "wordless_texts": _texts(["...", "?!", "- -"]),
    "foreign_script": _texts([RUSSIAN]),
    "foreign_language": _texts(GERMAN),
    "label_from_word": _one_word,
    "label_from_length": _length,
    "label_errors": _flipped,
    "id_texts": _ids,
    "constant_text": _constant,
    "few_texts": _few_texts,
}
"""Faults of classified texts, by the kind of finding that must name them."""
