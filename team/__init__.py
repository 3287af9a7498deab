"""Several cards that share a pass: who has which tokens and heads, what they exchange, and their threads."""
