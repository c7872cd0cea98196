"""memspan.nn."""
