"""Long sampling runs: what they made so far, who makes what, and how they survive being killed."""
