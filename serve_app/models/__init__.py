"""The served models behind one ingress: their names, what clients may know about them, and the state of their
stages."""
