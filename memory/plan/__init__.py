"""What fits: footprints, limits and the plan that follows from them, by arithmetic alone."""
