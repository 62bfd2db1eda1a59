"""The optimizer, and the parts of torch that it has to deal with."""
