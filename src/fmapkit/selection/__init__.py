"""What a capture was asked for: layers, kinds, filters; and when a pass may end early."""
