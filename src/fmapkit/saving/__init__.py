"""Maps without their session: copied, pickled, in a safetensors file."""
