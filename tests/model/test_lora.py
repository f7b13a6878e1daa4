"""LoRA by PEFT on blocks and head: one adapter for all applications of a block."""

import sys
from importlib.machinery import PathFinder

import pytest

from raptor_hf.modeling_raptor_heads import RaptorForImageClassification
from tests.helpers import make
from tests.programs import ROOT, run

PEFT = ROOT / ".venv" / "peft"
LORA = """
import sys
import torch
import raptor_hf
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification as Auto

folder = sys.argv[1]
images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
labels = torch.tensor([0, 1, 2, 0, 1, 2])
targets = ["qkv", "proj", "ffn.fc1", "ffn.fc2"]
lora = LoraConfig(r=4, target_modules=targets, modules_to_save=["classifier"])
model = get_peft_model(Auto.from_pretrained(folder), lora)
before = {name: weight.clone() for name, weight in model.named_parameters()}

# two matrices for each of four layers of two blocks, whatever the number of applications
trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
assert sum("lora_" in name for name in trained) == 2 * 4 * 2
assert not any("depth_scaling" in name for name in trained)

# only they and the classifier learn
optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.01)
losses = []
for _ in range(20):
    loss = model(pixel_values=images, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], losses
for name, weight in model.named_parameters():
    assert torch.equal(weight, before[name]) == (name not in trained), name

# saved, loaded, merged
model.eval().save_pretrained(f"{folder}/adapter")
loaded = PeftModel.from_pretrained(Auto.from_pretrained(folder), f"{folder}/adapter").eval()
with torch.no_grad():
    expected = model(pixel_values=images).logits
    assert torch.equal(loaded(pixel_values=images).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(images).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(f"{folder}/merged")
    again = Auto.from_pretrained(f"{folder}/merged")
    torch.testing.assert_close(again(images).logits, expected, rtol=1e-4, atol=1e-4)
print("equal")
"""


@pytest.mark.slow
def test_lora_is_trained_saved_loaded_and_merged(teacher, tmp_path):
    if not PathFinder.find_spec("peft", [str(PEFT), *sys.path]):
        pytest.skip("PEFT is not installed")
    make(RaptorForImageClassification, teacher, num_labels=3).save_pretrained(tmp_path)
    variables = {"PYTHONPATH": f"{ROOT}:{PEFT}"}
    assert run(sys.executable, "-c", LORA, tmp_path, **variables).stdout.endswith("equal\n")
