"""Every input of a merge under the output's names, in its shapes and its vocabulary: before a weight is read."""
