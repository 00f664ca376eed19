"""Chat templates: a conversation as one text, and where its answers stand in it.

Answers are found by rendering the conversation a second time with a mark in place of each answer: what stands
between the marks stands around the answers too. So no part is tokenized by itself, and no template needs marks of
its own for generation (`return_assistant_tokens_mask` gives only zeros, silently, where it has none).
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowres_ft.errors import DataError, ModelError, first_line
from lowres_ft.tasks._messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The template called `plain`: "User: ...", "Assistant: ..." and the end-of-text token after each answer."""
_MARK = "\ue000answer\ue001"  # from the private use area, where no conversation has anything to say
_SHORTEST: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text, and the characters of its answers, each with the token that ends its turn."""

    text: str
    answers: tuple[tuple[int, int], ...]


def set_template(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Make sure that a tokenizer has a chat template: its own, or the one that is called `plain`.

    Raises:
        ModelError: It has none of its own, or no token to end a turn with.
    """
    if name == "plain":
        if tokenizer.eos_token is None:
            raise ModelError("task.template=plain ends answers with the end-of-text token, which this base has not")
        tokenizer.chat_template = ("{{ bos_token }}" if _begins(tokenizer) else "") + PLAIN
    elif not tokenizer.chat_template:
        raise ModelError(
            "the base has no chat template, so it is not known how a conversation is written for it",
            hint="Use a base that was trained to chat, or task.template=plain.",
        )
    elif not turn_ends(tokenizer):
        raise ModelError(
            "the base's chat template ends an answer with no token of its own, and the base has no end-of-text token, "
            "so answers would never end",
            hint="Use another base.",
        )
    else:
        _let_answers_be_asked_for(tokenizer)


def _let_answers_be_asked_for(tokenizer: "PreTrainedTokenizerBase") -> None:
    """See that a template asks for an answer with the very text after which answers are learned.

    One that does not know `add_generation_prompt` is completed by what it writes before an answer.

    Raises:
        ModelError: It asks otherwise, as those do that let a model think first.
    """
    asked = _apply(tokenizer, _SHORTEST[:1], "chat template", more=True)
    before, _, _ = _apply(tokenizer, _marked(_SHORTEST), "chat template", more=False).partition(_MARK)
    opening = before.removeprefix(asked)
    if "".join(asked.split()) == "".join(before.split()):
        return
    unasked = asked == _apply(tokenizer, _SHORTEST[:1], "chat template", more=False)
    if not (unasked and before.startswith(asked) and isinstance(tokenizer.chat_template, str)):
        raise ModelError(
            f"the base's chat template asks for an answer with {asked[-40:]!r}, but writes answers after "
            f"{before[-40:]!r}, so what is learned would not be asked for",
            hint="Use a base that answers without thinking first, or task.template=plain.",
        )
    written = json.dumps(opening.rstrip(" "), ensure_ascii=False)  # a space before a word belongs to its token
    tokenizer.chat_template += f"{{% if add_generation_prompt %}}{{{{ {written} }}}}{{% endif %}}"


def _begins(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a base's texts begin with a token of their own; Gemma's are unlike themselves without."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token is not None and ids[:1] == [tokenizer.bos_token_id]


def prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str) -> str:
    """A conversation as one text, up to where the next answer begins.

    Raises:
        DataError: The template refuses it; the message names `where`.
    """
    return _apply(tokenizer, messages, where, more=True)


def render(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str, marks: Collection[str]
) -> Rendered:
    """A conversation up to its last answer as one text, and where its answers stand; `marks` are `turn_marks`.

    Raises:
        DataError: The template refuses it, or changes an answer; the message names `where`.
    """
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    messages = messages[: max(places, default=len(messages)) + 1]
    text = _apply(tokenizer, messages, where, more=False)
    pieces = _apply(tokenizer, _marked(messages), where, more=False).split(_MARK)
    if len(pieces) != len(places) + 1:
        raise DataError(f"{where}: the chat template does not write each answer once")
    end = _end_of_turn(marks, pieces[-1])
    at = len(pieces[0])
    found: list[tuple[int, int]] = []
    if not text.startswith(pieces[0]):
        raise _changed(where, places[0])
    for index, after in zip(places, pieces[1:], strict=True):
        kept = next((kept for kept in _trims(messages[index]["content"]) if text.startswith(kept + after, at)), None)
        if kept is None:
            raise _changed(where, index)
        stop = at + len(kept)
        found.append((at, stop + (after.index(end) + len(end) if end and after.lstrip().startswith(end) else 0)))
        at = stop + len(after)
    if found and not end and tokenizer.eos_token:  # the template ends no turn: the end-of-text token tells to stop
        text = text[: found[-1][1]] + tokenizer.eos_token
        found[-1] = (found[-1][0], len(text))
    return Rendered(text, tuple(found))


def _changed(where: str, index: int) -> DataError:
    return DataError(
        f"{where}: the chat template changes message {index + 1}, so its characters cannot be told",
        hint="Does the answer hold marks of the template, such as <think>? Take them out, or use another base.",
    )


def _marked(messages: Sequence[Message]) -> list[Message]:
    return [message | {"content": _MARK} if message["role"] == "assistant" else message for message in messages]


def _trims(answer: str) -> Iterator[str]:
    """An answer as templates write it: as it is, or without spaces or line ends around it."""
    yield answer
    for marks in (None, "\n"):  # Llama's and Gemma's trim both sides, Qwen3's takes line ends off the left
        yield from (answer.strip(marks), answer.lstrip(marks), answer.rstrip(marks))


def turn_marks(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The texts of the tokens that may end a turn; looking them up takes milliseconds where there are thousands."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}  # some makers mark it as no special one
    return added | set(tokenizer.all_special_tokens)


def _end_of_turn(marks: Collection[str], after: str) -> str:
    """The token that a template writes after a conversation's last answer; empty where it writes none."""
    following = after.lstrip()
    return max((token for token in marks if following.startswith(token)), key=len, default="")


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The texts of the tokens that stand for no text."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The token that the template writes after an answer; empty where it writes none."""
    frame = _apply(tokenizer, _marked(_SHORTEST), "chat template", more=False)
    return _end_of_turn(turn_marks(tokenizer), frame.rpartition(_MARK)[2])


def turn_ends(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of the tokens after which an answer is over: the end of text, and the template's end of turn."""
    end = end_of_turn(tokenizer)
    found = {tokenizer.convert_tokens_to_ids(end)} if end else set()
    return sorted(found | ({tokenizer.eos_token_id} - {None}))


def answer_ends(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> list[int]:
    """Those, and the ids after which a model stops by itself."""
    return sorted({*turn_ends(tokenizer), *own_ends(model)})


def own_ends(model: "PreTrainedModel") -> set[int]:
    """Ids after which a model stops wherever it writes (`generation_config.eos_token_id`)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return {*(own if isinstance(own, list) else [own])} - {None}


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str, *, more: bool) -> str:
    """What a template makes of messages; those that can think are asked not to, as training shows no thoughts."""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=more, enable_thinking=False
            )
        )
    except MemoryError:
        raise
    except Exception as error:  # what a template holds is anyone's
        raise DataError(f"{where}: the base's chat template refuses this conversation: {first_line(error)}") from error
