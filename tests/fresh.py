"""Load bundles in a fresh process, with lowres-ft and with the lines of their model card, and print logits.

Arguments: a JSON list of bundle folders, and a JSON list of texts, or of pairs of them.
"""

import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any


def examples(task, texts: list) -> list:
    """Texts, or pairs of them, as examples of a task."""
    return [
        task.bare(text, "") if isinstance(text, str) else task.read(dict(zip(("text", "pair"), text, strict=True)), "")
        for text in texts
    ]


def main() -> None:
    folders, texts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    import torch

    from lowres_ft import device
    from lowres_ft.batches import in_memory
    from lowres_ft.bundle import open_bundle
    from lowres_ft.evaluate import logits

    torch.set_num_threads(1)
    found = {}
    for folder in folders:
        bundle = open_bundle(folder)
        adapted, plan = bundle.load(device.find("cpu"))
        if bundle.recipe.task.generates:
            found[folder] = chat(folder, adapted, texts)
            continue
        ours = logits(adapted, in_memory(adapted.task.encode(adapted.tokenizer, examples(adapted.task, texts))), plan)
        names = card(folder)
        pairs = not isinstance(texts[0], str)
        columns = [list(column) for column in zip(*texts, strict=True)] if pairs else [texts]
        inputs = names["tokenizer"](*columns, padding=True, return_tensors="pt")
        if not pairs or getattr(names["model"].config, "type_vocab_size", 0) < 2:
            inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            theirs = names["model"](**inputs).logits
        if theirs.dim() == 3:  # of each token; ours have 0 where there is padding
            theirs = theirs * inputs["attention_mask"][..., None]
        labels = names["model"].config.id2label
        found[folder] = {"ours": ours.tolist(), "theirs": theirs.tolist(), "labels": labels}
    print(json.dumps(found))


def card(folder: str) -> dict:
    """Run the lines of a model card; return what they named."""
    os.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of a name in transformers
        exec(code, names)
    return names


def chat(folder: str, adapted: Any, texts: list[str]) -> dict:
    """Logits (one for each text) after its prompt, and the answer to it, of both."""
    import torch

    from lowres_ft.generation import Writer

    names, writer = card(folder), Writer(adapted, max_new_tokens=8)
    questions = [adapted.task.bare(text, "") for text in texts]
    ids = [torch.tensor([writer._prompt(question)]) for question in questions]
    with torch.inference_mode():
        ours, theirs = (
            [model(input_ids=one).logits[0, -1].tolist() for one in ids] for model in (adapted.model, names["model"])
        )
        asked = [
            names["tokenizer"].apply_chat_template(
                question.messages, add_generation_prompt=True, return_tensors="pt", enable_thinking=False
            )["input_ids"]
            for question in questions
        ]
    return {
        "ours": ours,
        "theirs": theirs,
        "same_prompts": all(torch.equal(one, other) for one, other in zip(ids, asked, strict=True)),
        "answers": [writer(question) for question in questions],
        "printed": names["tokenizer"].decode(
            names["answer"][0, names["inputs"]["input_ids"].shape[1] :], skip_special_tokens=True
        ),
        "ours_printed": Writer(adapted, max_new_tokens=64)(adapted.task.bare("Hello.", "")),
    }


if __name__ == "__main__":
    main()
