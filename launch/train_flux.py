"""Train a FLUX: `python launch/train_flux.py [recipe] [key=value ...]`; configs/flux/tiny_openmoji.yaml unless told otherwise.

On a cluster: `ray job submit --working-dir . -- python launch/train_flux.py`.
"""

from nexus_scale.cli import launch

if __name__ == "__main__":
    launch("flux/tiny_openmoji")
