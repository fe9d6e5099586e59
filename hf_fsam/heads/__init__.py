"""Where logits are made: the module that makes them, and the heads that do without."""
