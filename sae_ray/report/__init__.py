"""A run folder as one self-contained HTML page."""

from sae_ray.report.render import render_report

__all__ = ["render_report"]
