"""Typed settings: dataclasses checked in one place, read from YAML files and from the command line."""
