"""Real models: one Flax decoder, its tokenizers, generation, and loading of checkpoints."""
