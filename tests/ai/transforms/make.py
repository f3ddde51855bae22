"""How the files beside this one were made: torchvision 0.29 beside torch 2.13, `python make.py` in this folder.

torchvision is no dependency: in a scratch environment, `pip install --no-deps torchvision`. Its compiled operators don't
matter here, so that they are only declared.
"""

import pickle
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

declared = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision import transforms as v1  # noqa: E402
from torchvision import tv_tensors  # noqa: E402
from torchvision.transforms import InterpolationMode, v2  # noqa: E402
from torchvision.transforms._presets import ImageClassification  # noqa: E402

HERE = Path(__file__).parent
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TRANSLATED = {
    "usual": v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(12, antialias=True),
            v2.CenterCrop(8),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=MEAN, std=STD),
        ]
    ),
    "sequential": nn.Sequential(
        v2.ConvertImageDtype(torch.float32),
        v2.Resize((6, 9), interpolation=InterpolationMode.BICUBIC),
        v2.Grayscale(),
    ),
    "nested": v2.Compose(
        [
            v2.Compose([v2.RGB(), v2.ToImage()]),
            v2.ToDtype({tv_tensors.Image: torch.float64, "others": None}, scale=True),
            v2.Resize(10, interpolation=InterpolationMode.NEAREST, max_size=11, antialias=False),
            v2.CenterCrop((12, 9)),
            v2.Identity(),
            v2.ToPureTensor(),
        ]
    ),
    "preset": ImageClassification(crop_size=8, resize_size=12),
    "bytes": v2.Compose([v2.PILToTensor(), v2.CenterCrop((5, 7)), v2.Grayscale(3)]),
}
REFUSED = {
    "v1": v1.Compose([v1.Resize(12), v1.ToTensor(), v1.Normalize(MEAN, STD)]),
    "random": v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(p=0.5)]),
    "std_zero": v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, [0.2, 0, 1])]
    ),
}

image = torch.randint(0, 256, (3, 16, 20), dtype=torch.uint8, generator=torch.manual_seed(5))
outputs = {"image": image}
for name, transform in TRANSLATED.items():
    outputs[name] = torch.Tensor.as_subclass(transform(tv_tensors.Image(image)), torch.Tensor)
save_file(
    {name: tensor.contiguous() for name, tensor in outputs.items()}, HERE / "outputs.safetensors"
)
for name, transform in (TRANSLATED | REFUSED).items():
    torch.save(transform, HERE / f"{name}.pt")
(HERE / "usual.pickle").write_bytes(pickle.dumps(TRANSLATED["usual"]))
(HERE / "v1.pickle").write_bytes(pickle.dumps(REFUSED["v1"], protocol=2))
