"""Train an MMDiT: `python launch/train_mmdit.py [recipe] [key=value ...]`; configs/mmdit/tiny_openmoji.yaml unless told otherwise.

On a cluster: `ray job submit --working-dir . -- python launch/train_mmdit.py`.
"""

from nexus_scale.cli import launch

if __name__ == "__main__":
    launch("mmdit/tiny_openmoji")
