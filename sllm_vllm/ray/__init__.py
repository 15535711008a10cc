"""Everything that runs on a Ray cluster: agents, the controller, and the Serve application."""
