"""memspan.continual."""
