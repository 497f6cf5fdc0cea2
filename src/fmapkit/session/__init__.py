"""One `with` block: when a pass begins and ends, who answers a module's call, what is missed."""
