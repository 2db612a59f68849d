"""Chapter 5: a gate in the MLP, and a norm that only divides."""
