"""The loop that merging and AIM share: tensors read in blocks, changed, rounded once, written; and its results verified."""
