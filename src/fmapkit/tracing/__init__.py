"""Watch a pass op by op: which layer and which nonlinearity ran, and what is overwritten."""
