"""What comes after rounding: learned rounding, and group sizes by evolution."""
