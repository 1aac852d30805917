"""How good samples are, by figures. Functions of tensors: nothing here knows a run, a rank or a network of the house."""
