"""A process of its own that loads a base and tells by how many bytes its memory grew at most."""

import json
import sys
from pathlib import Path
from typing import Any


def status() -> dict[str, int]:
    """What Linux says of this process's memory, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in lines}


def load(folder: str, *changes: str) -> Any:
    from lowres_ft import bases, device, model, profiles
    from lowres_ft import plan as plans
    from tests import tiny_chat

    recipe = tiny_chat.recipe(Path(folder), Path("rows.jsonl"), "model.dtype=bfloat16", *changes)
    base = bases.resolve(recipe.model)
    profile = profiles.profile(base, recipe.task)
    return model.load(recipe, base, profile, plans.make(recipe, profile, device.find("cpu")))


def main() -> None:
    import torch

    torch.set_num_threads(1)
    warm, folder, *changes = sys.argv[1:]
    load(warm, *changes)  # so that libraries have come with all that they hold
    before = status()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    adapted = load(folder, *changes)
    after = status()
    tensors = [*adapted.model.parameters(), *adapted.model.buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    print(json.dumps({"peak": after["VmHWM"] - before, "held": sum(held.values())}))


if __name__ == "__main__":
    main()
