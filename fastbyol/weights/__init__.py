"""Backbone weights in and out: other libraries' formats, and export."""
