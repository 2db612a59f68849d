"""Chapter 2: rotary positions, and how far they reach."""
