"""Networks that a proxy can be, and the proxy itself: a backbone with a linear head.

`registry.find` turns the name in `proxy.model` into a `Network`, and `networks.build_network`
builds a proxy from it. Nothing else in the package knows where a network comes from.
"""
