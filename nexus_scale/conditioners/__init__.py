"""Raw values -> the named tensors that a network is conditioned on: text, classes, phonemes, pictures, sound."""
