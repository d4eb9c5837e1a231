"""Training. Without this file the root's train.py would be taken for the package `unitoken.train`."""
