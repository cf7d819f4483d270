"""Filling a model takes no second copy of it: one tensor more than the model, at most."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys, threading, time, torch, transformers as T, hasten
from tests.checkpoints.deepspeed_files import write
folder, live, dtype, stage = sys.argv[1], sys.argv[2] == "live", sys.argv[3], sys.argv[4]
def make(layers=12, width=512):
    return T.LlamaForCausalLM(T.LlamaConfig(vocab_size=512, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, intermediate_size=4 * width)).eval()
small = make(1, 64)
with torch.device("meta"):
    target = make(1, 64)
hasten.init_inference(target, checkpoint=small.state_dict(), dtype=dtype)  # imports
if stage == "none":
    make().save_pretrained(folder, max_shard_size="20MB")
else:
    from pathlib import Path
    write(Path(folder), [{n: p.detach() for n, p in make().named_parameters()}], int(stage), 3)
if live:
    target = make()
else:
    with torch.device("meta"):
        target = make()
values = sum(p.numel() for p in target.parameters())
size = values * (2 if dtype == "bf16" else 4)
largest = max(p.numel() for p in target.parameters()) * 4

def anonymous():
    with open("/proc/self/status") as f:
        return 1024 * int(next(line for line in f if line.startswith("RssAnon")).split()[1])

before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0003)
sys.setswitchinterval(0.0002)
thread = threading.Thread(target=watch); thread.start()
hasten.init_inference(target, checkpoint=folder, dtype=dtype, replace_with_kernel_inject=False)
done = True; thread.join()
print((peak - before - (0 if live else size)) / largest, size / largest)
"""


CASES = [
    ("meta", "fp32", "none"),
    ("meta", "bf16", "none"),
    ("live", "fp32", "none"),
    ("meta", "bf16", "1"),  # ZeRO's stages
    ("meta", "fp32", "3"),
    ("live", "fp32", "3"),
]


@pytest.mark.parametrize(("live", "dtype", "stage"), CASES)
def test_the_peak_is_the_model_and_one_tensor(live: str, dtype: str, stage: str, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell what memory a process has")
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path), live, dtype, stage]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # what is freed goes back at once
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    more, model = map(float, out.split())
    assert model > 10 and more < 1.1
