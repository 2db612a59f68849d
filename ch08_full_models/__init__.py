"""Chapter 8: full models that load real checkpoints, one file a family, and what runs them."""
