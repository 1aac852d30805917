"""Networks of sound: codecs of waveforms, and language models of their codes."""
