"""timm: a ViT of its own, and the NativeScaler of its training script."""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import NativeScaler
from torch import nn

from gapt_optim import EntropyConfig, GAPTConfig, GAPTOptimizer, RepresentationHook


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5
    )
    adamw = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    hook = RepresentationHook(model, "blocks.*")  # new
    config = GAPTConfig(entropy=EntropyConfig(window=None))  # new: all patches of an image are one window
    optimizer = GAPTOptimizer(adamw, hook, config)  # new: was adamw
    scaler = NativeScaler(device="cpu")
    for step in range(1, 21):
        images, labels = torch.randn(16, 3, 32, 32), torch.randint(5, (16,))
        images[torch.arange(16), labels % 3] += 1.0
        loss = nn.functional.cross_entropy(model(images), labels)
        objective = optimizer.objective(loss)  # new
        scaler(objective, optimizer, clip_grad=1.0, parameters=model.parameters())  # new: was scaler(loss, ...)
        optimizer.zero_grad()
        metrics = optimizer.metrics
        if metrics is not None and step % 10 == 0:
            print(f"step {step}: loss {metrics.loss:.3f}, entropy {metrics.entropy:.3f}, {optimizer.phase.value}")


if __name__ == "__main__":
    main()
