"""The front: one endpoint over many models. Decides where requests go and which engines run. See DESIGN.md."""
