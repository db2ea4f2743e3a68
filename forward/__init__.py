"""Run one or several models, whole or layer by layer, on blocks of tokens, and see the inputs of every weight.

What sees them is up to the caller: AIM sums up |x| per channel, merging by second moments sums up x x^T.

    loaded = load(base, how)                                   # forward.loading: the whole model
    watch = Watch(loaded, see, products=..., vectors=...)      # forward.watch: calls `see(use, x)` for every input
    with watch:
        run_blocks(loaded, batches)                            # forward.whole

Layer by layer, for models that are larger than the memory, and for several models in step: `forward.layerwise`.
"""
