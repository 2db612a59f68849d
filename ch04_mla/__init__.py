"""Chapter 4: multi-head latent attention."""
