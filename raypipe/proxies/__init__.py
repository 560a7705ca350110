"""Networks that a proxy can be, and the proxy itself: a backbone with a linear head.

`find` turns the name in `proxy.model` into a `NetworkSource`, and `build_network` builds a proxy
from it. Nothing else in the package knows where a network comes from.
"""
