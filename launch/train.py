"""Train any recipe: `python launch/train.py configs/mmdit/tiny_openmoji.yaml cluster.workers=1 steps=200`."""

from nexus_scale.cli import launch

if __name__ == "__main__":
    launch(None)
