"""Chapter 7: where the norms stand."""
