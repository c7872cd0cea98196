"""memspan.training."""
METHODS: list[object] = []
