"""The HTTP side of a replica: routes, authentication, limits."""
