"""Answers that a chat model writes, token by token."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from lowres_ft import clean
from lowres_ft.bundle import Bundle
from lowres_ft.errors import BundleError, DataError
from lowres_ft.model import Adapted
from lowres_ft.tasks import _templates
from lowres_ft.tasks._messages import Message
from lowres_ft.tasks.chat import Chat, Conversation

Heard = Callable[[str], Any]
"""Called with each piece of an answer as it is written."""

# What is left out is taken from the base's generation_config.json, which may punish repeats or draw tokens.
_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


class Writer:
    """Writes the answers of a model that was adapted to chat."""

    def __init__(self, adapted: Adapted, *, max_new_tokens: int | None = None, temperature: float = 0.0) -> None:
        """`temperature` 0 takes the likeliest token each time; above, tokens are drawn."""
        assert isinstance(adapted.task, Chat)
        self.adapted = adapted
        self.most = max_new_tokens or adapted.task.max_new_tokens
        drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else _GREEDY
        self.ends = _templates.answer_ends(adapted.tokenizer, adapted.model)
        self.config = GenerationConfig(
            max_new_tokens=self.most, eos_token_id=self.ends, pad_token_id=adapted.tokenizer.pad_token_id, **drawn
        )

    def __call__(self, example: Conversation, heard: Heard | None = None) -> str:
        """The answer to the last question of a conversation.

        Raises:
            DataError: The conversation leaves no room for an answer.
        """
        adapted = self.adapted
        ids = self._prompt(example)
        room = self._room()
        if room is not None and len(ids) + self.most > room:
            raise DataError(
                f"{example.where}: the conversation has {len(ids)} tokens, and with {self.most} for the answer that is "
                f"more than the {room} of this model",
                hint="Shorten it, or ask for fewer tokens.",
            )
        streamer = None if heard is None else _Heard(self._text, heard)
        was_training = adapted.model.training
        adapted.model.eval()
        try:
            prompt = torch.tensor([ids], device=adapted.device)
            with torch.inference_mode(), adapted.computing():
                found = adapted.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=self.config, streamer=streamer
                )
        finally:
            adapted.model.train(was_training)
        return self._text(found[0, len(ids) :].tolist())

    def fits(self, example: Conversation) -> bool:
        """Whether a conversation leaves room for an answer."""
        room = self._room()
        return room is None or len(self._prompt(example)) + self.most <= room

    def _text(self, ids: list[int]) -> str:
        """What tokens of an answer say; the one that ends it may be marked as no special one."""
        ids = ids[:-1] if ids and ids[-1] in self.ends else ids
        text = self.adapted.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _prompt(self, example: Conversation) -> list[int]:
        """Token ids of a conversation up to where the next answer begins."""
        text = _templates.prompt(self.adapted.tokenizer, example.messages, example.where)
        ids: list[int] = self.adapted.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _room(self) -> int | None:
        """Tokens that a conversation and its answer may have; None where the model names no limit."""
        most = getattr(self.adapted.model.config.get_text_config(), "max_position_embeddings", None)
        return int(most) if most else None


class _Heard(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Hands on the text that is certain, without the prompt, the token that ends the turn, and spaces around it.

    All tokens are decoded each time: a token by itself may lose a space, or be a part of a character.
    """

    def __init__(self, text_of: Callable[[list[int]], str], heard: Heard) -> None:
        self.text_of = text_of
        self.heard = heard
        self.ids: list[int] | None = None
        self.said = ""

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers, first with the prompt, then with each token."""
        if self.ids is None:
            self.ids = []
        else:
            self.ids += value.flatten().tolist()
            self._say(self.text_of(self.ids).rstrip("\ufffd").rstrip())

    def end(self) -> None:
        """Called by transformers."""
        self._say(self.text_of(self.ids or []))

    def _say(self, text: str) -> None:
        if text.startswith(self.said) and text != self.said:
            self.heard(text[len(self.said) :])
            self.said = text


class Session:
    """A conversation that goes on; when it grows too long for the model, its first turns are left out."""

    def __init__(self, writer: Writer, *, system: str | None = None) -> None:
        self.writer = writer
        self.clean = clean.cleaner(writer.adapted.cleaners)
        self.opening = (
            [] if system is None else [{"role": "system", "content": self._cleaned(system, "the system message")}]
        )
        self.turns: list[Message] = []
        self.forgotten = 0
        """Turns that were left out so far."""

    def reset(self) -> None:
        """Begin anew."""
        self.turns, self.forgotten = [], 0

    def say(self, text: str, heard: Heard | None = None) -> str:
        """Send a message and return the answer.

        Raises:
            DataError: The message alone leaves no room for an answer, is not UTF-8, or is empty once it is cleaned.
        """
        self.turns.append({"role": "user", "content": self._cleaned(text, "the message")})
        while len(self.turns) > 1 and not self.writer.fits(self._example()):
            del self.turns[:2]
            self.forgotten += 1
        try:
            answer = self.writer(self._example(), heard)
        except DataError:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _cleaned(self, text: str, what: str) -> str:
        text = clean.require_utf8(text, what)
        return clean.require_left(self.clean(text), what) if self.writer.adapted.cleaners else text

    def _example(self) -> Conversation:
        return Conversation("this conversation", [*self.opening, *self.turns])


def unknown_ends(adapted: Adapted) -> list[int]:
    """Ids that end an answer, where the model by itself does not stop after each of them; else none."""
    if not adapted.task.generates:
        return []
    found = _templates.answer_ends(adapted.tokenizer, adapted.model)
    return [] if _templates.own_ends(adapted.model).issuperset(found) else found


def require_chat(bundle: Bundle) -> None:
    """Refuse a bundle that does not write.

    Raises:
        BundleError: It labels texts.
    """
    if not bundle.recipe.task.generates:
        raise BundleError(
            f"{bundle.folder} was trained for {bundle.passport.task}, not for chat", hint="Use lowres-ft predict."
        )
