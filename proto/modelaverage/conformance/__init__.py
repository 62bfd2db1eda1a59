"""The conformance kit: plays a client program in any language through every case (docs/conformance.md)."""
