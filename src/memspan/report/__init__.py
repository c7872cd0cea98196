"""memspan.report."""
