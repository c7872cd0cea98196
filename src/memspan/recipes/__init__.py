"""memspan.recipes."""
