"""What a recipe and its data are tried for before a run starts: shapes, FLOPs and losses on the meta device."""
