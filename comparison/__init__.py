"""Recipes side by side: jobs, the steps that fill their rows, and the table."""
