"""Chapter 6: a mixture of experts."""
