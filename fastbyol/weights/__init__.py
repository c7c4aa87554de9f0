"""Backbone weights: loading from timm, torchvision and fastbyol, and export."""
