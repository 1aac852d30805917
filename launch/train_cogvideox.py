"""Train a CogVideoX: `python launch/train_cogvideox.py [recipe] [key=value ...]`; configs/cogvideox/tiny_emoji.yaml unless told otherwise.

On a cluster: `ray job submit --working-dir . -- python launch/train_cogvideox.py`.
"""

from nexus_scale.cli import launch

if __name__ == "__main__":
    launch("cogvideox/tiny_emoji")
