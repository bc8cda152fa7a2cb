"""Measuring: layers and models against their peers, each verified before it is timed; the command ``gunn bench``."""
