"""Chat templates: a conversation as one text, and where its answers stand in it.

Answers are found by rendering the conversation a second time with a mark in place of each answer: what stands
between the marks stands around the answers too. So no part is tokenized by itself, and no template needs marks of
its own for generation (`return_assistant_tokens_mask` gives only zeros, silently, where it has none).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowres_ft.errors import DataError, ModelError, first_line
from lowres_ft.tasks._messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The template called `plain`: "User: ...", "Assistant: ..." and the end-of-text token after each answer."""
_MARK = "\ue000answer{}\ue001"  # from the private use area, where no conversation has anything to say


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
        tokenizer.chat_template = PLAIN
    elif not tokenizer.chat_template:
        raise ModelError(
            "the base has no chat template, so it is not known how a conversation is written for it",
            hint="Use a base that was trained to chat, or task.template=plain.",
        )


def prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str) -> str:
    """A conversation as one text, up to where the next answer begins.

    Raises:
        DataError: The template refuses it; the message names `where`.
    """
    return _apply(tokenizer, messages, where, more=True)


def render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str) -> Rendered:
    """A conversation as one text, and where its answers stand.

    Raises:
        DataError: The template refuses it, or changes an answer; the message names `where`.
    """
    text = _apply(tokenizer, messages, where, more=False)
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    marked = [dict(message) for message in messages]
    for index in places:
        marked[index]["content"] = _MARK.format(index)
    frame = _apply(tokenizer, marked, where, more=False)
    found: list[tuple[int, int]] = []
    at = 0
    for index in places:
        before, mark, frame = frame.partition(_MARK.format(index))
        content = messages[index]["content"]
        content = content if text.startswith(before + content, at) else content.strip()  # Llama's and Gemma's trim it
        if not mark or not text.startswith(before + content, at):
            raise DataError(
                f"{where}: the chat template changes message {index + 1}, so its characters cannot be told",
                hint="Does the answer hold marks of the template, such as <think>? Take them out, or use another base.",
            )
        start = at + len(before)
        at = start + len(content)
        found.append((start, at + _ending(tokenizer, frame)))
    if text[at:] != frame:
        raise DataError(f"{where}: the chat template writes other text after the answers than without them")
    if found and found[-1][1] == at and not text[at:].strip() and tokenizer.eos_token:
        # A template that ends no turn: the end-of-text token tells the model to stop.
        text, found[-1] = text[:at] + tokenizer.eos_token, (found[-1][0], at + len(tokenizer.eos_token))
    return Rendered(text, tuple(found))


def turn_ends(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of the tokens after which an answer is over: the end of text, and the template's end of turn."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = render(tokenizer, messages, "chat template")
    start, stop = rendered.answers[0]
    ids = tokenizer(rendered.text[start:stop].strip(), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    found = {ids[-1]} & special
    return sorted(found | ({tokenizer.eos_token_id} - {None}))


def _ending(tokenizer: "PreTrainedTokenizerBase", after: str) -> int:
    """Characters up to the end of the special token that follows an answer; 0 where none does."""
    blank = len(after) - len(after.lstrip())
    special = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    special |= set(tokenizer.all_special_tokens)
    ends = [len(token) for token in special if token and after.startswith(token, blank)]
    return blank + max(ends) if ends else 0


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], where: str, *, more: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=more))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: the base's chat template refuses this conversation: {first_line(error)}") from error
