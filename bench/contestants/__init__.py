"""Systems that run the same tasks: ADAPT, the floors below it, and its peers. One file each; what is not installed takes no part."""
