"""Who is who in a model: names of modules and parameters, wrappers, calls that no hook sees."""
