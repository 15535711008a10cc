"""What every daemon of this package needs: sockets, keys, descriptors, signals, run loops."""
