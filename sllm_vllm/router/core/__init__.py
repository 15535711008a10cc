"""All decisions of the router, pure: events in, actions out."""
