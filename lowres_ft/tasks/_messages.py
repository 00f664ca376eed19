"""Conversations: the forms in which people keep them, read into one list of messages."""

from collections.abc import Mapping
from typing import Any

from lowres_ft.errors import DataError, nearest
from lowres_ft.tasks.base import Form

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

FORMS = (
    Form(given=("messages",)),
    Form(given=("conversations",), optional=("system",)),
    Form(given=("instruction",), wanted=("output",), optional=("input", "system")),
    Form(given=("prompt",), wanted=("completion",), optional=("system",)),
    Form(given=("text",), wanted=("answer",)),
)
"""Lists of messages, ShareGPT's, Alpaca's, and a question beside its answer."""
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_KEYS = (("role", "from"), ("content", "value"))
_UNREAD = ("tool_calls", "function_call")
"""Keys of a message that say something which is no text."""
_QUESTIONS = ("instruction", "prompt", "text")
_ANSWERS = ("output", "completion", "answer")


def read(row: Mapping[str, Any], where: str) -> list[Message]:
    """The messages of a row whose values are named by the roles of one of the `FORMS`.

    Raises:
        DataError: It holds no conversation; the message names `where` and the number of the message.
    """
    listed = next((role for role in ("messages", "conversations") if role in row), None)
    if listed is None:
        return _pair(row, where)
    items = row[listed]
    if not isinstance(items, list) or not items:
        raise DataError(f"{where}: {listed} is {_shown(items)}, not a list of messages", hint=_LIST)
    spoken = [(number, item) for number, item in enumerate(items, start=1) if number > 1 or not _is_blank(item)]
    found = [_message(item, f"{where}: message {number}") for number, item in spoken or enumerate(items, start=1)]
    if row.get("system"):
        opening = {"role": "system", "content": _text(row["system"], f"{where}: the system message")}
        if found[0]["role"] != "system":
            found.insert(0, opening)
        elif found[0] != opening:
            raise DataError(
                f"{where}: the column system says otherwise than the system message that opens {listed}",
                hint="Leave one of them out.",
            )
    _check_order(found, where)
    return found


def _pair(row: Mapping[str, Any], where: str) -> list[Message]:
    """A question, its input below it where there is one, and its answer if it is there."""
    asked = next(role for role in _QUESTIONS if role in row)
    question = _text(row[asked], f"{where}: the {asked}")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], f"{where}: the input")
    found = [{"role": "user", "content": question}]
    if row.get("system"):
        found.insert(0, {"role": "system", "content": _text(row["system"], f"{where}: the system message")})
    answers = (_text(row[role], f"{where}: the {role}") for role in _ANSWERS if role in row)
    return [*found, *({"role": "assistant", "content": answer} for answer in answers)]


def _is_blank(item: object) -> bool:
    """Whether a message is a system message that says nothing, which many data sets put first."""
    return (
        isinstance(item, dict)
        and "system" in (item.get("role"), item.get("from"))
        and not (item.get("content") or item.get("value"))
    )


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{where} is {_shown(item)}, not an object", hint=_LIST)
    # In Parquet every message has all the keys that any has, and None for those that it has not.
    role, content = (next((item[key] for key in keys if item.get(key) is not None), None) for keys in _KEYS)
    if not isinstance(role, str) or role not in _ROLES:
        found = f"the role {_shown(role)}{nearest(str(role), _ROLES)}" if role is not None else "no role"
        raise DataError(f"{where} has {found}", hint=f"Roles are {', '.join(_ROLES)}.")
    if unread := next((key for key in _UNREAD if item.get(key)), None):
        raise DataError(f"{where} has {unread}, which cannot be learned", hint="Only what is said is; leave it out.")
    if item.get("weight") not in (None, 1):
        raise DataError(
            f"{where} has the weight {_shown(item['weight'])}, but all answers count alike",
            hint="Leave the key out, or end the conversation before an answer that is not to be learned.",
        )
    what = "the answer" if _ROLES[role] == "assistant" else f"what the {_ROLES[role]} says"
    return {"role": _ROLES[role], "content": _text(content, f"{where}: {what}")}


def _text(value: object, what: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{what} is empty")
    if not isinstance(value, str):
        raise DataError(f"{what} is {_shown(value)}, which is not text")
    return value


def _check_order(messages: list[Message], where: str) -> None:
    """A system message opens, a user speaks before an assistant does, and no one speaks twice in a row."""
    before = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number > 1:
            raise DataError(f"{where}: message {number} is a system message, which can only be the first")
        if role == "assistant" and before in ("", "system"):
            raise DataError(f"{where}: message {number} is an answer, but no question stands before it")
        if role == before:
            raise DataError(
                f"{where}: messages {number - 1} and {number} are both the {role}'s", hint="Join them into one."
            )
        before = role


def _shown(value: object, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


_LIST = 'A message is an object such as {"role": "user", "content": "Hello."}.'
