"""The admin API: its routes, its views, its metrics, and the client that the command line uses."""
