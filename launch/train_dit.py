"""Train a DiT: `python launch/train_dit.py [recipe] [key=value ...]`; configs/dit/tiny_fashion_mnist.yaml unless told otherwise.

On a cluster: `ray job submit --working-dir . -- python launch/train_dit.py`.
"""

from nexus_scale.cli import launch

if __name__ == "__main__":
    launch("dit/tiny_fashion_mnist")
