"""The seam: everything that touches a model's experts.

The router never changes and never learns: top-k is over the original experts, then indices are mapped.
"""
