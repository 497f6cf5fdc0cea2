"""A traced call compiled to taps, and one later call read with them."""
