"""Ways to plan, one function each: model and cluster in, a layout out, None where it finds none that fits.

`choose` knows them by name and takes the best.
"""
