"""Certificates: a method, an exact law, a metric. ``fastdiff certify`` runs them."""
