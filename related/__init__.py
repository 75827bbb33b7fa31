"""What the two papers build on or compare with; nothing here is needed to understand them."""
