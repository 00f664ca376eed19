"""Chat: answers to messages, learned from conversations."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lowres_ft.clean import require_left
from lowres_ft.errors import DataError, ModelError
from lowres_ft.tasks import _chunked, _messages, _templates
from lowres_ft.tasks._messages import Message
from lowres_ft.tasks._templates import Rendered
from lowres_ft.tasks.base import IGNORED, Batch, Encoded, Example, Form, Ragged, Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOLD = 10  # rows that are named at the most


@dataclass(frozen=True, slots=True)
class Conversation(Example):
    """Messages in turn; the last one is a question where an answer is to be written."""

    messages: list[Message]


class Chat(Task):
    """Answers in a conversation. Only what the assistant says is learned, with the token that ends its turn."""

    kind: Literal["chat"] = "chat"
    max_length: int = Field(default=512, ge=16)
    """Tokens after which a conversation is cut; memory grows with it."""
    template: Literal["own", "plain"] = "own"
    """How a conversation is written: the base's own chat template, or `User: ...`, `Assistant: ...` in plain text."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What to do with a conversation whose answers all lie beyond max_length: an error, or leave it out and name it."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer that is written, at the most."""
    samples: int = Field(default=4, ge=0, le=100)
    """Held-out questions whose answers before and after training are shown in the report."""
    control: str | None = None
    """A source of unrelated texts, in a column `text`, whose loss is told before and after: what was forgotten."""

    example: ClassVar[type[Example]] = Conversation
    model_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str] = "CAUSAL_LM"
    hub_tag: ClassVar[str] = "text-generation"
    new_head: ClassVar[bool] = False
    generates: ClassVar[bool] = True
    in_every_part: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = False
    metric_noise: ClassVar[float] = 1e-3
    packs: ClassVar[bool] = True
    base_is_baseline: ClassVar[bool] = True

    @property
    def metric(self) -> str:
        return "loss"

    @property
    def forms(self) -> tuple[Form, ...]:
        return _messages.FORMS

    def read(self, row: Mapping[str, Any], where: str) -> Conversation:
        messages = _messages.read(row, where)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn")
        return Conversation(where, messages)

    def question(self, row: Mapping[str, Any], where: str) -> Conversation:
        """The messages up to the last question; an answer that is there already is left off."""
        messages = _messages.read(row, where)
        if messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] != "user":
            raise DataError(f"{where}: no message is a user's, so there is nothing to answer")
        return Conversation(where, messages)

    def cleaned(self, example: Conversation, clean: Callable[[str], str]) -> Conversation:
        messages = [
            {**message, "content": require_left(clean(message["content"]), f"{example.where}: message {number}")}
            for number, message in enumerate(example.messages, start=1)
        ]
        return Conversation(example.where, messages)

    def keys(self, example: Conversation) -> Collection[str]:
        """Each question that is answered and each answer, in small letters and with single spaces."""
        found = []
        for before, message in zip(example.messages, example.messages[1:], strict=False):
            if message["role"] == "assistant":
                found += [f"{m['role']}: {' '.join(m['content'].casefold().split())}" for m in (before, message)]
        return found

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not tell where a token stands in the text",
                hint="Chat needs a base with a fast tokenizer (tokenizer.json).",
            )
        _templates.set_template(tokenizer, self.template)

    def encode(self, tokenizer: "PreTrainedTokenizerBase", examples: Sequence[Conversation]) -> list[list[Encoded]]:
        special = _templates.special_tokens(tokenizer) | ({_templates.end_of_turn(tokenizer)} - {""})
        for example in examples:
            _require_plain_answers(example, special)
        marks = _templates.turn_marks(tokenizer)
        rendered = [_templates.render(tokenizer, example.messages, example.where, marks) for example in examples]
        texts = [one.text for one in rendered]
        tokens = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        found: list[list[Encoded]] = []
        beyond: list[str] = []
        for example, one, ids, offsets in zip(
            examples, rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True
        ):
            chosen = _supervised(tokenizer, one, ids, offsets, example.where)
            ids, chosen = ids[: self.max_length], chosen[: self.max_length]
            kept = any(chosen[1:])
            beyond += [] if kept else [example.where]
            found.append([Encoded(ids, _next(ids, chosen))] if kept else [])
        if beyond and self.too_long == "refuse":
            raise DataError(self._beyond(beyond), hint="Raise it, shorten them, or leave them out: task.too_long=drop.")
        return found

    def _beyond(self, beyond: list[str]) -> str:
        rows = "\n  ".join(beyond[:_TOLD]) + (f"\n  and {len(beyond) - _TOLD} more" if len(beyond) > _TOLD else "")
        return f"task.max_length={self.max_length} cuts all answers off in\n  {rows}"

    def plain(self, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[Encoded]]:
        """Texts that are no conversations, every token of them an item."""
        tokens = tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return [[Encoded(ids, _next(ids, [True] * len(ids)))] for ids in tokens if len(ids) > 1]

    def loss(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        return _chunked.loss(model, batch, batch.targets != IGNORED)

    def outputs(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        """(B, T, 2): the loss of each item, and 1 where its token is the likeliest."""
        import torch

        wanted = batch.targets != IGNORED
        found = torch.zeros(*wanted.shape, 2, device=wanted.device)
        found[wanted] = _chunked.outputs(model, batch, wanted)
        return found

    def logits(self, model: "PreTrainedModel", batch: Batch) -> "Tensor":
        """(B, V) logits of the token that would follow each sequence."""
        import torch

        last = torch.zeros_like(batch.mask, dtype=torch.bool)
        last[torch.arange(len(last)), batch.mask.sum(1) - 1] = True
        return _chunked.logits(model, batch, last)

    def evidence(self, truth: Ragged, outputs: Ragged) -> "np.ndarray":
        """(R, 3): the sum of the losses, the tokens that were the likeliest, and all tokens."""
        import numpy as np

        summed = np.zeros((len(truth), 3))
        np.add.at(summed[:, :2], outputs.row_of, outputs.values)
        summed[:, 2] = np.diff(truth.starts)
        return summed

    def metrics(self, evidence: "np.ndarray") -> dict[str, float]:
        """Means over tokens; the perplexity is exp(loss)."""
        import numpy as np

        loss, hits, tokens = evidence.sum(0)
        mean = float(loss / max(tokens, 1))
        return {
            "loss": mean,
            "perplexity": float(np.exp(min(mean, 700.0))),
            "token_accuracy": float(hits / max(tokens, 1)),
        }

    def details(self, evidence: "np.ndarray") -> dict[str, Any]:
        return {"tokens": int(evidence[:, 2].sum())}

    def ranking(self, truth: Ragged, outputs: Ragged) -> "dict[str, np.ndarray]":
        """Worst is the greatest loss a token."""
        loss, _, tokens = self.evidence(truth, outputs).T
        return {"worst": loss / tokens.clip(1)}

    def shown(self, example: Conversation, truth: "np.ndarray", output: "np.ndarray") -> dict[str, str]:
        """The last answer, and what it follows; the model's answer is not written for it."""
        last = max(index for index, message in enumerate(example.messages) if message["role"] == "assistant")
        asked = example.messages[last - 1]["content"] if last else ""
        loss, hits = output.mean(0)
        figures = f"loss {loss:.3f} a token, {hits:.1%} of {len(output)} tokens the likeliest"
        return {"text": asked, "wanted": example.messages[last]["content"], "found": figures}

    def prediction(self, example: Conversation, output: str) -> dict[str, Any]:
        return {"messages": example.messages, "answer": output}


def _require_plain_answers(example: Conversation, special: set[str]) -> None:
    """Refuse answers that hold special tokens: the model would learn to end in the middle, or to speak for the user."""
    for number, message in enumerate(example.messages, start=1):
        found = [token for token in special if token in message["content"]]
        if found and message["role"] == "assistant":
            raise DataError(
                f"{example.where}: message {number} holds {max(found, key=len)}, a special token of the base",
                hint="Answers are plain text, without the marks of a chat template: those are written by lowres-ft.",
            )


def _next(ids: list[int], chosen: Sequence[bool]) -> list[int]:
    """The target at each token is the one that follows it, where that one is chosen."""
    return [token if wanted else IGNORED for token, wanted in zip(ids[1:], chosen[1:], strict=True)] + [IGNORED]


def _supervised(
    tokenizer: "PreTrainedTokenizerBase", one: Rendered, ids: list[int], offsets: list[tuple[int, int]], where: str
) -> list[bool]:
    """Which tokens hold characters of an answer, checked by decoding them.

    Raises:
        DataError: They do not give the answers back.
    """
    spans = list(_spans(one.text, offsets))
    chosen = [any(max(start, begin) < min(stop, end) for begin, end in one.answers) for start, stop in spans]
    decoded = _bare(tokenizer, tokenizer.decode([token for token, wanted in zip(ids, chosen, strict=True) if wanted]))
    said = _bare(tokenizer, "".join(one.text[begin:end] for begin, end in one.answers))
    if decoded == said:
        return chosen
    if lost := sorted(set(said) - set(decoded)):
        told = ", ".join(map(repr, lost[:_TOLD]))
        raise DataError(
            f"{where}: the base's tokenizer has no tokens for {told}, so the answer cannot be learned as it stands",
            hint="Mend or remove the row, or use another base.",
        )
    raise DataError(f"{where}: the tokens of the answers, decoded, are {decoded!r}, not the answers {said!r}")


def _spans(text: str, offsets: Sequence[tuple[int, int]]) -> "Iterator[tuple[int, int]]":
    """The characters of each token, with the spaces before it that tokenizers like GPT-2's leave out of its offsets."""
    before = 0
    for start, stop in offsets:
        yield (before if text[before:start].isspace() else start), stop
        before = max(before, stop)


def _bare(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """A text as a tokenizer writes it (Qwen's composes accents), without spaces, on which decoders differ."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    written = text if normalizer is None else normalizer.normalize_str(text)
    return "".join(written.replace("\u2581", " ").split())  # SentencePiece's mark for a space
