"""What a plan costs: bytes by arithmetic, seconds, memory and energy by measurement."""
