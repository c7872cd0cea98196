"""memspan.data."""
