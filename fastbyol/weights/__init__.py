"""Backbone weights: loading from timm, torchvision and fastbyol files, and export to other libraries."""
