"""OpenMoji pictures with their names: real pairs without a network, and the pictures of what was learned."""
