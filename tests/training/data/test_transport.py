"""Batches on their way between processes: all as it was, by one file descriptor."""

import copy
import pickle
import subprocess
import sys

import torch

from svitt_ops.training.data.transport import Batch

# In a process of its own, that may open so few files: on the way, and of batches that are kept.
FEW_FILES = """
import resource, torch
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from torch.utils.data import DataLoader, Dataset
from svitt_ops.training.data.collate import Collator
from svitt_ops.training.data.datasets import Clip
from svitt_ops.training.tasks.parts.gallery import GalleryClip, stack_clips
from svitt_ops.training.data.text import train_tokenizer

def picture(number, *lead):
    shape = (*lead, 3, 4 + number % 37, 5 + number % 3)
    return torch.full(shape, number % 256, dtype=torch.uint8)

class Clips(Dataset):
    def __len__(self):
        return 2048
    def __getitem__(self, number):
        return Clip(picture(number, 2), "a b", number, number)

class Gallery(Clips):
    def __getitem__(self, number):
        return GalleryClip(number, picture(number, 2, 2) if number % 50 else None, "broken")

collate = Collator(tokenizer=train_tokenizer(["a b c"], 50), mask_probability=0.5)
count, kept = 0, []
for batch in DataLoader(
    Clips(), batch_size=512, num_workers=2, collate_fn=collate, persistent_workers=True
):
    kept.append(batch)
    assert len(batch["clips"]) == len(batch["boxes"]) == 512
    for clip, number in zip(batch["clips"], batch["pair_ids"].tolist(), strict=True):
        assert torch.equal(clip, picture(number, 2))
        count += 1
for batch in DataLoader(Gallery(), batch_size=256, num_workers=2, collate_fn=stack_clips):
    kept.append(batch)
    assert len(batch["frames"]) == 2 * len(batch["numbers"])
    for place, number in enumerate(batch["numbers"]):
        assert torch.equal(batch["frames"][2 * place + 1], picture(number, 2))
        count += 1
    count += len(batch["unusable"])
print(count)
"""


def test_a_batch_arrives_as_it_was_sent() -> None:
    batch = Batch(
        clips=[torch.arange(k, dtype=torch.uint8).view(-1, k) for k in (1, 7, 3)],
        one=torch.tensor(5),
        none=torch.empty(0, 4),
        strided=torch.arange(12.0, dtype=torch.float64).view(3, 4).T,
        mask=torch.tensor([True, False, True]),
        half=torch.tensor([1.5, -2], dtype=torch.bfloat16),
        boxes=[(0, 1, 2, 3)],
        words={"a": [1]},
        empty=[],
    )
    found = pickle.loads(pickle.dumps(batch))
    assert type(found) is dict
    assert list(found) == list(batch)
    tensors = [*found["clips"]]
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value)
            assert found[name].dtype == value.dtype
            tensors.append(found[name])
        elif name != "clips":
            assert found[name] == value
    for got, wanted in zip(found["clips"], batch["clips"], strict=True):
        assert torch.equal(got, wanted)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert copy.copy(batch)["one"] is batch["one"]
    assert pickle.loads(pickle.dumps(Batch(skipped=[]))) == {"skipped": []}


def test_batches_of_mixed_sizes_need_few_open_files() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FEW_FILES],
        capture_output=True,
        text=True,
        timeout=500,  # what failed before did not end
    )
    assert run.stdout == "4096\n", run.stderr[-2000:]
