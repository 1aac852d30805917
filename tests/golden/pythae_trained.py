"""What the bound of pythae 0.1.2's VAE is after 3,000 steps on Fashion-MNIST: `PYTHONPATH=FOLDER python -m tests.golden.pythae_trained
DATA`, where FOLDER holds pythae (`pip install --no-deps --target FOLDER pythae==0.1.2`) and DATA what `nexus train
vae/mlp_fashion_mnist` prepares: `python data_pipelines/fetch_fashion_mnist.py --output fashion-mnist`.

Writes pythae_trained.json beside this file: nats of all 10,000 held-out images. Batch, rate, optimizer, latents and pixels are those of the
recipe vae/mlp_fashion_mnist, whose run of as many steps `nexus scoreboard scoreboard_latent` holds against the figure. Half a minute.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
STEPS, BATCH, RATE, LATENTS, SEED = 3000, 100, 1e-3, 20, 0
COUNTS = {"train": 60_000, "heldout": 10_000}


def images(data: Path, split: str) -> Tensor:
    """Shares of white, (N, 1, 28, 28)."""
    from nexus_scale.data.dataset import Dataset, Source

    dataset = Dataset.open([Source([data / "fashion-mnist" / split / "images"], 1.0)])
    batches = dataset.fixed(COUNTS[split], rank=0, world_size=1, batch=1000)
    return torch.cat([(batch["image"][:, :1] + 1) / 2 for batch in batches])


def main(data: Path) -> None:
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput

    train, heldout = images(data, "train"), images(data, "heldout")
    torch.manual_seed(SEED)
    net = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=LATENTS, reconstruction_loss="bce"))
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    order: list[Tensor] = []
    for _ in range(STEPS):
        order = order or list(torch.randperm(len(train)).split(BATCH))
        optimizer.zero_grad()
        net(ModelOutput(data=train[order.pop()])).loss.backward()
        optimizer.step()
    names = {"nats": "loss", "reconstruction": "recon_loss", "kl": "reg_loss"}
    sums = dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for part in heldout.split(1000):
            out = net(ModelOutput(data=part))
            for name, theirs in names.items():
                sums[name] += len(part) * float(out[theirs])
    figures = {name: round(value / len(heldout), 3) for name, value in sums.items()}
    FILE.write_text(json.dumps({"steps": STEPS, **figures}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
