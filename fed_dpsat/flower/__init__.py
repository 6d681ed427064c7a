"""Flower's side: records, client app, server app, the private strategy and the grid."""
