"""What checks the engine."""
