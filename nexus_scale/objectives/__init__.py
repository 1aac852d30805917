"""One file per objective: the mathematics of a family, in float32."""
