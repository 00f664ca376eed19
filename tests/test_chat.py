"""Chat: tokens and targets, the loss under any cut, metrics, splits, and what is refused before or while it trains."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from lowres_ft import contrast, data, evaluate, profiles
from lowres_ft.batches import Tokens, collate
from lowres_ft.errors import DataError, ModelError, RecipeError
from lowres_ft.pipeline import run
from lowres_ft.preparing import rehearse
from lowres_ft.splits import Keys, split
from lowres_ft.tasks.base import IGNORED, Batch, Ragged
from lowres_ft.tasks.chat import Chat, Conversation
from lowres_ft.train import train
from tests import tiny, tiny_chat
from tests.conftest import Prepared, prepare

ARCHITECTURES = tuple(tiny_chat.BASES)
Bases = Callable[..., Path]


def prepared(
    chat_bases: Bases, chats: Path, work: Path, architecture: str = "llama", *overrides: str, **plan: Any
) -> Prepared:
    template = ["task.template=plain"] if architecture == "gpt2" else []
    return prepare(tiny_chat.recipe(chat_bases(architecture), chats, *template, *overrides), work, **plan)


def talk(*turns: str) -> Conversation:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]
    return Conversation("a.jsonl:1", messages)


def whole(tokens: Tokens, ready: Prepared) -> Batch:
    return collate(tokens, np.arange(len(tokens.lengths)), ready.adapted)


# Tokens and targets


def test_the_target_at_a_token_is_the_one_that_follows():
    words = tiny_chat.tokenizer("smollm2")
    ((one,),) = Chat().encode(words, [talk("a", "b")])
    assert words.decode(one.ids[-4:]) == "assistant\nb<|im_end|>\n"[-len(words.decode(one.ids[-4:])) :]
    b, end = words.convert_tokens_to_ids(["b", "<|im_end|>"])
    assert one.targets[-4:] == [b, end, IGNORED, IGNORED]
    assert set(one.targets[:-4]) == {IGNORED}
    assert one.ids[-3:-1] == [b, end]


def test_padding_is_never_an_item_although_it_is_the_end_of_turn(chat_bases: Bases, chats: Path, tmp_path: Path):
    ready = prepared(chat_bases, chats, tmp_path)
    words, batch = ready.adapted.tokenizer, whole(ready.tokens["train"], ready)
    assert words.pad_token_id == words.eos_token_id
    assert bool((batch.mask == 0).any())
    assert bool((batch.targets[batch.mask == 0] == IGNORED).all())
    assert ((batch.targets == words.eos_token_id).sum(1) == 1).all()


def test_an_answer_that_is_cut_is_learned_as_far_as_it_goes():
    words = tiny_chat.tokenizer("smollm2")
    ((full,),) = Chat().encode(words, [talk("a", "b c d e f g h")])
    first = next(at for at, target in enumerate(full.targets) if target != IGNORED)
    ((cut,),) = Chat(max_length=first + 4).encode(words, [talk("a", "b c d e f g h")])
    assert cut.ids == full.ids[: first + 4]
    assert cut.targets == [*full.targets[: first + 3], IGNORED]
    with pytest.raises(DataError, match=f"task.max_length={first + 1} cuts all answers off"):
        Chat(max_length=first + 1).encode(words, [talk("a", "b c d e f g h")])
    ((least,),) = Chat(max_length=first + 2).encode(words, [talk("a", "b c d e f g h")])
    assert sum(target != IGNORED for target in least.targets) == 1


LONG = {"messages": [{"role": "user", "content": "What? " * 60}, {"role": "assistant", "content": "That."}]}


def test_rows_whose_answers_all_fall_away_are_refused_by_name(chat_bases: Bases, tmp_path: Path):
    mine = tiny_chat.chats(tmp_path / "mine.jsonl", [*tiny_chat.CHATS[:6], LONG, *tiny_chat.CHATS[6:]])
    with pytest.raises(DataError, match=r"task.max_length=96 cuts all answers off in\n  .*mine.jsonl:7$") as caught:
        run(tiny_chat.recipe(chat_bases(), mine), tmp_path / "bundle", device_name="cpu")
    assert "task.too_long=drop" in caught.value.hint
    assert not (tmp_path / "bundle").exists()


def test_many_are_counted():
    words = tiny_chat.tokenizer("smollm2")
    with pytest.raises(DataError, match=r"\n  and 5 more$"):
        Chat(max_length=16).encode(words, [talk("a " * 50, "b")] * 15)
    assert Chat(max_length=16, too_long="drop").encode(words, [talk("a " * 50, "b")] * 15) == [[]] * 15


def test_rows_that_are_dropped_are_named_and_not_counted(chat_bases: Bases, tmp_path: Path):
    rows = [*tiny_chat.CHATS[:6], LONG, *tiny_chat.CHATS[6:16]]
    mine = tiny_chat.chats(tmp_path / "mine.jsonl", rows)
    held = tiny_chat.chats(tmp_path / "held.jsonl", [LONG, *tiny_chat.CHATS[16:]])
    overrides = ["task.too_long=drop", "train.steps=null", "train.epochs=1", "data.validation=null"]
    wanted = tiny_chat.recipe(chat_bases(), mine, *overrides, f"data.test={held}", "train.batch_size=16")
    report = json.loads((run(wanted, tmp_path / "bundle", device_name="cpu").folder / "report.json").read_text())
    assert [note for note in report["notes"] if not note.startswith("check: ")] == [
        "1 of 9 test texts stand in train too; scored with and without",
        f"1 rows of train are left out: {mine}:7",
        f"1 rows of test are left out: {held}:1",
    ]
    assert report["measured"]["steps"] == 1
    assert report["scores"]["test"]["loss"]["count"] == 8


# The loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_that_of_transformers(architecture: str, chat_bases: Bases, chats: Path, tmp_path: Path):
    ready = prepared(chat_bases, chats, tmp_path, architecture)
    batch = whole(ready.tokens["train"], ready)
    labels = torch.full_like(batch.ids, IGNORED)
    labels[:, 1:] = batch.targets[:, :-1]
    model, task = ready.adapted.model, ready.adapted.task
    with torch.inference_mode():
        theirs = model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        ours = task.loss(model, batch) / task.counted(batch.targets.numpy())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_any_cut_of_a_step_gives_the_same_gradient(
    architecture: str, method: str, chat_bases: Bases, chats: Path, tmp_path: Path
):
    found = []
    for number, tokens in enumerate((1, 200, 100_000)):
        ready = prepared(
            chat_bases,
            chats,
            tmp_path / str(number),
            architecture,
            f"method.kind={method}",
            "train.batch_size=16",
            micro_batch_tokens=tokens,
        )
        step = next(train(ready.start(), ready.tokens["train"], ready.plan, ready.machine))
        gradients = [p.grad.flatten() for p in ready.adapted.trained().values() if p.grad is not None]
        found.append((step.loss, torch.cat(gradients)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_are_those_of_the_full_forward(architecture: str, chat_bases: Bases, chats: Path, tmp_path: Path):
    ready = prepared(chat_bases, chats, tmp_path, architecture)
    batch, task, model = whole(ready.tokens["test"], ready), ready.adapted.task, ready.adapted.model
    with torch.inference_mode():
        outputs, last = task.outputs(model, batch), task.logits(model, batch)
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    wanted = batch.targets != IGNORED
    loss = -logits.log_softmax(-1)[wanted].gather(1, batch.targets[wanted][:, None])[:, 0]
    torch.testing.assert_close(outputs[wanted][:, 0], loss, atol=1e-4, rtol=1e-4)
    assert torch.equal(outputs[wanted][:, 1], (logits.argmax(-1) == batch.targets)[wanted].float())
    assert not outputs[~wanted].any()
    ends = batch.mask.sum(1) - 1
    torch.testing.assert_close(last, logits[torch.arange(len(ends)), ends], atol=1e-4, rtol=1e-4)


# Scores


def ragged(*rows: list[Any]) -> Ragged:
    return Ragged.of([np.array(row) for row in rows])


def test_metrics_of_a_known_case():
    task = Chat()
    truth = ragged([4, 5], [6])
    evidence = task.evidence(truth, ragged([[1.0, 1.0], [2.0, 0.0]], [[6.0, 1.0]]))
    assert evidence.tolist() == [[3.0, 1.0, 2.0], [6.0, 1.0, 1.0]]
    assert task.metrics(evidence) == {
        "loss": 3.0,
        "perplexity": pytest.approx(np.exp(3.0)),
        "token_accuracy": pytest.approx(2 / 3),
    }
    assert task.details(evidence) == {"tokens": 3}
    assert task.metrics(np.array([[1e6, 0, 1]]))["perplexity"] < float("inf")


def test_a_lower_loss_is_the_better_one():
    task, truth = Chat(), ragged([4], [5])
    good, bad = (ragged([[loss, 0.0]], [[loss, 0.0]]) for loss in (1.0, 3.0))
    gain = evaluate.difference(task, truth, good, bad)
    assert (gain.value, gain.low, gain.high) == (2.0, 2.0, 2.0)
    assert evaluate.difference(task, truth, bad, good).value == -2.0


def test_early_stopping_keeps_the_lowest_loss(chat_bases: Bases, chats: Path, tmp_path: Path):
    ready = prepared(chat_bases, chats, tmp_path, "llama", "train.early_stopping.patience=2", "train.steps=9")
    state = ready.start()
    kept: list[dict[str, torch.Tensor]] = []
    losses = [3.0, 2.0, 2.5, 2.1]
    steps = train(state, ready.tokens["train"], ready.plan, ready.machine)
    for loss, _ in zip(losses, steps, strict=False):
        kept.append({name: tensor.clone() for name, tensor in ready.adapted.tensors().items()})
        state.record(loss)
    assert (state.best_step, state.best_metric, state.finished) == (2, 2.0, True)
    state.restore_best()
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in ready.adapted.tensors().items())


# Splits


def test_keys_are_questions_that_are_answered_and_answers():
    task = Chat()
    both = task.keys(talk("What  IS\nit?", "That.", "And?"))
    assert list(both) == ["user: what is it?", "assistant: that."]
    assert set(task.keys(talk("a", "a"))) == {"user: a", "assistant: a"}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=20, max_size=60), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_equal_questions_and_answers_stay_on_one_side(pairs: list[tuple[int, int]], seed: int):
    task = Chat()
    rows = [task.keys(talk(f"question {asked}", f"answer {said}")) for asked, said in pairs]
    keys = ragged(*[[data.key(text) for text in row] for row in rows])
    with suppress(DataError):  # all rows hang together
        parts = split(Keys(keys, [()] * len(rows)), task, {"validation": 0.2, "test": 0.2}, seed)
        require_apart(rows, parts)


def require_apart(rows: list[Any], parts: dict[str, np.ndarray]) -> None:
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(rows)))
    texts = [{text for row in part for text in rows[row]} for part in parts.values()]
    for index, own in enumerate(texts):
        for other in texts[index + 1 :]:
            assert not own & other


def test_distinct_leaves_repeats_out_and_tells(chat_bases: Bases, tmp_path: Path):
    mine = tiny_chat.chats(tmp_path / "mine.jsonl", [*tiny_chat.CHATS, *tiny_chat.CHATS[:5]])
    found = data.load(tiny_chat.recipe(chat_bases(), mine, "data.distinct=true"), tmp_path)
    assert sum(map(len, found.splits().values())) == len(tiny_chat.CHATS)
    assert found.notes == ("5 of 29 rows of train repeat an earlier one and are left out",)


# What is refused


def test_method_head_is_refused_with_the_recipe(chat_bases: Bases, chats: Path):
    with pytest.raises(RecipeError, match=r"method.kind: head trains the task's head alone, and chat has none"):
        tiny_chat.recipe(chat_bases(), chats, "method.kind=head")
    tiny_chat.recipe(chat_bases(), chats, "method.kind=full")


def test_a_base_without_a_template_is_told_before_weights_are_read(chat_bases: Bases, chats: Path, tmp_path: Path):
    wanted = tiny_chat.recipe(chat_bases("gpt2"), chats)
    with pytest.raises(ModelError, match="the base has no chat template"):
        run(wanted, tmp_path / "bundle", device_name="cpu")


def test_a_base_that_lacks_its_output_layer_is_refused(chat_bases: Bases, chats: Path, tmp_path: Path):
    folder = tiny_chat.base(tmp_path / "base", "llama", tied=False)
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    with pytest.raises(ModelError, match="brings no lm_head of its own, which chat needs"):
        run(tiny_chat.recipe(folder, chats), tmp_path / "bundle", device_name="cpu")


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_base_that_sees_what_it_is_to_write_is_refused(
    architecture: str, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = tiny_chat.tokenizer("smollm2")
    fields = tiny.ARCHITECTURES[architecture] | {"vocab_size": len(words), "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **fields, pad_token_id=words.pad_token_id, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.config.is_decoder = False
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    wanted = tiny_chat.recipe(tmp_path / "base", chats)
    with pytest.raises(ModelError, match=rf"model_type '{architecture}'\) fills gaps in a text"):
        rehearse(wanted, device_name="cpu")
    # An encoder of a name that is not known is told by what it does.
    monkeypatch.setattr(profiles, "_require_writer", lambda *_: None)
    with pytest.raises(ModelError, match=rf"model_type '{architecture}'\) does not write from left to right"):
        run(wanted, tmp_path / "bundle", device_name="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("review\nfine\n", r"control.csv:2: task.control reads a column 'text'; there are 'review'"),
        ("text\na\n", r"has no text of two tokens or more"),
    ],
)
def test_unrelated_text_that_cannot_be_read_is_told_before_training(
    content: str, message: str, chat_bases: Bases, chats: Path, tmp_path: Path
):
    (tmp_path / "control.csv").write_text(content)
    wanted = tiny_chat.recipe(chat_bases(), chats, f"task.control={tmp_path / 'control.csv'}")
    heard: list[object] = []
    with pytest.raises(DataError, match=message):
        run(wanted, tmp_path / "bundle", device_name="cpu", listen=heard.append)
    assert not any("training" in str(event) for event in heard)


# Before and after


def test_the_report_shows_answers_and_losses_before_and_after(chat_bases: Bases, chats: Path, tmp_path: Path):
    (tmp_path / "control.csv").write_text("text\nthe film was good\ndull and long\n")
    wanted = tiny_chat.recipe(
        chat_bases(), chats, f"task.control={tmp_path / 'control.csv'}", "train.learning_rate=0.05"
    )
    report = json.loads((run(wanted, tmp_path / "bundle", device_name="cpu").folder / "report.json").read_text())
    assert len(report["samples"]) == 2
    for sample in report["samples"]:
        assert set(sample) == {"messages", "wanted", "before", "after"}
        assert [message["role"] for message in sample["messages"]] == ["user"]
        rows = [row["messages"][1]["content"] for row in tiny_chat.CHATS if row["messages"][0] == sample["messages"][0]]
        assert rows == [sample["wanted"]]
    loss = report["control_loss"]
    assert set(loss) == {"before", "after"}
    assert loss["before"] != loss["after"]
    base, ours = report["baselines"]["base"], report["scores"]["test"]
    assert base["gain"]["value"] == pytest.approx(base["loss"]["value"] - ours["loss"]["value"], abs=1e-6)
    assert set(ours) == {"loss", "perplexity", "token_accuracy", "tokens"}


def test_questions_that_leave_no_room_for_an_answer_are_no_samples(chat_bases: Bases, tmp_path: Path):
    long = {"messages": [{"role": "user", "content": "Why? " * 200}, {"role": "assistant", "content": "That."}]}
    mine = tiny_chat.chats(tmp_path / "mine.jsonl", tiny_chat.CHATS)
    held = tiny_chat.chats(tmp_path / "held.jsonl", [long, *tiny_chat.CHATS[:2]])
    ready = prepare(
        tiny_chat.recipe(chat_bases(), mine, f"data.test={held}", "task.max_length=2000"), tmp_path / "work"
    )
    found = contrast.prepare(ready.adapted, ready.tokens)
    assert [question.messages for question in found.questions] == [row["messages"][:1] for row in tiny_chat.CHATS[:2]]
