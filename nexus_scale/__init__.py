"""Training generative models (images, video, speech, music) at any scale."""

__version__ = "0.1.0"
