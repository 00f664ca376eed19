"""Load bundles in a fresh process, with lowres-ft and with the lines of their model card, and print logits.

Arguments: a JSON list of bundle folders, and a JSON list of texts.
"""

import json
import os
import re
import sys
import warnings
from pathlib import Path


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
        encoded = adapted.task.encode(adapted.tokenizer, [adapted.task.bare(text, "") for text in texts])
        ours = logits(adapted, in_memory(encoded), plan)
        os.chdir(folder)
        (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)
        names: dict = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's, of a name in transformers
            exec(code, names)
        inputs = names["tokenizer"](texts, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            theirs = names["model"](**inputs).logits
        if theirs.dim() == 3:  # of each token; ours have 0 where there is padding
            theirs = theirs * inputs["attention_mask"][..., None]
        labels = names["model"].config.id2label
        found[folder] = {"ours": ours.tolist(), "theirs": theirs.tolist(), "labels": labels}
    print(json.dumps(found))


main()
