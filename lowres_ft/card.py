"""README.md of a bundle: a model card in the Hub's form, with the very lines that load it."""

import html
import json
import unicodedata
from collections.abc import Collection
from typing import Any

from lowres_ft import quantize, yaml12
from lowres_ft.bundle import Bundle
from lowres_ft.harmless import harmless
from lowres_ft.tasks.base import Task
from lowres_ft.verdict import interval, metrics

_EMBEDDINGS = "They load the base with its embeddings as they were published; lowres-ft alone holds those in int8."


def render(bundle: Bundle, report: dict[str, Any], *, pad_token_id: int | None, ends: Collection[int] = ()) -> str:
    """The card of a bundle whose scores stand in `report`.

    `pad_token_id` is given where the base sets none, and all `ends` of an answer where the base does not know one.
    """
    trial = bundle.recipe.task.trial
    body = [
        f"# {bundle.recipe.name}",
        _sentence(bundle.recipe.summary),
        f"Trained with lowres-ft ({_method(bundle)}) on {_named_base(bundle)}; "
        f"data: {_span(bundle.recipe.data.train)}.",
        "## Scores",
        _table(report),
        "95 % bootstrap intervals. `report.html` shows more, `report.json` holds all, `recipe.yaml` the experiment, "
        "`lowres.json` hashes.",
        "## Use",
        f"With lowres-ft: `lowres-ft predict . {trial}`; `lowres-ft verify .` checks files and logits.",
        "With transformers" + ("" if bundle.recipe.method.trains_base else " and peft") + " alone:",
        f"```python\n{_lines(bundle, pad_token_id, ends)}\n```",
        _EMBEDDINGS if bundle.recipe.model.quantize_embeddings else "",
        bundle.recipe.task.advice,
        _cleaned(bundle),
    ]
    return f"---\n{yaml12.dumps(_front_matter(bundle))}---\n\n" + "\n\n".join(part for part in body if part) + "\n"


def render_merged(bundle: Bundle) -> str:
    """The card of a merged model, which other programs load without what lowres-ft knows of its probabilities."""
    recipe = bundle.recipe
    body = [
        f"# {recipe.name}",
        _sentence(recipe.summary),
        f"Merged by lowres-ft: {_method(bundle)}, folded into {_named_base(bundle)}; data: {_span(recipe.data.train)}.",
        recipe.task.advice,
        _cleaned(bundle),
    ]
    front = _front_matter(bundle) | {"library_name": "transformers"}
    return f"---\n{yaml12.dumps(front)}---\n\n" + "\n\n".join(part for part in body if part) + "\n"


def _sentence(text: str) -> str:
    """A text of the recipe as one paragraph without markup."""
    return html.escape(harmless(" ".join(text.split()), keep=""), quote=False)


def _span(text: str) -> str:
    """A name as code within a line."""
    return f"`{harmless(text, keep='').replace('`', chr(39))}`"


def _cleaned(bundle: Bundle) -> str:
    cleaners = ", ".join(bundle.recipe.data.clean)
    return (
        f"Texts are cleaned first ({cleaners}): lowres-ft does so by itself, other programs must." if cleaners else ""
    )


def _front_matter(bundle: Bundle) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "transformers" if bundle.recipe.method.trains_base else "peft"}
    if bundle.passport.base.revision:  # only a name on the Hub is a base to the Hub
        front["base_model"] = bundle.passport.base.name
    return front | {"pipeline_tag": bundle.recipe.task.hub_tag, "tags": ["lowres-ft", bundle.passport.method]}


def _method(bundle: Bundle) -> str:
    form = bundle.passport.quantize
    held = "" if form == "none" else f", base in {form}"
    if bundle.recipe.model.quantize_embeddings:
        held = ", base and embeddings in int8" if form == "int8" else f"{held}, embeddings in int8"
    return f"{bundle.passport.method}{held}, computed in {bundle.passport.dtype}"


def _named_base(bundle: Bundle) -> str:
    base = bundle.passport.base
    revision = f" at revision {base.revision[:12]}" if base.revision else ""
    return f"{_span(base.name)}{revision}"


def _table(report: dict[str, Any]) -> str:
    rows = [(split, scores) for split, scores in report["scores"].items()]
    rows += [(f"test, baseline {name}", scores) for name, scores in report["baselines"].items()]
    if not rows:
        return "No rows were held out."
    names = metrics(rows[0][1])
    lines = ["| rows | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, scores in rows:
        cells = [interval(scores[name]) for name in names]
        lines.append(f"| {label} ({scores[names[0]]['count']}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _lines(bundle: Bundle, pad_token_id: int | None, ends: Collection[int]) -> str:
    """Python that loads the bundle."""
    auto = bundle.recipe.task.model_class
    if bundle.recipe.method.trains_base:
        return "\n".join(
            [
                f"from transformers import AutoTokenizer, {auto}",
                f'model = {auto}.from_pretrained(".").eval()',
                'tokenizer = AutoTokenizer.from_pretrained(".")',
                *_answering(bundle, ends),
            ]
        )
    base = bundle.passport.base
    options = f", revision={json.dumps(base.revision)}" if base.revision else ""
    names = [auto, "AutoTokenizer"]
    if bundle.recipe.method.corrects_quantization:
        names.append("BitsAndBytesConfig")
        options += f",\n    quantization_config=BitsAndBytesConfig({_quantization(bundle)})"
    options += _fields(bundle.recipe.task) + _pad(pad_token_id)
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {', '.join(sorted(names))}",
            f"base = {auto}.from_pretrained({json.dumps(base.name)}{options})",
            'model = PeftModel.from_pretrained(base, ".").eval()',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            *_answering(bundle, ends),
        ]
    )


def _answering(bundle: Bundle, ends: Collection[int]) -> tuple[str, ...]:
    """Lines that ask a model that writes; one that can think is asked not to, as it was trained."""
    if not bundle.recipe.task.generates:
        return ()
    template = bundle.folder / "chat_template.jinja"
    thinks = template.is_file() and "enable_thinking" in template.read_text(encoding="utf-8")
    stops = f", eos_token_id={sorted(ends)}" if ends else ""
    return (
        'messages = [{"role": "user", "content": "Hello."}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True'
        + (", enable_thinking=False)" if thinks else ")"),
        f"answer = model.generate(**inputs, max_new_tokens=64, do_sample=False{stops})",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    )


def _pad(pad_token_id: int | None) -> str:
    return "" if pad_token_id is None else f", pad_token_id={pad_token_id}"


def _fields(task: Task) -> str:
    """The options that tell the task to the model's config, such as how many outputs a new head has."""
    return "".join(f",\n    {name}={_literal(value)}" for name, value in task.model_config_fields().items())


def _literal(value: object) -> str:
    """A value in Python; `json.dumps` writes texts, so that no label can be code."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if not isinstance(value, str):
        return repr(value)
    text = json.dumps(value, ensure_ascii=False)
    acts = [mark for mark in set(text) if unicodedata.category(mark) in ("Cc", "Cf", "Co", "Cn")]
    return text.translate({ord(mark): mark.encode("unicode_escape").decode() for mark in acts})


def _quantization(bundle: Bundle) -> str:
    """The arguments that quantize the base as it was in training, all but the heads."""
    config = json.loads((bundle.folder / "adapter_config.json").read_bytes())
    fields = quantize.config_fields(bundle.passport.quantize)
    if config["modules_to_save"]:  # without any, transformers spares the output layer
        fields["llm_int8_skip_modules"] = config["modules_to_save"]
    return ", ".join(f"{name}={value!r}" for name, value in fields.items())
