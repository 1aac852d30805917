"""Train a VALL-E: `python launch/train_valle.py [recipe] [key=value ...]`; configs/valle/tiny_speech.yaml unless told otherwise.

On a cluster: `ray job submit --working-dir . -- python launch/train_valle.py`.
"""

from nexus_scale.cli import launch

if __name__ == "__main__":
    launch("valle/tiny_speech")
