"""From samples to batches on a device: slab pool → collate → copy stream → loader."""
