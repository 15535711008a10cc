"""The router's configuration: its sections, how a file is read and checked, and client keys."""
