"""Lightning: every Trainer gets the fused operators with one line."""
