# Empty, and needed: without it the import system takes the root's train.py for the package `unitoken.train`.
