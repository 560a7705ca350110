"""`raypipe view`: the samples of a run as a local page that can be searched.

A server of the standard library answers a page of plain JavaScript. It listens on the loopback
interface only, and writes nothing but the lists of ids that the command line names.
"""
