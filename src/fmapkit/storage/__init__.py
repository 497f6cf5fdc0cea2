"""What is held of a tensor, and for how long: references, copies, conversion, passes, a budget."""
