"""What libraries import by the way and a run does not use stays out of its process."""

import subprocess
import sys

import pytest

HEAVY = "torch._dynamo.eval_frame torch._inductor.compile_fx scipy.optimize._lsap pandas".split()
TRAIN = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification
from lowres_ft.ledger import Ledger
from torch._subclasses.fake_tensor import FakeTensorMode

sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
with FakeTensorMode(), Ledger():
    BertForSequenceClassification(BertConfig(**sizes))(torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()
model = BertForSequenceClassification(BertConfig(**sizes))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
logits = checkpoint(lambda ids: model(ids).logits, torch.zeros(1, 3, dtype=torch.long), use_reentrant=False)
logits.sum().backward()
optimizer.step()
optimizer.zero_grad()
"""


def python(code: str) -> str:
    """What a process of its own prints, which fails if the code does."""
    begin = "import sys; from lowres_ft import deferred; deferred.begin(); deferred.begin()\n"
    done = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_step_of_training_leaves_the_compiler_out():
    loaded = python(f"{TRAIN}\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]"


def test_bitsandbytes_and_peft_leave_the_compiler_out():
    code = "from lowres_ft import libraries; libraries.bitsandbytes(); libraries.peft()"
    assert python(f"{code}\nprint([name for name in {HEAVY} if name in sys.modules])") == "[]"


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("from scipy.optimize import linear_sum_assignment as f; print(f([[2, 1], [1, 2]])[1].tolist())", "[1, 0]"),
        ("import scipy.optimize; print(scipy.optimize.minimize_scalar(lambda x: x * x).success)", "True"),
        (
            "import scipy.optimize._lsap as inner; print(inner is sys.modules['scipy.optimize'].__dict__['_lsap'])",
            "True",
        ),
        ("from scipy.optimize import nothing_of_that_name", "ImportError"),
        ("import torch._dynamo.nothing_of_that_name", "ModuleNotFoundError"),
        (
            "import torch; torch._dynamo.reset(); print(torch._dynamo.config is sys.modules['torch._dynamo.config'])",
            "True",
        ),
        (
            "from torch._dynamo.utils import counters; print(sys.modules['torch._dynamo.utils'].counters is counters)",
            "True",
        ),
        (
            "import torch, torch._dynamo.utils as u; print(u is torch._dynamo.utils, u.__spec__.origin == u.__file__)",
            "True True",
        ),
    ],
)
def test_what_is_asked_of_a_module_that_is_left_out_comes_from_the_module(code, printed):
    if printed.endswith("Error"):
        code = f"try:\n    {code}\nexcept {printed} as error:\n    print(type(error).__name__)"
    assert python(code) == printed


def test_marks_are_made_good_when_something_is_compiled():
    code = """
import torch, torch._dynamo
@torch._dynamo.assume_constant_result
def three():
    return 3
@torch._dynamo.disable
def left():
    return 4
assert not hasattr(three, "_dynamo_marked_constant") and left() == 4
print(torch.compile(lambda x: x + three(), backend="eager")(torch.zeros(1)).item(), three._dynamo_marked_constant)
"""
    assert python(code) == "3.0 True"


def test_compiling_waits_for_the_first_call():
    code = """
import types, torch
from lowres_ft import libraries
with libraries._compiled_later():
    add = torch.compile(lambda x: x + 1, backend="eager")
    named = torch.compile(backend="eager")(lambda x: x + 2)
before = "torch._dynamo.eval_frame" in sys.modules
print(before, add(torch.zeros(1)).item(), named(torch.zeros(1)).item(), "torch._dynamo.eval_frame" in sys.modules)
"""
    assert python(code) == "False 1.0 2.0 True"
